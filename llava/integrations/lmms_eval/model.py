"""The model class that lmms-eval drives. Importing it needs lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm

from llava.inference import Answer, GenerationOptions, LoadedModel, LoadOptions, Prompt, Turn, open_checkpoint
from llava.inference.processes import device_of, join_processes
from llava.pruning import PruningConfig
from llava.utils import UserError

# What a task that says nothing gets; lmms-eval's own backends use the same.
_DEFAULT_NEW_TOKENS = 1024


class VisiPrunerModel(lmms):
    """Any model this project can prune, under lmms-eval.

    Args:
        pretrained: folder or hub id: a LLaVA checkpoint, or a transformers model of `supported_models()`.
        pruning_config: JSON, `@file`, or `dense`; absent, what is recommended for the checkpoint.
        batch_size: questions at once.
        device, dtype, attn_implementation, load_8bit, load_4bit, model_base, conv_mode: as in the programs here.

    Its result file has, under `throughput`, means over the run: `avg_visual_tokens`, `avg_visual_tokens_kept`,
    `avg_exit_layer` and `avg_flops_saved_<convention>`.

    Raises:
        UserError: before weights are read, for anything that cannot be used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        pruning_config: Any = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        model_base: str | None = None,
        conv_mode: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError as error:
            raise UserError(f"batch_size is {batch_size!r}; visipruner needs a number") from error
        processes = join_processes()
        self._rank, self._world_size = processes.process_index, processes.num_processes
        self.checkpoint = open_checkpoint(pretrained, model_base, conv_mode)
        # An empty mode is dense, and keeps the traces that the result file is made of.
        dense = PruningConfig(mode=())
        self.config = dense if pruning_config == "dense" else self.checkpoint.pruning_config(pruning_config)
        place = LoadOptions(device_of(processes, device), dtype, load_8bit, load_4bit, attn_implementation)
        self.loaded = LoadedModel(self.checkpoint, place)

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`. Batches hold requests of one kind, the longest questions first."""
        results: list[GenerationResult | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                for number, result in zip(batch, self._answer([requests[i] for i in batch]), strict=True):
                    results[number] = result
                    context, options = requests[number].args[:2]
                    self.cache_hook.add_partial("generate_until", (context, options), result.text)
                bar.update(len(batch))
        bar.close()
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise UserError("visipruner answers by generating; tasks that compare log-likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("visipruner answers one round at a time; tasks of several rounds are not supported")

    def _answer(self, batch: Sequence[Instance]) -> list[GenerationResult]:
        options = dict(batch[0].args[1])
        stops = options.pop("until", None) or []
        answers = self.loaded.answer_batch([self._prompt(each) for each in batch], self.config, _options(options))
        clock = answers[0].clock
        log_metrics(
            total_elapsed_time=clock.seconds,
            total_gen_tokens=clock.new_tokens,
            avg_speed=clock.new_tokens / clock.seconds,
        )
        # One record a question, so that the means are over questions whatever the batches are; they are for the
        # result file, and lmms-eval would print a line for each.
        logger.disable(log_metrics.__module__)
        try:
            for answer in answers:
                log_metrics(0.0, 0, 0.0, additional_metrics=_figures(answer))
        finally:
            logger.enable(log_metrics.__module__)
        results = []
        for answer in answers:
            text = answer.text
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            results.append(GenerationResult(text.strip(), TokenCounts(output_tokens=answer.new_tokens)))
        return results

    def _prompt(self, request: Instance) -> Prompt:
        context, _, to_visual, doc_id, task, split = request.args
        pictures = to_visual(self.task_dict[task][split][doc_id]) or []
        if any(not isinstance(picture, Image.Image) for picture in pictures):
            raise UserError(f"task {task!r} brings something other than pictures; visipruner takes pictures only")
        question = context.replace("<image>", "").strip()
        return self.checkpoint.encode([Turn(question, [self.checkpoint.read_picture(each) for each in pictures])])


def _options(asked: dict[str, Any]) -> GenerationOptions:
    """A task's generation options as this project takes them."""
    temperature = asked.get("temperature") or 0
    return GenerationOptions(
        max_new_tokens=asked.get("max_new_tokens") or _DEFAULT_NEW_TOKENS,
        temperature=temperature,
        top_p=asked.get("top_p") if temperature > 0 else None,
        num_beams=asked.get("num_beams") or 1,
    )


def _figures(answer: Answer) -> dict[str, float]:
    exit_layer = answer.trace.exit_layer if answer.trace else None
    figures: dict[str, float] = {
        "visual_tokens": answer.visual_tokens,
        "visual_tokens_kept": answer.kept,
        "exit_layer": answer.num_layers if exit_layer is None else exit_layer,
    }
    return figures | {f"flops_saved_{name}": saved for name, saved in answer.flops_saved.items()}
