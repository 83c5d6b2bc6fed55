"""The flags of LLaVA's training scripts, under their own names, on transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from llava.utils import UserError


def flag(default: Any, text: str) -> Any:
    """A field of a dataclass that is a flag of the command line."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What is trained, and which parts of it."""

    model_name_or_path: str = field(
        metadata={"help": "folder or hub id: a LLaVA checkpoint, or a language model that gets --vision_tower"}
    )
    version: str | None = flag(None, "prompt template, such as plain or v1 (default: the checkpoint's, else vicuna_v1)")
    vision_tower: str | None = flag(None, "folder or hub id of the CLIP tower of a language model")
    pretrain_mm_mlp_adapter: str | None = flag(None, "mm_projector.bin of the first stage")
    tune_mm_mlp_adapter: bool = flag(False, "first stage: train the projector and nothing else")
    freeze_backbone: bool = flag(False, "leave the language model as it is")
    mm_projector_type: str | None = flag(None, "linear or mlpNx_gelu, of a new projector (default: mlp2x_gelu)")
    mm_vision_select_layer: int | None = flag(None, "hidden state of the tower that is read (default: -2)")
    mm_vision_select_feature: str | None = flag(None, "patch or cls_patch (default: patch)")
    mm_patch_merge_type: str | None = flag(None, "flat, spatial or spatial_unpad (default: flat)")
    mm_use_im_start_end: bool | None = flag(None, "put <im_start> and <im_end> around pictures")
    mm_use_im_patch_token: bool | None = flag(None, "give the vocabulary an <im_patch>, which nothing uses")
    attn_implementation: str | None = flag(None, "sdpa (default), eager or flash_attention_2")


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "LLaVA's JSON: a list of {id, image, conversations}; or JSON lines"})
    image_folder: str | None = flag(None, "folder that the pictures' names are relative to")
    image_aspect_ratio: str | None = flag(None, "pad, square or anyres (default: the checkpoint's, else pad)")
    image_grid_pinpoints: str | None = flag(None, "grids of anyres, a list of [width, height] in pixels")
    eval_data_path: str | None = flag(None, "held-out samples, whose loss is logged")
    eval_fraction: float = flag(0.0, "or this share of --data_path is held out")
    on_bad_sample: str = flag("skip", "what to do with samples that cannot be used: skip (and name them) or refuse")
    lazy_preprocess: bool = flag(True, "LLaVA's flag; samples are always read when they are needed")
    is_multimodal: bool = flag(True, "LLaVA's flag; samples with and without pictures always mix")

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("skip", "refuse"):
            raise UserError(f"--on_bad_sample is {self.on_bad_sample!r}; it can be skip or refuse")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction is {self.eval_fraction}; it is a share from 0 to below 1")
        if self.eval_fraction and self.eval_data_path:
            raise UserError("--eval_fraction and --eval_data_path exclude each other")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, LLaVA's additions, and names that transformers has dropped."""

    remove_unused_columns: bool = flag(False, "samples are no columns")
    model_max_length: int = flag(2048, "longest sample in rows, image rows included; longer ones are cut")
    freeze_mm_mlp_adapter: bool = flag(False, "leave the projector as it is")
    mm_projector_lr: float | None = flag(None, "learning rate of the projector (default: --learning_rate)")
    group_by_modality_length: bool = flag(False, "batches of samples of like length, with pictures or without")
    lora_enable: bool = flag(False, "train a LoRA adapter of the language model's layers")
    lora_r: int = flag(64, "rank of the adapter")
    lora_alpha: int = flag(16, "scale of the adapter, over its rank")
    lora_dropout: float = flag(0.05, "dropout in front of the adapter")
    lora_bias: str = flag("none", "LLaVA's flag; none is what this project trains")
    bits: int = flag(16, "4 or 8: hold the frozen language model quantised (with --lora_enable; extra 'quant')")
    pruning_config: str | None = flag(None, "prune visual tokens in every step: JSON or @file")
    overwrite_output_dir: bool = flag(False, "train anew where --output_dir holds a finished model or checkpoints")

    # What transformers 5 calls otherwise.
    warmup_ratio: float | None = flag(None, "share of all steps over which the learning rate rises")
    evaluation_strategy: str | None = flag(None, "no, steps or epoch: --eval_strategy")

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise UserError(f"--warmup_ratio is {self.warmup_ratio}; it is a share from 0 to below 1")
            self.warmup_steps = self.warmup_steps or self.warmup_ratio
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.bits not in (4, 8, 16):
            raise UserError(f"--bits is {self.bits}; it can be 4, 8 or 16")
        if self.bits != 16 and not self.lora_enable:
            raise UserError(f"--bits {self.bits} holds a frozen model; it needs --lora_enable True")
        if self.lora_bias != "none":
            raise UserError(f"--lora_bias is {self.lora_bias!r}; only none is supported")
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """A command line as the three groups of arguments.

    Raises:
        UserError: values that do not go together, or that this machine cannot do.
        SystemExit: unknown flags (argparse).
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))  # type: ignore[arg-type]
    try:
        model, data, training = parser.parse_args_into_dataclasses(None if argv is None else list(argv))
    except (ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    if model.tune_mm_mlp_adapter and training.lora_enable:
        raise UserError("--tune_mm_mlp_adapter trains the projector alone; leave out --lora_enable")
    if training.freeze_mm_mlp_adapter and (model.tune_mm_mlp_adapter or model.freeze_backbone):
        raise UserError("--freeze_mm_mlp_adapter leaves nothing to train; leave it out")
    if training.pruning_config and training.gradient_checkpointing:
        raise UserError(
            "--pruning_config and --gradient_checkpointing exclude each other: layers that run again no longer know "
            "their rows; give --gradient_checkpointing False (rows that left take no memory either)"
        )
    if training.eval_strategy != "no" and not (data.eval_data_path or data.eval_fraction):
        raise UserError("--eval_strategy needs held-out samples: --eval_data_path or --eval_fraction")
    return model, data, training
