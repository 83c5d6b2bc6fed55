"""The model class that lmms-eval drives. Importing it needs lmms-eval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import StoppingCriteriaList

from llava.conversation import conv_templates
from llava.eval.launch import Launch
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model.recommended import recommended_config
from llava.model.stock import StockModel, StockProcessor, stock_model_type
from llava.pruning import PruningConfig, PruningTrace
from llava.pruning.flops import DecoderShape, savings
from llava.serve.chat import ChatModel, Checkpoint, LoadOptions, Turn
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
        launch = Launch.start()
        self._rank, self._world_size = launch.rank, launch.world_size
        place: dict[str, Any] = {
            "device": launch.device(device),
            "dtype": dtype,
            "attn_implementation": attn_implementation,
        }
        place |= {"load_8bit": load_8bit, "load_4bit": load_4bit}
        self.backend: _Llava | _Stock
        if stock_model_type(pretrained) is None:
            self.backend = _Llava(pretrained, model_base, conv_mode, pruning_config, place)
        else:
            self.backend = _Stock(pretrained, pruning_config, place)
        self.shape = DecoderShape.of(self.backend.network)
        self.num_layers = self.shape.num_layers

    @property
    def device(self) -> torch.device:
        return self.backend.model.device

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
        questions: list[tuple[str, list[Image.Image]]] = []
        for request in batch:
            context, _, to_visual, doc_id, task, split = request.args
            pictures = to_visual(self.task_dict[task][split][doc_id]) or []
            if any(not isinstance(picture, Image.Image) for picture in pictures):
                raise UserError(f"task {task!r} brings something other than pictures; visipruner takes pictures only")
            questions.append((context.replace("<image>", "").strip(), [each.convert("RGB") for each in pictures]))
        options = dict(batch[0].args[1])
        stops = options.pop("until", None) or []
        begin = time.perf_counter()
        texts, counts = self.backend.answer(questions, _generate_kwargs(options))
        seconds = time.perf_counter() - begin
        traces = self.backend.traces
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=sum(counts),
            avg_speed=sum(counts) / seconds,
        )
        # One record a question, so that the means are over questions whatever the batches are; they are for the
        # result file, and lmms-eval would print a line for each.
        logger.disable(log_metrics.__module__)
        try:
            for trace in traces:
                log_metrics(0.0, 0, 0.0, additional_metrics=_figures(trace, self.shape))
        finally:
            logger.enable(log_metrics.__module__)
        results = []
        for text, count in zip(texts, counts, strict=True):
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            results.append(GenerationResult(text.strip(), TokenCounts(output_tokens=count)))
        return results


def _generate_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    """A task's generation options as transformers takes them."""
    temperature = options.get("temperature") or 0
    sampling = {"temperature": temperature, "top_p": options.get("top_p")} if temperature > 0 else {}
    return {
        "max_new_tokens": options.get("max_new_tokens") or _DEFAULT_NEW_TOKENS,
        "num_beams": options.get("num_beams") or 1,
        "do_sample": temperature > 0,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        **sampling,
    }


def _figures(trace: PruningTrace, shape: DecoderShape) -> dict[str, float]:
    chosen = trace.select_layer is not None or trace.exit_layer is not None
    figures: dict[str, float] = {
        "visual_tokens": trace.num_visual,
        "visual_tokens_kept": len(trace.kept_positions) if chosen else trace.num_visual,
        "exit_layer": trace.exit_layer if trace.exit_layer is not None else shape.num_layers,
    }
    return figures | {f"flops_saved_{name}": saved for name, saved in savings(trace, shape).items()}


def _config(given: Any, recommended: PruningConfig) -> PruningConfig:
    """`given` as lmms-eval's argument parser left it (`dense`, `@file`, JSON or a mapping), else `recommended`."""
    if given is None:
        return recommended
    # An empty mode is dense, and keeps the traces that the result file is made of.
    config = PruningConfig(mode=()) if given == "dense" else PruningConfig.from_any(given)
    assert config is not None  # None comes only from None
    return config


class _Llava:
    """LLaVA checkpoints of every layout."""

    def __init__(
        self, path: str, base: str | None, conv_mode: str | None, pruning_config: Any, place: dict[str, Any]
    ) -> None:
        self.checkpoint = Checkpoint(path, base, conv_mode)
        self.config = self.checkpoint.pruning_config(_config(pruning_config, recommended_config(path)))
        chat = ChatModel(self.checkpoint, LoadOptions(**place))
        self.model = self.network = chat.model
        self.tokenizer = chat.tokenizer
        stop = conv_templates[self.checkpoint.conv_mode].stop_string
        self.stop_string = stop if stop.strip() and stop != self.tokenizer.eos_token else ""

    @property
    def traces(self) -> list[PruningTrace]:
        return self.model.last_pruning_traces

    def answer(
        self, questions: Sequence[tuple[str, list[Image.Image]]], options: dict[str, Any]
    ) -> tuple[list[str], list[int]]:
        prompts, pixels, sizes = [], [], []
        for question, images in questions:
            pictures = [self.checkpoint.read_picture(image) for image in images]
            prompts.append(self.checkpoint.encode([Turn(question, pictures)]).ids[0])
            pixels += [picture.pixels for picture in pictures]
            sizes += [picture.image.size for picture in pictures]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        stacked = torch.stack(pixels) if pixels and all(part.ndim == 3 for part in pixels) else pixels or None
        new_ids = self.model.generate(
            ids.to(self.model.device),
            images=stacked,
            image_sizes=sizes or None,
            attention_mask=mask.to(self.model.device),
            pruning_config=self.config,
            stopping_criteria=self._criteria(),
            **options,
        )
        texts, counts = _decoded(new_ids, self.tokenizer, self.model.generation_config)
        # Not only at the end: a batch goes on until its last sample stops.
        return [text.split(self.stop_string)[0] if self.stop_string else text for text in texts], counts

    def _criteria(self) -> StoppingCriteriaList:
        if not self.stop_string:
            return StoppingCriteriaList()
        return StoppingCriteriaList([KeywordsStoppingCriteria([self.stop_string], self.tokenizer)])


class _Stock:
    """transformers' own models, through their processor."""

    def __init__(self, path: str, pruning_config: Any, place: dict[str, Any]) -> None:
        self.source = StockProcessor(path)
        skeleton: Any = self.source.skeleton()
        self.config = _config(pruning_config, PruningConfig.for_model(skeleton))
        self.config.validate_for(len(skeleton.get_decoder().layers))
        self.model = StockModel(self.source, **place)
        self.network = self.model.model

    @property
    def traces(self) -> list[PruningTrace]:
        return self.model.last_pruning_traces

    def answer(
        self, questions: Sequence[tuple[str, list[Image.Image]]], options: dict[str, Any]
    ) -> tuple[list[str], list[int]]:
        inputs = self.source.encode([[(question, images, None)] for question, images in questions])
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        new_ids = self.model.generate(ids, inputs, mask, self.config, **options)
        return _decoded(new_ids, self.source.tokenizer, self.model.generation_config)


def _decoded(new_ids: torch.Tensor, tokenizer: Any, generation: Any) -> tuple[list[str], list[int]]:
    """Texts, and how many tokens each has up to its end token."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    texts, counts = [], []
    for row in new_ids.tolist():
        count = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:count], skip_special_tokens=True))
        counts.append(count)
    return texts, counts
