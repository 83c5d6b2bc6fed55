"""The three ways to train a LLaVA: which weights change, and which files hold them.

A folder that a stage writes, at its end or as a checkpoint on the way, is what ``load_pretrained_model`` takes: the
first stage's and LoRA's with the base model beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.model import checkpoint
from llava.model.key_mapping import PROJECTOR, from_lora, module_names, original_name
from llava.train.arguments import ModelArguments, TrainingArguments
from llava.utils import UserError

_PEFT = "base_model.model."  # in front of every name under PEFT
_ADAPTER, _EXTRAS, _PROJECTOR = "adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector"
FINISHED = (f"{_PROJECTOR}.bin", _ADAPTER, checkpoint.SAFE_NAME, f"{checkpoint.SAFE_NAME}.index.json")
"""Files of which a finished model has one."""

Weights = Mapping[str, torch.Tensor]


class Stage(Enum):
    """What is trained."""

    PROJECTOR = "the projector"
    LORA = "a LoRA adapter and the projector"
    FULL = "the language model and the projector"

    @classmethod
    def of(cls, model: ModelArguments, training: TrainingArguments) -> Stage:
        if model.tune_mm_mlp_adapter or (model.freeze_backbone and not training.lora_enable):
            return cls.PROJECTOR
        return cls.LORA if training.lora_enable else cls.FULL


def prepare(model: Any, stage: Stage, training: TrainingArguments) -> Any:
    """The model with exactly the stage's weights set to be trained; for LoRA, under PEFT's wrapper.

    The vision tower is never trained.
    """
    model.requires_grad_(False)
    if stage is Stage.LORA:
        model = _with_adapter(model, training)
    elif stage is Stage.FULL:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if is_projector(name) or (stage is Stage.FULL and name.endswith("image_newline")):
            parameter.requires_grad_(not training.freeze_mm_mlp_adapter)
    for parameter in model.parameters():
        if parameter.requires_grad and not training.deepspeed:  # small steps vanish in half precision; ZeRO sees to it
            parameter.data = parameter.data.float()
    return model


def is_projector(name: str) -> bool:
    """Whether a weight of this name, under PEFT or not, is one of the projector."""
    return PROJECTOR in f"{name}."


def _with_adapter(model: Any, training: TrainingArguments) -> Any:
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise UserError("LoRA needs the extra 'train': pip install 'llava-visipruner[train]'") from error
    if training.bits != 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(training.gradient_checkpointing))
    linear = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=sorted(linear),
        exclude_modules=r".*\b(vision_tower|multi_modal_projector)\b.*",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


# --- files ---


def save(model: Any, stage: Stage, folder: Path, state: Weights | None = None) -> None:
    """Write what a stage trained into ``folder``.

    Args:
        model: as :func:`prepare` gave it.
        state: all weights, where distributed training has gathered them; else the model's own are taken.
    """
    plain = model.get_base_model() if stage is Stage.LORA else model
    weights = model.state_dict() if state is None else state
    if stage is Stage.FULL:
        plain.save_pretrained(folder, state_dict=dict(weights))
        return
    config = deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    if hasattr(config, "quantization_config"):  # of the base while it was trained on, not of what is saved
        del config.quantization_config
    config.save_pretrained(folder)
    projector = {_short(name): weight for name, weight in weights.items() if is_projector(name)}
    if stage is Stage.PROJECTOR:
        torch.save(projector, folder / f"{_PROJECTOR}.bin")
        save_file(projector, folder / f"{_PROJECTOR}.safetensors")
        return
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    own = {_PEFT + _short(name): weight.detach().cpu().contiguous() for name, weight in adapter.items()}
    save_file(own, folder / _ADAPTER, metadata={"format": "pt"})
    torch.save({_PEFT + name: weight for name, weight in projector.items()}, folder / _EXTRAS)
    settings = model.peft_config["default"]
    settings.inference_mode, training = True, settings.inference_mode
    settings.save_pretrained(folder)
    settings.inference_mode = training


def load(model: Any, stage: Stage, folder: Path) -> None:
    """Read back into the model what :func:`save` wrote, to go on training.

    Raises:
        UserError: a file is missing or damaged.
    """
    if stage is Stage.FULL:
        _put(model, module_names(checkpoint.open_weights(folder)))
    elif stage is Stage.PROJECTOR:
        _put(model, module_names(checkpoint.open_file(folder / f"{_PROJECTOR}.safetensors")))
    else:
        from peft import set_peft_model_state_dict

        adapter = checkpoint.open_file(folder / _ADAPTER)
        set_peft_model_state_dict(model, {_PEFT + from_lora(name): weight[...] for name, weight in adapter.items()})
        extras = checkpoint.open_file(folder / _EXTRAS)
        _put(model.get_base_model(), {from_lora(name): weight for name, weight in extras.items()})


def _short(name: str) -> str:
    """A weight's name in original checkpoints, as a tensor under PEFT has it or not."""
    return original_name(name.removeprefix(_PEFT))


def _put(model: Any, weights: Mapping[str, Any]) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name in own:
                own[name].copy_(weight[...])
