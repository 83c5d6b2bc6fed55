"""What a caller asks for, and what comes back while and after it is answered."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llava.inference import GenerationOptions, Prompt
from llava.pruning import Method, PruningTrace
from llava.utils import UserError


class QueueFullError(UserError):
    """As many requests wait as may; ask again later."""


class ClosingError(UserError):
    """The scheduler takes no requests any more, or does not get to this one before it ends."""


class WorkerDeadError(RuntimeError):
    """The thread that owns the model has ended by an error."""


class RequestTimeoutError(UserError):
    """The request's time is up."""


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes:
        prompt: from `Checkpoint.encode`.
        config: prune with it; None: dense.
        options: how to draw; beams are not served.
        seed: of this request's own generator; None: a random one.
        stop: texts that end an answer, beside the checkpoint's own.
        copies: answers to draw; the prompt is prefilled once.
        timeout: seconds from submission to the last token; None: no limit.

    Raises:
        UserError: a value that cannot be served.
    """

    prompt: Prompt
    config: Method | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    copies: int = 1
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.options.num_beams != 1:
            raise UserError(f"num_beams is {self.options.num_beams}; beam search is not served, leave it at 1")
        if self.copies < 1:
            raise UserError(f"copies is {self.copies}; it must be at least 1")


@dataclass(frozen=True)
class Piece:
    """A token of one answer has come.

    Attributes:
        index: which of the request's copies.
        token: its id.
        text: what the answer grew by; may be empty.
        finish: ``stop`` or ``length`` with an answer's last token.
    """

    index: int
    token: int
    text: str
    finish: str | None = None


@dataclass(frozen=True)
class Report:
    """What a request took.

    Attributes:
        prompt_rows, visual_tokens: rows of the prompt with the pictures in place, and those of them from pictures.
        kept_visual_tokens: left after selection.
        flops_saved: fraction of the dense prefill's FLOPs saved, by convention.
        trace: what was decided.
        new_tokens: of all copies, end tokens included.
        queue_seconds: from submission to the prefill.
        first_token_seconds: from submission to the first token.
        seconds: from submission to the last token.
    """

    prompt_rows: int
    visual_tokens: int
    kept_visual_tokens: int
    flops_saved: dict[str, float]
    trace: PruningTrace
    new_tokens: int
    queue_seconds: float
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """The request ended by an error."""

    error: BaseException


Event = Piece | Report | Failure
"""What a ticket gets: pieces, and at the end a report or a failure."""


class Ticket:
    """A submitted request.

    Args:
        request: as submitted.
        listener: is called with each event, by the thread that owns the model, and must not wait; without one, events
            are in `events`.

    Attributes:
        events: what came and was not read yet.
    """

    def __init__(self, request: Request, listener: Callable[[Event], Any] | None = None) -> None:
        self.request = request
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submitted = time.monotonic()
        self._listener = listener or self.events.put
        self._cancelled = threading.Event()
        self._is_over = False

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def is_over(self) -> bool:
        """Whether a report or a failure was given out."""
        return self._is_over

    @property
    def is_late(self) -> bool:
        """Whether the request's time is up."""
        limit = self.request.timeout
        return limit is not None and time.monotonic() - self.submitted > limit

    def cancel(self) -> None:
        """Nobody waits for this any more. May be called from anywhere, more than once."""
        self._cancelled.set()

    def send(self, event: Event) -> None:
        """Hand an event to whoever waits; one who cannot take it any more has left."""
        if self._is_over:
            return
        self._is_over = not isinstance(event, Piece)
        try:
            self._listener(event)
        except Exception:
            self.cancel()
