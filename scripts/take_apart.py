"""Write the language model and the vision tower of a LLaVA checkpoint as two folders, as a new LLaVA starts from.

python scripts/take_apart.py llava/assets/tiny_llava checkpoints/small
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from llava.model.builder import load_pretrained_model
from llava.utils import UserError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id of a LLaVA on a LLaMA")
    parser.add_argument("out", type=Path, help="gets language_model/ and vision_tower/")
    arguments = parser.parse_args()
    tokenizer, model, image_processor, _ = load_pretrained_model(arguments.checkpoint, device="cpu")
    if not isinstance(model.config, LlamaConfig) or model.get_vision_tower() is None:
        raise UserError(f"{arguments.checkpoint} is no LLaVA with a LLaMA and a vision tower")

    decoder = arguments.out / "language_model"
    decoder.mkdir(parents=True, exist_ok=True)
    own = set(LlamaConfig().to_dict()) - {"architectures", "transformers_version", "dtype"}
    values = {key: value for key, value in model.config.to_dict().items() if key in own}
    values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (decoder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    weights = {f"model.{key}": weight for key, weight in model.model.language_model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    save_file(weights, decoder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(decoder)

    tower = model.get_vision_tower()
    folder = arguments.out / "vision_tower"
    folder.mkdir(parents=True, exist_ok=True)
    settings = CLIPVisionConfig(**{k: v for k, v in tower.config.to_dict().items() if k not in ("dtype", "model_type")})
    settings.save_pretrained(folder)
    weights = {f"vision_model.{key.removeprefix('vision_model.')}": w for key, w in tower.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor.save_pretrained(folder)
    print(f"Written: {decoder} and {folder}")


if __name__ == "__main__":
    run_main(main)
