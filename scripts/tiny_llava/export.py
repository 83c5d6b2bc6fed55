"""Write the trained model as an original-layout LLaVA checkpoint, tower inside."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from llava.model.key_mapping import original_name

from .model import PIXEL_MEAN, PIXEL_STD, Learner
from .renderer import SIDE


def write_json(path: Path, content: object) -> None:
    """Write beside, then rename."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def export(learner: Learner, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Config, float16 weights under original key names, tokenizer and image processor; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    model = learner.llava
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if key not in ("transformers_version", "_attn_implementation")
    }
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "dtype": "float16", "model_type": "llava_llama"}
    weights = {
        original_name(name): value.detach().cpu().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        beside = Path(name)
        save_file(weights, beside / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(beside)
        write_json(beside / "config.json", config)
        write_json(
            beside / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, "max_length": 1024},
        )
        write_json(
            beside / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_convert_rgb": True,
                "do_resize": True,
                "size": {"shortest_edge": SIDE},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": SIDE, "width": SIDE},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [PIXEL_MEAN] * 3,
                "image_std": [PIXEL_STD] * 3,
            },
        )
        for file in sorted(beside.iterdir()):
            file.chmod(0o644)  # what is installed with the package is for every user
            shutil.move(file, folder / file.name)
