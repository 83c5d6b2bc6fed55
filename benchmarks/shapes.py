"""Models with the shapes of well-known ones and random weights, and prompts for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava.pruning import methods


@dataclass(frozen=True)
class Schedule:
    """A pruning schedule: text reads no image below `shallow`, `kept` visual rows survive layer `select` and leave at
    the input of layer `leave`."""

    shallow: int
    select: int
    kept: int
    leave: int

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """From `"6,9,10,16"`."""
        return cls(*(int(part) for part in text.split(",")))

    def method(self) -> methods.Schedule:
        return methods.Schedule(self.shallow, self.select, self.kept, self.leave)

    def rows_per_layer(self, num_rows: int, num_visual: int, num_layers: int) -> list[int]:
        """Rows that each layer processes."""
        text, kept = num_rows - num_visual, min(self.kept, num_visual)
        behind = [num_rows] * (self.select + 1) + [text + kept] * (self.leave - self.select - 1)
        return behind + [text] * (num_layers - self.leave)


@dataclass(frozen=True)
class Shape:
    """A decoder, the vision tower that goes with it, and a schedule in the proportions of the published averages."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    schedule: Schedule
    tower: dict[str, int]

    def decoder_config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
        )


CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # LLaVA reads the features of the last layer but one, of 24
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
}

# 7b and 13b: kept rows and exit layer are the published averages of LLaVA-1.5 (10.3 rows; layer 23.9 of 32). The
# selecting layer is not published: 14 is the one that gives the published saving (docs/benchmarks.md).
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 8, 64, 128, 4, 2, 512, Schedule(2, 3, 10, 6), CLIP_TINY),
        Shape("1b", 22, 2048, 5632, 32, 4, 32000, Schedule(6, 9, 10, 16), CLIP_L_336),
        Shape("7b", 32, 4096, 11008, 32, 32, 32000, Schedule(6, 14, 10, 24), CLIP_L_336),
        Shape("13b", 40, 5120, 13824, 40, 40, 32000, Schedule(8, 17, 10, 30), CLIP_L_336),
    )
}


def build_decoder(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A Llama decoder with random weights, made on `device` in `dtype`."""
    return build(lambda: LlamaForCausalLM(shape.decoder_config()), device, dtype, seed)


class Tower(nn.Module):
    """A CLIP vision tower and LLaVA's two-layer projector, with random weights."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.config = CLIPVisionConfig(**shape.tower)
        self.tower = CLIPVisionModel(self.config)
        width = self.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(width, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.hidden))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[images, 3, 336, 336]` → `[images, 576, hidden]`."""
        return self.projector(self.tower(pixels).last_hidden_state[:, 1:])


def build_tower(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tower:
    return build(lambda: Tower(shape), device, dtype, seed)


def build(make, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """What `make` makes, with random weights, on `device` in `dtype`."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def twin(model: nn.Module) -> nn.Module:
    """The same weights, not copied, under modules and a config of their own: what is done to one leaves the other."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch of spliced prompts.

    Attributes:
        embeds: rows, `[batch, width, hidden]`.
        visual: which rows are visual, bool `[batch, width]`.
        attention_mask: int64 `[batch, width]`, or None where nothing is padded.
    """

    embeds: torch.Tensor
    visual: torch.Tensor
    attention_mask: torch.Tensor | None

    @classmethod
    def make(
        cls, parts: list[tuple[int, int, int]], hidden: int, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Prompts:
        """`parts`: for each sample its rows before the image, of the image, and behind it."""
        generator = torch.Generator().manual_seed(seed)
        width = max(sum(sample) for sample in parts)
        embeds = torch.randn(len(parts), width, hidden, generator=generator).to(device, dtype)
        visual = np.zeros((len(parts), width), dtype=bool)
        valid = np.zeros((len(parts), width), dtype=np.int64)
        for number, (_, image, behind) in enumerate(parts):
            visual[number, width - behind - image : width - behind] = True
            valid[number, width - sum(parts[number]) :] = 1
        mask = None if valid.all() else torch.from_numpy(valid).to(device)
        return cls(embeds, torch.from_numpy(visual).to(device), mask)

    def alone(self, sample: int) -> Prompts:
        """One sample without its padding."""
        pad = 0 if self.attention_mask is None else int((self.attention_mask[sample] == 0).sum())
        rows = slice(pad, None)
        one = slice(sample, sample + 1)
        return replace(self, embeds=self.embeds[one, rows], visual=self.visual[one, rows], attention_mask=None)

    @property
    def kwargs(self) -> dict[str, torch.Tensor | None]:
        """For `model(...)` and `model.generate(...)`."""
        return {"inputs_embeds": self.embeds, "attention_mask": self.attention_mask}
