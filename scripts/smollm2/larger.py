"""A copy of the shipped folder whose tower takes larger pictures: more visual tokens, positions interpolated.

python -m scripts.smollm2.larger --model llava/assets/llava-smollm2-135m --side 384 --out runs/smollm2/larger

384 pixels a side are 576 visual tokens, as LLaVA-1.5 has. For measuring speed: nothing was trained at that size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch.nn import functional

from llava.model import checkpoint

_POSITIONS = "embeddings.position_embedding.weight"


def enlarge(model: Path, side: int, out: Path) -> None:
    """Write ``out``, which loads as ``model`` does and takes pictures of ``side`` × ``side`` pixels."""
    shutil.copytree(model, out)
    config = checkpoint.read_json(out / "config.json")
    patches = side // config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = side
    processor = checkpoint.read_json(out / "preprocessor_config.json")
    processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    file = out / "non_lora_trainables.bin"
    weights = torch.load(file, weights_only=True)
    (name,) = [name for name in weights if name.endswith(_POSITIONS)]
    weights[name] = _interpolated(weights[name].float(), patches).to(weights[name].dtype)
    torch.save(weights, file)


def _interpolated(table: torch.Tensor, patches: int) -> torch.Tensor:
    """Positions ``[1 + old², H]``, the class row's first, for ``patches`` a side."""
    old = round((len(table) - 1) ** 0.5)
    grid = table[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = functional.interpolate(grid, size=(patches, patches), mode="bicubic", align_corners=False)[0]
    return torch.cat([table[:1], grid.flatten(1).T])


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("llava/assets/llava-smollm2-135m"))
    parser.add_argument("--side", type=int, default=384, help="pixels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    enlarge(args.model, args.side, args.out)


if __name__ == "__main__":
    main()
