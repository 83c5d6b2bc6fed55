"""Batches of questions → answers with traces and clock: what the benchmark runner and the comparison share."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from llava.conversation import conv_templates
from llava.eval.questions import Question
from llava.mm_utils import KeywordsStoppingCriteria
from llava.pruning import PruningConfig, PruningTrace
from llava.serve.chat import Checkpoint, GenerationOptions, Turn
from llava.utils import UserError


@dataclass(frozen=True)
class Prepared:
    """A question as the model takes it, or the reason why it cannot be asked.

    Attributes:
        ids: prompt ids.
        pixels: float ``[3, S, S]`` or ``[tiles, 3, S, S]``; None without an image.
        size: the picture's width and height.
        num_rows, num_visual: rows of the prompt with the picture in place, and those of them from the picture.
        room: how many tokens the answer may have before the context is full.
        error: set instead of all these.
    """

    question: Question
    ids: list[int] | None = None
    pixels: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    num_rows: int = 0
    num_visual: int = 0
    room: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """What a batch took: its questions, all tokens they got, seconds until the first token and in all."""

    size: int
    new_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Reply:
    """The answer to one question.

    Attributes:
        trace: what was pruned; None in a dense run.
        num_rows, num_visual: rows of the prompt, and those of them from the picture.
        new_tokens: tokens generated, the end token included.
        batch: the batch it was answered in, one object for all its questions.
    """

    question: Question
    text: str
    trace: PruningTrace | None
    num_rows: int
    num_visual: int
    new_tokens: int
    batch: Batch

    @property
    def kept(self) -> int:
        """Visual tokens left after selection; all of them where nothing was selected or removed."""
        if self.trace is None or (self.trace.select_layer is None and self.trace.exit_layer is None):
            return self.num_visual
        return len(self.trace.kept_positions)


def trace_record(reply: Reply, flops_saved: dict[str, float]) -> dict[str, Any]:
    """A line of a trace file: what was pruned for one question, and the fraction of FLOPs that this saved."""
    assert reply.trace is not None
    return {
        "line": reply.question.line,
        "question_id": reply.question.question_id,
        "visual_tokens": reply.num_visual,
        "kept": reply.kept,
        "flops_saved": flops_saved,
        **reply.trace.to_dict(),
    }


def prepare(question: Question, checkpoint: Checkpoint, tokenizer_lock: AbstractContextManager[Any]) -> Prepared:
    """Read the picture and build the prompt. What is wrong with this one question comes back as ``error``."""
    try:
        pictures = [checkpoint.read_picture(question.image)] if question.image is not None else []
        with tokenizer_lock:  # a fast tokenizer may not be used by two threads at once
            prompt = checkpoint.encode([Turn(question.text, pictures)])
    except UserError as error:
        return Prepared(question, error=str(error))
    pixels, size = (pictures[0].pixels, pictures[0].image.size) if pictures else (None, None)
    room = checkpoint.context_len - prompt.num_rows
    return Prepared(question, prompt.ids[0].tolist(), pixels, size, prompt.num_rows, prompt.num_visual, room)


def prepared_batches(
    questions: Sequence[Question], checkpoint: Checkpoint, batch_size: int, num_workers: int
) -> Iterator[list[Prepared]]:
    """Batches in order, read and prepared ahead of the model by ``num_workers`` threads (0: by the caller's).

    Threads and not processes: decoding and resizing leave the interpreter free, nothing is copied through shared
    memory, which is small in containers, and no process is forked from one that has CUDA and its threads.
    """
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    tokenizer_lock = threading.Lock()
    if not num_workers:
        for batch in batches:
            yield [prepare(question, checkpoint, tokenizer_lock) for question in batch]
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
    ahead: deque[list[Future[Prepared]]] = deque()
    try:
        for batch in batches:
            ahead.append([pool.submit(prepare, question, checkpoint, tokenizer_lock) for question in batch])
            if len(ahead) > _BATCHES_AHEAD:
                yield [item.result() for item in ahead.popleft()]
        while ahead:
            yield [item.result() for item in ahead.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Enough that a slow picture does not stop the model, few enough that anyres tiles do not fill the memory.
_BATCHES_AHEAD = 3


def default_workers() -> int:
    """Threads that prepare questions: a core stays for the model, and more than four are seldom busy."""
    return max(1, min(4, (os.cpu_count() or 1) - 1))


class _FirstTokenClock(StoppingCriteria):
    """Notes when the first token of a batch is there; never stops anything."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            _wait_for(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Responder:
    """Asks a loaded model batches of prepared questions.

    An answer depends on its question alone: not on the batch it is in, its padding, or its neighbours. Out of
    memory, the batch is halved for good and asked again.

    Args:
        model, tokenizer: from ``load_pretrained_model``.
        checkpoint: the same model without its weights.
        config: prune with it; None: dense.
        options: how answers are drawn.
        batch_size: questions asked at once, to begin with.
        seed: of sampling; a batch is drawn from it and its first question.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        checkpoint: Checkpoint,
        config: PruningConfig | None,
        options: GenerationOptions,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config, self.options, self.batch_size, self.seed = config, options, batch_size, seed
        stop = conv_templates[checkpoint.conv_mode].stop_string
        self._stop_string = stop if stop.strip() else ""
        self._needs_stop = bool(self._stop_string) and self._stop_string != tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self._padding = model.generation_config.pad_token_id
        self._ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]

    def answer(self, batch: Sequence[Prepared]) -> list[Reply]:
        """Answers in the batch's order. Raises the memory error only where a single question does not fit."""
        replies: list[Reply] = []
        while len(replies) < len(batch):
            part = batch[len(replies) : len(replies) + self.batch_size]
            answered = self._answer_or_none(part)
            if answered is None:
                clear_device_cache(garbage_collection=True)
                self.batch_size = max(1, len(part) // 2)
            else:
                replies += answered
        return replies

    def _answer_or_none(self, batch: Sequence[Prepared]) -> list[Reply] | None:
        """None if the batch does not fit into memory; a function of its own, so that its tensors are gone by then."""
        try:
            return self._answer(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
            return None

    def _answer(self, batch: Sequence[Prepared]) -> list[Reply]:
        device = self.model.device
        prompts = [torch.tensor(item.ids) for item in batch]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        pixels = [item.pixels for item in batch if item.pixels is not None]
        images: Any = pixels or None
        if pixels and all(part.ndim == 3 for part in pixels):
            images = torch.stack(pixels)
        clock = _FirstTokenClock()
        criteria: list[StoppingCriteria] = [clock]
        if self._needs_stop:
            criteria.append(KeywordsStoppingCriteria([self._stop_string], self.tokenizer))
        if self.options.temperature > 0:
            torch.manual_seed(self.seed + batch[0].question.line)
        _wait_for(device)
        begin = time.perf_counter()
        new_ids = self.model.generate(
            ids.to(device),
            images=images,
            image_sizes=[item.size for item in batch if item.size is not None] or None,
            attention_mask=mask.to(device),
            pruning_config=self.config,
            max_new_tokens=self.options.max_new_tokens,
            stopping_criteria=StoppingCriteriaList(criteria),
            **self.options.to_kwargs(),
        )
        _wait_for(device)
        seconds = time.perf_counter() - begin
        first = (clock.at or begin + seconds) - begin
        traces: list[PruningTrace | None] = [None] * len(batch)
        if self.config is not None:
            traces = list(self.model.last_pruning_traces)
        tokens = [self._own_tokens(row, item.room) for item, row in zip(batch, new_ids.tolist(), strict=True)]
        asked = Batch(len(batch), sum(map(len, tokens)), first, seconds)
        return [
            Reply(item.question, self._text(own), trace, item.num_rows, item.num_visual, len(own), asked)
            for item, own, trace in zip(batch, tokens, traces, strict=True)
        ]

    def _own_tokens(self, row: list[int], room: int) -> list[int]:
        """A sample's tokens up to its end token: what follows is padding that its longer neighbours caused."""
        end = next((index + 1 for index, token in enumerate(row) if token in self._ends), len(row))
        while end and row[end - 1] == self._padding and self._padding not in self._ends:
            end -= 1
        return row[: min(end, room)]

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if self._stop_string:
            # Not only at the end: a batch goes on until its last sample stops.
            text = text.split(self._stop_string)[0]
        return text.strip()
