"""Stage 0: the vision tower alone learns what each patch shows, from scratch.

python -m scripts.smollm2.tower --drawings runs/smollm2/drawings --out runs/smollm2/tower
torchrun --nproc_per_node 2 -m scripts.smollm2.tower …    # two processes of one thread share every batch

A CLIP tower with a convolution stem, 192 × 192 pixels, 144 patches. Every patch is asked which noun it shows (or none),
whether it holds a thing's centre, where it lies, and the background's colour and pattern; the class row, which nouns
the picture holds and how many things. The heads that answer are thrown away. Writes a folder that
``--vision_tower`` takes; resumes from its ``training.pt``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.vision import ConvolutionStem, VisionTower
from llava.utils import fast_autocast

from .drawings import SEEN, UNSEEN, Drawings
from .nouns import NOUNS
from .scenes import COLORS, MOST, PATTERNS, SIDE, Scene, make_crowd, make_scene, render

PATCH = 16
GRID = SIDE // PATCH
MEAN, STD = 0.5, 0.25
"""Of the pixels, the same for each channel."""

CONFIG = CLIPVisionConfig(
    image_size=SIDE,
    patch_size=PATCH,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=4,
    stem_widths=[32, 64, 128, 256],
    stem_blocks=2,
)
SELECT_LAYER = -1
"""``mm_vision_select_layer`` of this tower: all its layers."""

_NAMES, _COLORS = list(NOUNS), list(COLORS)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """float ``[3, S, S]``, as the image processor makes it."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (values - MEAN) / STD


def labels_of(scene: Scene, shown: np.ndarray) -> dict[str, torch.Tensor]:
    """What the heads are asked of a picture; patches are counted row by row.

    ``noun`` int64 ``[144]`` (0: none) is the thing that covers most of a patch, from a fifth of it on; ``centre`` bool
    ``[144]``; ``color`` and ``pattern`` numbers; ``present`` float ``[nouns]``; ``number`` of things, less one, or
    -100 where there are more than ``MOST``.
    """
    blocks = shown.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    covered = np.stack([(blocks == number).mean(axis=1) for number in range(1, len(scene.things) + 1)], axis=1)
    of_thing = np.array([1 + _NAMES.index(thing.noun) for thing in scene.things])
    noun = np.where(covered.max(axis=1) >= 0.2, of_thing[covered.argmax(axis=1)], 0)
    centre = np.zeros(GRID * GRID, dtype=bool)
    for thing in scene.things:
        column, row = (min(GRID - 1, max(0, int(value * GRID))) for value in (thing.x, thing.y))
        centre[row * GRID + column] = True
    present = torch.zeros(len(_NAMES))
    present[of_thing - 1] = 1
    return {
        "noun": torch.from_numpy(noun).long(),
        "centre": torch.from_numpy(centre),
        "color": torch.tensor(_COLORS.index(scene.color)),
        "pattern": torch.tensor(PATTERNS.index(scene.pattern)),
        "present": present,
        "number": torch.tensor(len(scene.things) - 1 if len(scene.things) <= MOST else -100),
    }


class Pictures(Dataset):
    """Picture number ``i``: pixels and labels.

    Args:
        drawings: what they are made of.
        first, count: numbers of the scenes.
        held_out: scenes of the test.
        vary: a little in colour.
        crowded: this share of them are full of things, which teaches about as much as three others do.
    """

    def __init__(
        self,
        drawings: Drawings,
        first: int,
        count: int,
        held_out: bool = False,
        vary: bool = False,
        crowded: float = 0.0,
    ) -> None:
        self.drawings, self.first, self.count = drawings, first, count
        self.held_out, self.vary, self.crowded = held_out, vary, crowded

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = self.first + index
        is_crowd = random.Random(f"kind {number}").random() < self.crowded
        scene = make_crowd(number) if is_crowd else make_scene(number, self.held_out)
        picture, shown = render(scene, self.drawings)
        pixels = pixels_of(picture)
        if self.vary:
            rng = random.Random(f"vary {number}")
            gray = pixels.mean(dim=0, keepdim=True)
            # Less colour on the things alone: the background's name must stay true.
            faded = torch.lerp(pixels, gray, rng.choice((0.0, 0.0, rng.uniform(0, 0.9), rng.uniform(-0.4, 0))))
            pixels = torch.where(torch.from_numpy(shown > 0), faded, pixels)
            pixels = pixels * rng.uniform(0.85, 1.15) + rng.uniform(-0.15, 0.15) + 0.04 * torch.randn(pixels.shape)
        return {"pixels": pixels, **labels_of(scene, shown)}


