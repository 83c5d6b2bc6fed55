"""Train a LLaVA: the projector, a LoRA adapter or the whole language model, on LLaVA's data, with LLaVA's flags.

python -m llava.train.train --model_name_or_path … --data_path … --image_folder … --output_dir …

scripts/v1_5/ holds the calls with LLaVA's numbers; docs/training.md says what they do.
"""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from llava.conversation import conversation_mode
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_for_training
from llava.train import stages
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from llava.train.data import ConversationDataset, Sample, collate, read_samples, split
from llava.train.pruned import method_for_training
from llava.train.stages import Stage
from llava.train.trainer import LlavaTrainer
from llava.utils import UserError, run_main

logger = logging.getLogger("llava.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a command line says. Gives the exit status."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    # LLaVA's name of a flag, which transformers is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
    train(*parse(argv))
    return 0


def train(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> LlavaTrainer:
    """Train one stage and write what it trained into ``output_dir``.

    Where ``output_dir`` holds checkpoints of a run that was stopped, goes on from the last.

    Raises:
        UserError: one line that says what is wrong; all that can be, before weights are read.
    """
    stage = Stage.of(model_args, training_args)
    pruning = method_for_training(training_args.pruning_config)
    conversation_mode("", asked=model_args.version)
    resumed = _where_to_resume(model_args, training_args)
    skip_bad = data_args.on_bad_sample == "skip"
    samples = read_samples(data_args.data_path, data_args.image_folder, skip_bad)
    if data_args.eval_data_path:
        held_out = read_samples(data_args.eval_data_path, data_args.image_folder, skip_bad)
    else:
        samples, held_out = split(samples, data_args.eval_fraction, training_args.seed)
    if held_out and training_args.eval_strategy == "no":
        training_args.set_evaluate("epoch", batch_size=training_args.per_device_eval_batch_size, delay=0)

    set_seed(training_args.seed)
    tokenizer, model, image_processor, _ = _load(stage, model_args, data_args, training_args)
    if pruning is not None:
        pruning.validate_for(model.config.num_hidden_layers)
    mode = _template(model_args, model.config)
    training_data, evaluation_data = (
        _dataset(part, mode, tokenizer, image_processor, model, training_args, skip_bad) for part in (samples, held_out)
    )
    model = stages.prepare(model, stage, training_args)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if training_args.process_index == 0:
        logger.info(f"Training {stage.value}: {trained:,} numbers, on {len(samples):,} samples under template {mode}")

    trainer = LlavaTrainer(
        stage,
        pruning,
        tokenizer,
        image_processor,
        model=model,
        args=training_args,
        train_dataset=training_data,
        eval_dataset=evaluation_data if held_out else None,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model()
    trainer.save_state()
    if found := training_data.report():
        logger.warning(found)
    if training_args.process_index == 0:
        logger.info(f"Written to {training_args.output_dir}")
    return trainer


def _where_to_resume(model_args: ModelArguments, training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if any.

    Raises:
        UserError: the folder holds what must not be overwritten.
    """
    folder = Path(str(training_args.output_dir)).expanduser()
    if folder.exists() and folder.resolve() == Path(model_args.model_name_or_path).expanduser().resolve():
        raise UserError(f"--output_dir {folder} is the model that is trained; give another folder")
    if training_args.resume_from_checkpoint not in (None, "True", "False"):
        return training_args.resume_from_checkpoint
    if not folder.is_dir():
        return None
    if training_args.overwrite_output_dir:
        for old in folder.glob("checkpoint-*"):
            if training_args.process_index == 0:
                shutil.rmtree(old)
        return None
    if any((folder / name).exists() for name in stages.FINISHED):
        raise UserError(
            f"--output_dir {folder} holds a finished model; give another folder, or --overwrite_output_dir True to "
            "train it anew"
        )
    return get_last_checkpoint(str(folder))


def _load(stage: Stage, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> Any:
    """Tokenizer, model, image processor and context length; of a language model, with LLaVA's settings."""
    given = {
        "mm_vision_tower": _absolute(model_args.vision_tower),
        "mm_projector_type": model_args.mm_projector_type,
        "mm_vision_select_layer": model_args.mm_vision_select_layer,
        "mm_vision_select_feature": model_args.mm_vision_select_feature,
        "mm_patch_merge_type": model_args.mm_patch_merge_type,
        "mm_use_im_start_end": model_args.mm_use_im_start_end,
        "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "image_grid_pinpoints": data_args.image_grid_pinpoints,
    }
    projector = model_args.pretrain_mm_mlp_adapter
    dtype = torch.float32
    if stage is not Stage.FULL:  # what is frozen needs no more than it is computed in
        dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    return load_for_training(
        model_args.model_name_or_path,
        {key: value for key, value in given.items() if value is not None},
        projector=None if projector is None else Path(projector).expanduser(),
        load_8bit=training_args.bits == 8,
        load_4bit=training_args.bits == 4,
        device=training_args.device if training_args.bits != 16 else "cpu",  # else the Trainer puts it there
        dtype=dtype,
        attn_implementation=model_args.attn_implementation,
        placed=not is_deepspeed_zero3_enabled(),
    )


def _absolute(tower: str | None) -> str | None:
    """A tower's folder as the saved config names it, wherever the program that reads it is started; or its hub id."""
    return str(Path(tower).expanduser().resolve()) if tower and Path(tower).expanduser().is_dir() else tower


def _template(model_args: ModelArguments, config: Any) -> str:
    """The template to train under; every program will use it with the trained model, unless it is for captions."""
    mode = conversation_mode(get_model_name_from_path(model_args.model_name_or_path), config, model_args.version)
    if mode != "plain":
        config.conv_mode = mode
    return mode


def _dataset(
    samples: Sequence[Sample],
    mode: str,
    tokenizer: Any,
    image_processor: Any,
    model: Any,
    training_args: TrainingArguments,
    skip_bad: bool,
) -> ConversationDataset:
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return ConversationDataset(
        samples, mode, tokenizer, image_processor, skeleton, training_args.model_max_length, skip_bad
    )


if __name__ == "__main__":
    run_main(main)
