"""The recorded runs of the published implementation in `tests/golden/` (its README is their format)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in (FOLDER / "cases").glob("*.json"))
# Recorded runs of other methods' published code, on the same models.
METHODS_FOLDER = Path(__file__).parent / "golden_methods"
METHOD_CASES = sorted(path.stem for path in METHODS_FOLDER.glob("*.json"))

# Whatever the config says, these codes lay tiles out without unpadding them and without newline rows, which is what
# LLaVA calls "spatial"; that of CDPruner always as 2 x 2.
SPATIAL = {"scope", "visionzip", "cdpruner"}


def model_file(name: str) -> Path:
    """A file of a recorded model; those that only other methods need lie with their runs."""
    return next(path for folder in (FOLDER, METHODS_FOLDER) if (path := folder / "models" / name).exists())


@cache
def golden_model(name: str, scaled: tuple[tuple[str, float], ...] = ()) -> LlavaLlamaForCausalLM:
    return build_model(name, scaled=scaled)


def build_model(
    name: str,
    newline: torch.Tensor | None = None,
    scaled: tuple[tuple[str, float], ...] = (),
    **overrides: Any,
) -> LlavaLlamaForCausalLM:
    """The recorded model of that name.

    `newline`: what ends a line of tiles, `[H]`; `scaled`: linear layers, by their published names, whose weight and
    bias are multiplied; `overrides`: of the config.
    """
    settings = json.loads(model_file(f"{name}.config.json").read_text())
    if not settings.pop("has_vision_tower"):
        settings.pop("mm_projector_type")
    model = LlavaLlamaForCausalLM(LlavaConfig(**settings | overrides))
    weights = load_file(model_file(f"{name}.weights.safetensors"))
    for layer, factor in scaled:
        for part in ("weight", "bias"):
            weights[f"{layer}.{part}"] *= factor
    model.load_state_dict(weights, strict=newline is None)
    if newline is not None:
        model.model.image_newline.data = newline
    return model.eval()


@cache
def golden_features(name: str) -> dict[str, torch.Tensor]:
    return load_file(model_file(f"{name}.features.safetensors"))


@dataclass
class GoldenCase:
    name: str
    facts: dict
    tensors: dict[str, torch.Tensor]

    @classmethod
    def load(cls, name: str) -> GoldenCase:
        folder = METHODS_FOLDER if name in METHOD_CASES else FOLDER / "cases"
        facts = json.loads((folder / f"{name}.json").read_text())
        return cls(name, facts, load_file(folder / f"{name}.safetensors"))

    @property
    def model(self) -> LlavaLlamaForCausalLM:
        """The case's model under the case's name, which selects the rule for layer 0."""
        scaled = tuple(self.facts.get("weight_scale", {}).items())
        if overrides := dict(self.facts.get("model_overrides", {})):
            newline = self.tensors[overrides.pop("image_newline").removeprefix("tensor ")]
            model = build_model(self.facts["model"], newline, scaled, **overrides)
            if self.facts["method"] in SPATIAL:
                side, (columns, rows) = 336, self.facts["input"]["grid"]
                model.config.mm_patch_merge_type = "spatial"
                model.config.image_grid_pinpoints = [[side * columns, side * rows]]
        else:
            model = golden_model(self.facts["model"], scaled)
        model.config._name_or_path = self.facts.get("name_or_path", "")
        return model

    @property
    def pixels(self) -> torch.Tensor | None:
        """`[n, 3, 336, 336]`, where the case has pictures."""
        if self.facts["input"].get("kind") != "pixels":
            return None
        small = (self.tensors["images_u8"].float() - 128) / 64
        return small.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)

    def pictures(self) -> dict[str, Any]:
        """Its pictures as `generate` takes them; several crops of one are tiles."""
        if "crops" not in self.facts["input"]:
            return {"images": self.pixels}
        return {"images": [self.pixels], "image_sizes": [tuple(self.facts["input"]["image_size"])]}

    def inputs(self) -> dict[str, Any]:
        """What `generate` takes: ids with pictures, or rows already spliced."""
        if self.pixels is not None:
            return {"input_ids": self.tensors["input_ids"], **self.pictures()}
        rows, visual = self.rows()
        return {"inputs_embeds": rows[None], "visual_mask": visual[None]}

    def rows(self, sample: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The spliced prompt: embeddings `[N, H]` and which rows are visual, bool `[N]`.

        `sample`: which one, in a case of several prompts.
        """
        rows, numbers = self.numbered_rows(sample)
        return rows, numbers > 0

    def numbered_rows(self, sample: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows`, with the number of each visual row's image, from 1; 0: text."""
        model = self.model
        given = self.facts["input"] if sample is None else self.facts["input"]["samples"][sample]
        ids = self.tensors["input_ids" if sample is None else f"input_ids_{sample}"]
        if self.pixels is not None:
            features = [image.detach() for image in model.image_rows(**self.pictures())]
        else:
            stored = golden_features(self.facts["model"])
            features = [stored[key] for key in given.get("image_keys") or []]
        pieces, visual, used = [], [], 0
        for token in ids[0]:
            if token == IMAGE_TOKEN_INDEX:
                piece, used = features[used], used + 1
            else:
                piece = model.get_input_embeddings()(token[None]).detach()
            visual += [used * int(token == IMAGE_TOKEN_INDEX)] * len(piece)
            pieces.append(piece)
        return torch.cat(pieces), torch.tensor(visual)