class Learner(nn.Module):
    """The tower and its heads."""

    def __init__(self) -> None:
        super().__init__()
        config = type(
            "Config",
            (),
            {
                "vision_config": CONFIG.to_dict(),
                "mm_vision_select_layer": SELECT_LAYER,
                "mm_vision_select_feature": "cls_patch",
            },
        )
        self.tower = VisionTower(config)
        self.tower.embeddings.patch_embedding = ConvolutionStem(CONFIG.stem_widths, CONFIG.stem_blocks, nn.BatchNorm2d)
        self.tower.set_attn_implementation("eager")  # a CPU goes backward through it a third faster than through sdpa
        self.tower.embeddings.patch_embedding.register_forward_hook(self._keep)
        width = CONFIG.hidden_size
        self.norm = nn.LayerNorm(width)
        self.of_patch = nn.ModuleDict(
            {
                "noun": nn.Linear(width, 1 + len(_NAMES)),
                "centre": nn.Linear(width, 1),
                "place": nn.Linear(width, 2),
                "color": nn.Linear(width, len(_COLORS)),
                "pattern": nn.Linear(width, len(PATTERNS)),
            }
        )
        # The convolutions are asked for the noun directly, too: they learn it before the transformer behind them does.
        self.of_stem = nn.Linear(width, 1 + len(_NAMES))
        self.of_picture = nn.ModuleDict({"present": nn.Linear(width, len(_NAMES)), "number": nn.Linear(width, MOST)})

    def _keep(self, stem: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._stem_rows = output.flatten(2).transpose(1, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, and shares of right answers by name."""
        hidden = self.norm(self.tower(batch["pixels"]).float())
        whole, patches = hidden[:, 0], hidden[:, 1:]
        said = {name: head(patches) for name, head in self.of_patch.items()}
        noun, is_thing = batch["noun"], batch["noun"] > 0
        weight = torch.where(is_thing, 1.0, 0.25)
        loss = 0.0
        for share, rows in ((1.0, said["noun"]), (0.5, self.of_stem(self._stem_rows).float())):
            each = functional.cross_entropy(rows.transpose(1, 2), noun, reduction="none", label_smoothing=0.05)
            loss = loss + share * (each * weight).sum() / weight.sum()
        centre = said["centre"][..., 0]
        loss += 5 * functional.binary_cross_entropy_with_logits(centre, batch["centre"].float())
        steps = (torch.arange(GRID) + 0.5) / GRID
        place = torch.stack([steps.repeat(GRID), steps.repeat_interleave(GRID)], dim=-1)
        loss += functional.mse_loss(said["place"], place.expand_as(said["place"]))
        for name in ("color", "pattern"):
            target = batch[name][:, None].expand(-1, patches.shape[1])
            loss += 0.3 * functional.cross_entropy(said[name].transpose(1, 2), target)
        present = self.of_picture["present"](whole)
        loss += 5 * functional.binary_cross_entropy_with_logits(present, batch["present"])
        number = self.of_picture["number"](whole)
        counted = batch["number"] >= 0
        errors = functional.cross_entropy(number, batch["number"], reduction="sum")
        loss += 0.3 * errors / counted.sum().clamp(min=1)
        right = said["noun"].argmax(-1) == noun
        found = (centre > 0) == batch["centre"]
        return loss, {
            "loss": float(loss.detach()),
            "thing patches": float(right[is_thing].float().mean()),
            "empty patches": float(right[~is_thing].float().mean()),
            "centres": float(found[batch["centre"]].float().mean()),
            "color": float((said["color"].argmax(-1) == batch["color"][:, None]).float().mean()),
            "pattern": float((said["pattern"].argmax(-1) == batch["pattern"][:, None]).float().mean()),
            "number": float((number.argmax(-1) == batch["number"])[counted].float().mean()),
        }


@torch.no_grad()
def measure(learner: Learner, drawings: Drawings, pictures: int = 200) -> dict[str, float]:
    """Mean figures over held-out compositions."""
    learner.eval()
    loader = DataLoader(Pictures(drawings, 0, pictures, held_out=True), batch_size=50)
    figures = [learner(batch)[1] for batch in loader]
    learner.train()
    return {name: round(float(np.mean([each[name] for each in figures])), 4) for name in figures[0]}


def export(learner: Learner, folder: Path) -> None:
    """The tower as a folder with batch norm folded into the convolutions, float32."""
    tower = VisionTower(type("Config", (), {"vision_config": CONFIG.to_dict(), "mm_vision_select_layer": SELECT_LAYER}))
    weights: dict[str, Any] = {key: value for key, value in learner.tower.state_dict().items() if ".norms." not in key}
    stem = learner.tower.embeddings.patch_embedding
    for number, (convolution, norm) in enumerate(zip(stem.convolutions, stem.norms, strict=True)):
        folded = nn.utils.fusion.fuse_conv_bn_eval(convolution.eval(), norm.eval())
        name = f"embeddings.patch_embedding.convolutions.{number}"
        weights |= {f"{name}.weight": folded.weight.detach(), f"{name}.bias": folded.bias.detach()}
    tower.load_state_dict(weights)
    tower.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)


def _average(tensors: list[torch.Tensor]) -> None:
    """In place, over all processes."""
    flat = nn.utils.parameters_to_vector(tensors)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / distributed.get_world_size(), tensors)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, default=Path("runs/smollm2/drawings"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/tower"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    args = parser.parse_args()
    workers, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if workers > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    seen, unseen = Drawings(args.drawings, SEEN), Drawings(args.drawings, UNSEEN)
    learner = Learner()
    # Convolutions with batch norm learn at a rate that a transformer of few pictures a batch does not take.
    stem = list(learner.tower.embeddings.patch_embedding.parameters())
    others = [parameter for parameter in learner.parameters() if all(parameter is not own for own in stem)]
    groups: list[Any] = [{"params": stem, "lr": 3 * args.rate}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps)))
    )
    step, file = 0, args.out / "training.pt"
    if file.is_file():
        state = torch.load(file, weights_only=True)
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
    first = args.seed * 10_000_000
    mine = [number for at in range(step, args.steps) for number in range(args.batch * at, args.batch * (at + 1))]
    pictures = Pictures(seen, first, args.steps * args.batch, vary=True, crowded=0.7)
    loader = DataLoader(pictures, args.batch // workers, sampler=mine[rank::workers], num_workers=1, prefetch_factor=8)
    began, log = time.time(), (args.out / "log.jsonl").open("a")
    for batch in loader:
        with fast_autocast(torch.device("cpu")):
            loss, figures = learner(batch)
        optimizer.zero_grad()
        loss.backward()
        if workers > 1:
            _average([parameter.grad for parameter in learner.parameters() if parameter.grad is not None])
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if rank:
            continue
        if step % 20 == 0:
            line = {"step": step, "seconds": round(time.time() - began), **{k: round(v, 4) for k, v in figures.items()}}
            print(json.dumps(line), file=log, flush=True)
        if step % args.every == 0 or step == args.steps:
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step}
            torch.save(state, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        if step % (10 * args.every) == 0 or step == args.steps:
            report = {"step": step, "seen": measure(learner, seen), "unseen": measure(learner, unseen)}
            print(json.dumps(report), file=log, flush=True)
            (args.out / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
            export(learner, args.out)


if __name__ == "__main__":
    main()
