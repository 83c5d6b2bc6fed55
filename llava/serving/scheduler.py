"""Who is prefilled, who decodes, who waits: one thread owns the model, callers submit and read.

In turns, the thread prefills waiting requests, oldest first, up to a budget of rows, and lets all running answers make
one token. So a running answer never waits for more than one prefill batch between two of its tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any

import torch

from llava.inference import LoadedModel
from llava.pruning import PruningTrace, call_lock
from llava.pruning.flops import savings
from llava.utils import UserError

from .engine import Answering, Engine, Prefilled
from .memory import Forecast, free_bytes
from .request import (
    ClosingError,
    Event,
    Failure,
    Piece,
    QueueFullError,
    Report,
    Request,
    RequestTimeoutError,
    Ticket,
    WorkerDeadError,
)

_LOST: Any = getattr(torch, "AcceleratorError", ())  # torch 2.8
"""Errors after which the device answers nobody. The thread ends by them, so that somebody starts the server anew."""


@dataclass(frozen=True)
class Limits:
    """How much is done at once.

    Attributes:
        max_running: answers that decode together.
        max_waiting: requests that may wait; the next one is refused.
        prefill_rows: rows of the prompts that are prefilled together; a longer prompt goes alone.
        kv_bytes: memory for keys and values; None: a share of what is free when the scheduler starts.

    Raises:
        UserError: a value below 1.
    """

    max_running: int = 32
    max_waiting: int = 128
    prefill_rows: int = 2048
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Load:
    """What goes on at one moment.

    Attributes:
        running, waiting: answers that are being written, and requests before their prefill.
        kv_used_bytes: room that running answers have for keys and values; `kv_held_bytes`: what is allocated for it.
        kv_budget_bytes: what they may use.
        is_alive: whether the thread that owns the model is.
    """

    running: int
    waiting: int
    kv_used_bytes: int
    kv_held_bytes: int
    kv_budget_bytes: int
    is_alive: bool


@dataclass(eq=False)
class _Job:
    """A request on its way.

    Attributes:
        limit: tokens that each answer may get.
        known_bytes: of keys and values, once a prefill told.
        open: answers without an end.
    """

    ticket: Ticket
    limit: int
    known_bytes: int | None = None
    started: float = 0.0
    first_token: float = 0.0
    trace: PruningTrace | None = None
    new_tokens: int = 0
    open: int = 0
    answers: list[Answering] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.ticket.request


class Scheduler:
    """Answers many requests with one model at a time. A context manager; leaving it closes it.

    Args:
        model: the model. Others may call it while nothing runs here; they wait meanwhile.
        limits: how much is done at once.

    Attributes:
        limits: these.
    """

    def __init__(self, model: LoadedModel, limits: Limits | None = None) -> None:
        self.model, self.limits = model, limits or Limits()
        self._budget = self.limits.kv_bytes or free_bytes(model)
        self._engine = Engine(model, self._budget)
        self._forecast = Forecast(model)
        self._condition = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._running: list[tuple[_Job, Answering]] = []  # the thread's own, as are those in their prefill
        self._beginning: list[_Job] = []
        self._is_draining = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # -- for callers ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[Event], Any] | None = None) -> Ticket:
        """Put a request at the end of the queue.

        Args:
            request: what to answer.
            listener: see `Ticket`.

        Raises:
            QueueFullError, ClosingError, WorkerDeadError: it was not taken.
            UserError: it could never be answered here.
        """
        limit = min(request.options.max_new_tokens, self.model.checkpoint.context_len - request.prompt.num_rows)
        if request.copies > self.limits.max_running:
            raise UserError(f"{request.copies} answers were asked for at once; {self.limits.max_running} may run here")
        least = self._forecast.least_bytes(request, limit)
        if least > self._budget:
            raise UserError(
                f"the request needs at least {least / 2**20:,.0f} MiB for keys and values, and there are "
                f"{self._budget / 2**20:,.0f}; ask for fewer tokens or answers"
            )
        ticket = Ticket(request, listener)
        with self._condition:
            if self._error is not None or not self._thread.is_alive():
                raise WorkerDeadError("the model's thread has ended") from self._error
            if self._is_draining:
                raise ClosingError("no requests are taken any more: shutting down")
            if len(self._waiting) >= self.limits.max_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; ask again later")
            self._waiting.append(_Job(ticket, limit))
            self._condition.notify_all()
        return ticket

    def stream(self, ticket: Ticket) -> Iterator[Piece | Report]:
        """The events of a ticket without a listener: its pieces, and its report. Leaving early cancels it.

        Raises:
            Exception: what the request failed by.
        """
        try:
            while True:
                event = ticket.events.get()
                if isinstance(event, Failure):
                    raise event.error
                yield event
                if isinstance(event, Report):
                    return
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Let a request go, wherever it is. One that is over already is left alone."""
        ticket.cancel()
        with self._condition:
            self._condition.notify_all()

    def drain(self) -> None:
        """Take no more requests, and answer none of those that wait; running answers end. Returns at once, and may be
        called from a signal handler."""
        self._is_draining = True

    def close(self, timeout: float | None = None) -> None:
        """`drain`, and wait for running answers; those that take longer than `timeout` seconds are cancelled."""
        self.drain()
        with self._condition:
            self._condition.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            for job in {id(job): job for job, _ in list(self._running)}.values():
                job.ticket.send(Failure(ClosingError("the answer was not ready when the server shut down")))
                job.ticket.cancel()
            self._thread.join()

    @property
    def load(self) -> Load:
        """What goes on now."""
        pool = self._engine.pool
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_used_bytes=pool.used_bytes,
            kv_held_bytes=pool.held_bytes,
            kv_budget_bytes=self._budget,
            is_alive=self._thread.is_alive() and self._error is None,
        )

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    with call_lock(self.model.model):
                        try:
                            while self._waiting or self._running:
                                self._turn()
                        finally:
                            self._engine.rest()
        except BaseException as error:
            self._error = error
        finally:
            dead = WorkerDeadError("the model's thread has ended by an error")
            dead.__cause__ = self._error
            self._fail_all(dead if self._error is not None else ClosingError("shutting down"))

    def _wait_for_work(self) -> bool:
        """Wait for requests; False: there will be none any more."""
        with self._condition:
            while not self._waiting and not self._is_draining:
                self._condition.wait(timeout=1.0)  # `drain` wakes nobody
            return bool(self._waiting)

    def _turn(self) -> None:
        """Prefill once, and let all running answers make one token."""
        self._let_go()
        self._beginning = self._admit()
        if self._beginning:
            self._prefill(self._beginning)
            self._beginning = []
        if self._running:
            self._decode()

    def _let_go(self) -> None:
        """Drop what nobody waits for, and what waited for too long."""
        for job in {id(job): job for job, _ in self._running}.values():
            if job.ticket.is_cancelled:
                self._end(job)
            elif job.ticket.is_late:
                self._end(job, RequestTimeoutError(f"not answered within {job.request.timeout:g} seconds"))
        with self._condition:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if self._is_draining:
                    job.ticket.send(Failure(ClosingError("shutting down: the request was not begun")))
                elif job.ticket.is_late:
                    job.ticket.send(Failure(RequestTimeoutError(f"not begun within {job.request.timeout:g} seconds")))
                elif not job.ticket.is_cancelled:
                    self._waiting.append(job)

    def _admit(self) -> list[_Job]:
        """Take the next requests to prefill from the queue: those that fit the budget of rows and into memory."""
        jobs: list[_Job] = []
        rows, seats = 0, self.limits.max_running - len(self._running)
        free = self._budget - self._engine.pool.used_bytes
        with self._condition:
            while self._waiting:
                job = self._waiting[0]
                rows += job.request.prompt.num_rows
                seats -= job.request.copies
                free -= job.known_bytes or self._forecast.bytes(job.request, job.limit)
                is_alone = not jobs and not self._running  # goes in any case: there will never be more room
                if seats < 0 or (jobs and rows > self.limits.prefill_rows) or (free < 0 and not is_alone):
                    break
                jobs.append(self._waiting.popleft())
        return jobs

    def _prefill(self, jobs: Sequence[_Job]) -> None:
        """Prefill together; if that fails, one by one, so that only those fail which must."""
        for job in jobs:
            job.started = time.monotonic()
        try:
            done = self._engine.prefill([job.request for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            clear_frames(error.__traceback__)  # what they hold is given back before the next call
            for job in jobs:
                self._prefill([job])
            return
        again: list[_Job] = []
        for sample, job in enumerate(jobs):
            try:
                if not self._begin(job, done, sample):
                    again.append(job)
            except Exception as error:
                self._end(job, error)
        with self._condition:  # their rows are known now, so they are asked again when there is room
            self._waiting.extendleft(reversed(again))

    def _begin(self, job: _Job, done: Prefilled, sample: int) -> bool:
        """First tokens of one prompt's answers; those that go on get a place. False: there is none now."""
        job.trace = done.traces[sample]
        self._forecast.correct(job.request, job.trace)
        rows = done.rows(sample) + job.limit * self._forecast.num_layers
        job.known_bytes = job.request.copies * rows * self._forecast.row_bytes
        if job.limit > 1 and job.known_bytes > self._budget - self._engine.pool.used_bytes:
            if not self._running:
                raise UserError(
                    f"the request needs {job.known_bytes / 2**20:,.0f} MiB for keys and values, and there are "
                    f"{self._budget / 2**20:,.0f}; ask for fewer tokens, pictures or answers, or prune more"
                )
            return False
        job.answers = self._engine.answers(job.request, done, sample, job.limit)
        job.open = len(job.answers)
        logits = done.logits[sample].expand(len(job.answers), -1)
        for answer, token in zip(job.answers, self._engine.choose(job.answers, logits), strict=True):
            if self._accept(job, answer, token):
                self._engine.place(answer, done, sample)
                self._running.append((job, answer))
        return True

    def _decode(self) -> None:
        """One token for every running answer; if that fails, one by one, so that only those fail which must."""
        together = list(self._running)
        try:
            self._advance(together)
        except Exception as error:
            clear_frames(error.__traceback__)
            for pair in together:
                try:
                    self._advance([pair])
                except Exception as own:
                    self._end(pair[0], own)

    def _advance(self, pairs: Sequence[tuple[_Job, Answering]]) -> None:
        pairs = [pair for pair in pairs if pair[1].segments]  # the others ended with another answer to their request
        if not pairs:
            return
        answers = [answer for _, answer in pairs]
        tokens = self._engine.choose(answers, self._engine.step(answers))
        for (job, answer), token in zip(pairs, tokens, strict=True):
            if not answer.segments:  # failed with another answer to its request
                continue
            try:
                self._accept(job, answer, token)
            except Exception as error:
                self._end(job, error)

    def _accept(self, job: _Job, answer: Answering, token: int) -> bool:
        """Hand a token on; whether the answer goes on. One that does not has given everything back by then."""
        text, finish = self._engine.accept(answer, token)
        if finish is not None and answer.segments:
            self._engine.release(answer)
            self._running = [pair for pair in self._running if pair[1] is not answer]
        if not job.new_tokens:
            job.first_token = time.monotonic()
        job.new_tokens += 1
        job.ticket.send(Piece(answer.index, token, text, finish))
        if finish is None:
            return True
        job.open -= 1
        if not job.open:
            job.ticket.send(self._report(job))
        return False

    def _report(self, job: _Job) -> Report:
        prompt, trace, begin = job.request.prompt, job.trace, job.ticket.submitted
        assert trace is not None
        return Report(
            prompt_rows=prompt.num_rows,
            visual_tokens=prompt.num_visual,
            kept_visual_tokens=trace.num_kept,
            flops_saved=savings(trace, self.model.shape) if job.request.config is not None else {},
            trace=trace,
            new_tokens=job.new_tokens,
            queue_seconds=job.started - begin,
            first_token_seconds=job.first_token - begin,
            seconds=time.monotonic() - begin,
        )

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Take a job off, whatever of it runs. Raises an error that is not this job's alone."""
        if isinstance(error, _LOST):
            raise error
        for answer in job.answers:
            if answer.segments:
                self._engine.release(answer)
        self._running = [(other, answer) for other, answer in self._running if other is not job]
        if error is not None:
            clear_frames(error.__traceback__)  # they hold tensors, and whoever asked may keep the error
            job.ticket.send(Failure(error))

    def _fail_all(self, error: Exception) -> None:
        for job in {id(job): job for job in (*self._beginning, *(job for job, _ in self._running))}.values():
            self._end(job, error)
        with self._condition:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.ticket.send(Failure(error))
