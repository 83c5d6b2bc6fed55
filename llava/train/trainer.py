"""transformers' Trainer, told LLaVA's order of samples, its learning rate for the projector, and a stage's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from llava.pruning import Method
from llava.train import stages
from llava.train.arguments import TrainingArguments
from llava.train.data import ConversationDataset


class ModalitySampler(Sampler[int]):
    """Orders samples so that a batch has only such with pictures or only such without, of like length.

    Args:
        lengths: of every sample.
        with_pictures: which have pictures.
        batch_size: samples of one step of the optimizer, over all processes.
        seed: of the order, with the epoch.
    """

    def __init__(self, lengths: Sequence[int], with_pictures: Sequence[bool], batch_size: int, seed: int) -> None:
        self.lengths, self.with_pictures, self.batch_size, self.seed = lengths, with_pictures, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        batches, rest = [], []
        for kind in (True, False):
            own = [number for number in order if self.with_pictures[number] is kind]
            whole = len(own) - len(own) % self.batch_size
            batches += [own[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
            rest += own[whole:]
        batches = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        batches += [rest[start : start + self.batch_size] for start in range(0, len(rest), self.batch_size)]
        for batch in batches:
            yield from sorted(batch, key=lambda number: self.lengths[number], reverse=True)


class LlavaTrainer(Trainer):
    """Trains one stage.

    Args:
        stage: whose weights are trained, saved and resumed.
        pruning: prunes every forward, of held-out samples too.
        tokenizer, image_processor: saved beside the weights.
    """

    def __init__(
        self, stage: stages.Stage, pruning: Method | None, tokenizer: Any, image_processor: Any, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.args: TrainingArguments
        self.stage, self.pruning, self.tokenizer, self.image_processor = stage, pruning, tokenizer, image_processor

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(data)
        assert isinstance(data, ConversationDataset)
        at_once = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        lengths = [sample.words for sample in data.samples]
        return ModalitySampler(lengths, [bool(s.images) for s in data.samples], at_once, self.args.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = self.args.mm_projector_lr
        if is_new and rate is not None:
            whole: Any = self.model if model is None else model
            named = whole.named_parameters()
            projector = {parameter for name, parameter in named if stages.is_projector(name)}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in projector]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in projector]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = {**super()._prepare_inputs(inputs), "use_cache": False}
        return prepared if self.pruning is None else {**prepared, "pruning_config": self.pruning}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        stages.save(self.model, self.stage, folder, state_dict)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stages.load(self.model if model is None else model, self.stage, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        stages.load(self.model, self.stage, Path(self.state.best_model_checkpoint))
