"""Merge a LoRA checkpoint into its base model, and write the result as a whole LLaVA checkpoint.

python scripts/merge_lora_weights.py --model-path checkpoints/llava-lora --model-base MODEL --save-model-path OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.train.stages import FINISHED
from llava.utils import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder that LoRA training wrote")
    parser.add_argument("--model-base", required=True, help="the model that it was trained on: folder or hub id")
    parser.add_argument("--save-model-path", required=True, type=Path, help="new folder for the merged checkpoint")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float32)", default="float32")
    arguments = parser.parse_args()
    folder = arguments.save_model_path
    if any((folder / name).exists() for name in FINISHED):
        raise UserError(f"--save-model-path {folder} holds a model; give another folder")
    tokenizer, model, image_processor, _ = load_pretrained_model(
        arguments.model_path,
        arguments.model_base,
        get_model_name_from_path(arguments.model_path),
        device="cpu",
        dtype=arguments.dtype,
    )
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    print(f"Written: {folder}")


if __name__ == "__main__":
    run_main(main)
