"""Where and how a model's weights are held: device, dtype, attention, quantisation; each checked before any work."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from llava.utils import UserError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}
_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_ATTENTION = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class Placement:
    """``device_map`` as transformers takes it, and the dtype of the weights in memory."""

    device_map: Any
    dtype: torch.dtype


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name (``float16``, ``fp16``, …).

    Raises:
        UserError: no such dtype for weights.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise UserError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        UserError: it has not, or the name is none.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is unknown; use cpu, cuda, cuda:N or mps") from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {str(device)!r} was asked for, but torch sees no CUDA GPU here; use --device cpu")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise UserError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    elif found.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' was asked for, but this is no Mac with Metal; use --device cpu")
    elif found.type != "cpu":
        raise UserError(f"device {str(device)!r} is not supported; use cpu, cuda, cuda:N or mps")
    return found


def default_device() -> torch.device:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def placement_for(device: Any, device_map: Any, dtype: Any) -> Placement:
    """Devices and dtype of a model's weights, from the arguments of ``load_pretrained_model``.

    Raises:
        UserError: a device that is not there, or a dtype that is none for weights.
    """
    main = check_device(device) if device is not None else default_device()
    if isinstance(device_map, (str, torch.device)) and device_map not in _AUTOMATIC_MAPS:
        main = check_device(device_map)
        device_map = {"": main}
    elif isinstance(device_map, dict):
        places = [f"cuda:{place}" if isinstance(place, int) else place for place in device_map.values()]
        found = [check_device(place) for place in places if place != "disk"]
        main = next((place for place in found if place.type != "cpu"), torch.device("cpu"))
    elif device_map is None:
        device_map = {"": main}
    if dtype is None:
        dtype = torch.float32 if main.type == "cpu" else torch.float16
    return Placement(device_map, parse_dtype(dtype))


def attention_for(asked: str | None, use_flash_attn: bool, placement: Placement) -> str:
    """The attention implementation to use.

    Raises:
        UserError: unknown, not installed, or not for the weights' dtype.
    """
    if use_flash_attn:
        asked = asked or "flash_attention_2"
    name = asked or "sdpa"
    if name not in _ATTENTION:
        raise UserError(f"attn_implementation {name!r} is unknown; choose one of {', '.join(_ATTENTION)}")
    if name == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise UserError(
                "flash_attention_2 needs a CUDA GPU and the extra 'flash': pip install 'llava-visipruner[flash]'"
            )
        if placement.dtype not in (torch.float16, torch.bfloat16):
            raise UserError(f"flash_attention_2 works in float16 and bfloat16, not in {placement.dtype}")
    return name


def quantization_for(
    load_8bit: bool, load_4bit: bool, compute_dtype: torch.dtype = torch.float16
) -> BitsAndBytesConfig | None:
    """How to quantise while loading; ``None``: not at all. 4-bit products are computed in ``compute_dtype``.

    Raises:
        UserError: both were asked for, or bitsandbytes is not installed.
    """
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "8- and 4-bit loading needs bitsandbytes, the extra 'quant': pip install 'llava-visipruner[quant]'"
        )
    # transformers matches these from the start of a module's full name.
    whole = ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=whole,
    )
