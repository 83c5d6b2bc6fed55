"""A model with its weights, and the one function that every program's answers come from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from llava.inference.answer import Answer, Clock, GenerationOptions
from llava.inference.checkpoint import Checkpoint, LoadOptions, Prompt
from llava.mm_utils import KeywordsStoppingCriteria
from llava.pruning import Method, call_lock, prune
from llava.pruning.flops import DecoderShape, savings


class LoadedModel:
    """A loaded model that answers prompts: calls from several threads wait for each other.

    Args:
        checkpoint: what is known about the model without its weights.
        options: where and how to run it.

    Attributes:
        model: this project's LLaVA, or what transformers made of the checkpoint.
        tokenizer: its tokenizer.
        end_ids: tokens that end an answer.
        stop_strings: texts that end an answer, where no token of `end_ids` does it.

    Raises:
        UserError: see `llava.model.builder.load_pretrained_model`.
    """

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions | None = None) -> None:
        self.checkpoint = checkpoint
        self.tokenizer, self.model = checkpoint.load(options or LoadOptions())
        self._is_warm = False
        ends = self.model.generation_config.eos_token_id
        self.end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._padding = self.model.generation_config.pad_token_id
        stop = checkpoint.stop_string
        self.stop_strings = [stop] if stop and stop != self.tokenizer.eos_token else []

    @property
    def placement(self) -> str:
        """Device and dtype, for people: ``cuda:0, float16``."""
        return f"{self.model.device}, {str(self.model.dtype).removeprefix('torch.')}"

    @cached_property
    def num_parameters(self) -> int:
        """Of the whole model, vision tower included."""
        return int(self.model.num_parameters())

    @cached_property
    def shape(self) -> DecoderShape:
        """What the decoder's FLOPs depend on."""
        return DecoderShape.of(self.model)

    def answer(
        self,
        prompt: Prompt,
        config: Method | None = None,
        options: GenerationOptions | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
        **how: Any,
    ) -> Answer:
        """The answer to one prompt; see `answer_batch`."""
        return self.answer_batch([prompt], config, options, on_text=on_text, stop=stop, **how)[0]

    def answer_batch(
        self,
        prompts: Sequence[Prompt],
        config: Method | None = None,
        options: GenerationOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
        seed: int | None = None,
        keep_logits: bool = False,
    ) -> list[Answer]:
        """Answers to prompts, in their order. An answer depends on its own prompt alone, not on its neighbours.

        Args:
            prompts: from `Checkpoint.encode`.
            config: prune with it; None: dense.
            options: how to draw; an answer is also bounded by what its prompt leaves of the context.
            on_text: called with each piece of text as it comes, of one prompt; with beams the text comes at once.
            stop: set from anywhere, it ends the answers after the token that is being made.
            seed: of sampling; None goes on with torch's generator.
            keep_logits: whether answers hold the logits of their first token; not with beams.
        """
        options = options or GenerationOptions()
        limits = [min(options.max_new_tokens, self.checkpoint.context_len - prompt.num_rows) for prompt in prompts]
        watch = _Watch(stop)
        criteria = StoppingCriteriaList([watch])
        if self.stop_strings:
            criteria.append(KeywordsStoppingCriteria(self.stop_strings, self.tokenizer))
        first_logits = _FirstLogits()
        streamer = _Streamer(self.tokenizer, on_text) if on_text and options.num_beams == 1 else None
        given = self.inputs_for(prompts)
        # A method may want each prompt's question; the others get one config for all.
        own = [config.for_question(prompt.question) for prompt in prompts] if config is not None else []
        configs = own if any(each != config for each in own) else config
        with call_lock(self.model), prune(self.model, configs) if config is not None else nullcontext() as run:
            if seed is not None and options.temperature > 0:
                torch.manual_seed(seed)
            _wait_for(self.model.device)
            begin, begin_processor = time.perf_counter(), time.thread_time()
            output = self.model.generate(
                **given,
                max_new_tokens=max(limits),
                stopping_criteria=criteria,
                logits_processor=LogitsProcessorList([first_logits] if keep_logits else []),
                streamer=streamer,
                **options.to_kwargs(),
            )
            rows = self.checkpoint.new_ids(output, given).tolist()
            seconds = time.perf_counter() - begin
        tokens = [self._own_tokens(row)[:limit] for row, limit in zip(rows, limits, strict=True)]
        first = (watch.first_token_at or begin + seconds) - begin
        first_processor = max(0.0, watch.first_token_processor - begin_processor)
        clock = Clock(len(prompts), sum(map(len, tokens)), first, seconds, first_processor)
        traces = run.traces if run is not None else [None] * len(prompts)
        answers = []
        for number, (prompt, ids, limit, trace) in enumerate(zip(prompts, tokens, limits, traces, strict=True)):
            finish = "length" if len(ids) >= limit else "stop"
            if ids and ids[-1] in self.end_ids:
                finish = "stop"
            elif stop is not None and stop.is_set():
                finish = "interrupted"
            answers.append(
                Answer(
                    text=self._text(ids),
                    ids=tuple(ids),
                    finish=finish,
                    config=config,
                    trace=trace,
                    flops_saved=savings(trace, self.shape) if trace is not None else {},
                    num_layers=self.checkpoint.num_layers,
                    prompt_rows=prompt.num_rows,
                    visual_tokens=prompt.num_visual,
                    clock=clock,
                    first_logits=first_logits.kept[number] if first_logits.kept is not None else None,
                )
            )
        if on_text and streamer is None:
            on_text(answers[0].text)
        return answers

    def warm_up(self, prompt: Prompt, config: Method | None) -> None:
        """Run a prompt once, dense and pruned, so that a comparison does not charge one of them for first use."""
        if not self._is_warm:
            for each in (None, config):
                self.answer(prompt, each, GenerationOptions(max_new_tokens=1))
        self._is_warm = True

    def inputs_for(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the model's ``generate`` takes for prompts of one batch, where the model is."""
        return {name: self._moved(value) for name, value in self.checkpoint.batch(prompts).items()}

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def _own_tokens(self, row: list[int]) -> list[int]:
        """A sample's tokens up to its end token: what follows is padding that its longer neighbours caused."""
        end = next((index + 1 for index, token in enumerate(row) if token in self.end_ids), len(row))
        if self.stop_strings and self._padding not in self.end_ids:  # a stop string ends a sample without an end token
            while end and row[end - 1] == self._padding:
                end -= 1
        return row[:end]

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if self.checkpoint.stop_string:
            # Not only at the end: a batch goes on until its last sample stops.
            text = text.split(self.checkpoint.stop_string)[0]
        return text.strip()


class Responder:
    """Answers prompts in batches, all in one way. Out of memory, the batch is halved for good and asked again.

    Args:
        model: the model.
        config: prune with it; None: dense.
        options: how answers are drawn.
        batch_size: prompts answered at once, to begin with.
    """

    def __init__(
        self, model: LoadedModel, config: Method | None, options: GenerationOptions, batch_size: int = 1
    ) -> None:
        self.model, self.config, self.options, self.batch_size = model, config, options, batch_size

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int] | None = None) -> list[Answer]:
        """Answers in the prompts' order. Raises the memory error only where a single prompt does not fit.

        Args:
            prompts: any number.
            seeds: one for each prompt; a batch is drawn with its first prompt's.
        """
        answers: list[Answer] = []
        while len(answers) < len(prompts):
            part = prompts[len(answers) : len(answers) + self.batch_size]
            answered = self._answer_or_none(part, seeds[len(answers)] if seeds else None)
            if answered is None:
                clear_device_cache(garbage_collection=True)
                self.batch_size = max(1, len(part) // 2)
            else:
                answers += answered
        return answers

    def _answer_or_none(self, prompts: Sequence[Prompt], seed: int | None) -> list[Answer] | None:
        """None if the batch does not fit into memory; a function of its own, so that its tensors are gone by then."""
        try:
            return self.model.answer_batch(prompts, self.config, self.options, seed=seed)
        except RuntimeError as error:
            if len(prompts) == 1 or not should_reduce_batch_size(error):
                raise
            return None


class _Watch(StoppingCriteria):
    """Notes when the first token is there, and stops when asked to."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop
        self.first_token_at: float | None = None
        self.first_token_processor = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.first_token_at is None:
            _wait_for(input_ids.device)
            self.first_token_at, self.first_token_processor = time.perf_counter(), time.thread_time()
        is_stopped = self.stop is not None and self.stop.is_set()
        return torch.full((input_ids.shape[0],), is_stopped, dtype=torch.bool, device=input_ids.device)


class _FirstLogits(LogitsProcessor):
    """Keeps what the model said of each prompt's first new token, before anything changes it."""

    def __init__(self) -> None:
        self.kept: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = scores.float().cpu()
        return scores


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Streamer(TextStreamer):
    """transformers' text streamer with a function at its end instead of a terminal."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._has_begun:
            text = text.lstrip()  # the space between the prompt's last word and the answer
            self._has_begun = bool(text)
        if text:
            self._on_text(text)
