"""Questions → prompts, in batches, read ahead of the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from llava.eval.questions import Question
from llava.inference import Checkpoint, Prompt, Turn
from llava.utils import UserError

# Enough that a slow picture does not stop the model, few enough that anyres tiles do not fill the memory.
_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class PromptBatch:
    """Some questions in order: the prompts of those that can be asked, and why the others cannot."""

    questions: list[Question] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    failures: list[tuple[Question, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Questions, failed ones included."""
        return len(self.questions) + len(self.failures)


def prompt_batches(
    questions: Sequence[Question], checkpoint: Checkpoint, batch_size: int, num_workers: int | None = None
) -> Iterator[PromptBatch]:
    """Batches in order, prepared by threads (0: by the caller's; None: a core stays for the model).

    Threads and not processes: decoding and resizing leave the interpreter free, nothing is copied through shared
    memory, which is small in containers, and no process is forked from one that has CUDA and its threads.
    """
    if num_workers is None:
        num_workers = max(1, min(4, (os.cpu_count() or 1) - 1))  # more than four are seldom busy
    parts = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    if not num_workers:
        for part in parts:
            yield _batch(part, [_prompt(question, checkpoint) for question in part])
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prompts")
    ahead: deque[tuple[Sequence[Question], list[Future[Prompt | UserError]]]] = deque()
    try:
        for part in parts:
            ahead.append((part, [pool.submit(_prompt, question, checkpoint) for question in part]))
            if len(ahead) > _BATCHES_AHEAD:
                asked, futures = ahead.popleft()
                yield _batch(asked, [future.result() for future in futures])
        for asked, futures in ahead:
            yield _batch(asked, [future.result() for future in futures])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prompt(question: Question, checkpoint: Checkpoint) -> Prompt | UserError:
    """Read the picture and build the prompt, or what is wrong with this one question."""
    try:
        pictures = [checkpoint.read_picture(question.image)] if question.image is not None else []
        return checkpoint.encode([Turn(question.text, pictures)])
    except UserError as error:
        return error


def _batch(questions: Sequence[Question], prompts: Sequence[Prompt | UserError]) -> PromptBatch:
    batch = PromptBatch()
    for question, prompt in zip(questions, prompts, strict=True):
        if isinstance(prompt, UserError):
            batch.failures.append((question, str(prompt)))
        else:
            batch.questions.append(question)
            batch.prompts.append(prompt)
    return batch
