"""The HTTP API over a `Scheduler`, as OpenAI's clients know it (extra ``serve``).

`build_app` gives an ASGI application; who runs it closes the scheduler. `python -m llava.serve.api` does both.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llava.utils import UserError

from .metrics import Metrics
from .protocol import ApiError, ChatRequest, Defaults, to_request
from .request import Event, Failure, Piece, QueueFullError, Report
from .request import Request as Prompted
from .scheduler import Scheduler

_log = logging.getLogger("llava.serving")
_GONE = "the client has gone away"

PREPARERS = 4
"""Requests whose pictures are opened at one time; as many more may be downloading some, which takes longer."""


@dataclass(frozen=True)
class ServerSettings:
    """What the API allows.

    Attributes:
        model_name: under which the model is served; None: the checkpoint's name.
        api_keys: one of them must come as ``Authorization: Bearer …``; empty: none is asked for.
        max_body_bytes: of one request.
        body_timeout: seconds in which a body must be there.
        max_held_pixels: of the pictures of all requests that are not answered yet, three bytes each; more get 429.
        defaults: see `Defaults`.

    Raises:
        UserError: a value that makes no sense.
    """

    model_name: str | None = None
    api_keys: Sequence[str] = ()
    max_body_bytes: int = 20 * 2**20
    body_timeout: float = 30.0
    max_held_pixels: int = 1_000_000_000
    defaults: Defaults = field(default_factory=Defaults)

    def __post_init__(self) -> None:
        if any(not key.strip() for key in self.api_keys):
            raise UserError("an API key is empty")
        for name in ("max_body_bytes", "body_timeout", "max_held_pixels"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be greater than 0")


def build_app(scheduler: Scheduler, settings: ServerSettings | None = None) -> FastAPI:
    """An application that answers with `scheduler`: `/v1/models`, `/v1/chat/completions`, `/health`, `/metrics`.

    It keeps no state but its metrics. No CORS headers are sent, and bodies must be declared as JSON, so that no page in
    a browser on this machine can use it.
    """
    settings = settings or ServerSettings()
    name = settings.model_name or scheduler.model.checkpoint.name
    metrics = Metrics(name, lambda: scheduler.load)
    created = int(time.time())
    opening, downloading = CapacityLimiter(PREPARERS), CapacityLimiter(PREPARERS)
    preparing = held_pixels = 0
    app = FastAPI(title="VisiPruner", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> JSONResponse:
        metrics.failed(error.status)
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> JSONResponse:
        return await tell(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def tell_unexpected(request: Request, error: Exception) -> JSONResponse:
        return await tell(request, ApiError.of(error))

    def check_key(request: Request) -> None:
        if not settings.api_keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in settings.api_keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(401, "no API key, or a wrong one", "authentication_error", "invalid_api_key")

    @app.get("/health")
    async def health() -> Response:
        if not scheduler.load.is_alive:
            raise ApiError(503, "the model is not running any more", "server_error", "worker_dead")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_card() -> dict[str, Any]:
        rows = scheduler.model.checkpoint.context_len
        return {"id": name, "object": "model", "created": created, "owned_by": "local", "max_model_len": rows}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        check_key(request)
        check_model(model)
        return model_card()

    def check_model(model: str) -> None:
        if model != name:
            raise ApiError(404, f"the model {model[:100]!r} does not exist here; {name!r} does", code="model_not_found")

    async def prepare(request: Request) -> tuple[ChatRequest, Prompted]:
        """Read and check a request, its pictures included. As many are prepared as may wait."""
        nonlocal preparing
        if not scheduler.load.is_alive:
            raise ApiError(503, "the model is not running any more", "server_error", "worker_dead")
        if scheduler.load.waiting + preparing >= scheduler.limits.max_waiting:
            raise ApiError.of(QueueFullError(f"{scheduler.limits.max_waiting} requests are waiting; ask again later"))
        preparing += 1
        try:
            chat = ChatRequest.parse(await _body(request, settings))
            check_model(chat.model)
            arguments = chat, scheduler.model.checkpoint, settings.defaults
            limiter = downloading if chat.downloads else opening
            return chat, await to_thread.run_sync(to_request, *arguments, limiter=limiter)
        finally:
            preparing -= 1

    def hold(pixels: int) -> None:
        nonlocal held_pixels
        if pixels and held_pixels and held_pixels + pixels > settings.max_held_pixels:
            raise QueueFullError("the pictures of waiting requests fill the memory; ask again later")
        held_pixels += pixels

    def let_go(pixels: int) -> None:
        nonlocal held_pixels
        held_pixels -= pixels

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        check_key(request)
        try:
            chat, prompted = await prepare(request)
            pixels = sum(picture.image.width * picture.image.height for picture in prompted.prompt.pictures)
            hold(pixels)
            try:
                answer = _Answer(scheduler, prompted, metrics, name, partial(let_go, pixels))
            except BaseException:
                let_go(pixels)
                raise
        except Exception as error:
            raise _told(error) from error
        try:
            if chat.stream:
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                first = await answer.first(request)
                return _Stream(answer, first, include_usage)
            whole = JSONResponse(await answer.whole(request))
        except BaseException:
            answer.close()
            raise
        return whole

    return app


def _told(error: Exception) -> ApiError:
    told = ApiError.of(error)
    if told.status == 500:
        _log.error("a request failed", exc_info=error)
    return told


async def _body(request: Request, settings: ServerSettings) -> bytes:
    """A request's body, if it is JSON of a bearable size that comes in time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind or 'missing'}; it must be application/json")
    too_large = ApiError(413, f"the body is larger than {settings.max_body_bytes:,} bytes; send smaller pictures")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_body_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > settings.max_body_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), settings.body_timeout)
    except ClientDisconnect:
        raise ApiError(499, _GONE) from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body was not there within {settings.body_timeout:g} seconds") from None


class _Answer:
    """One request's way through the scheduler, as the event loop sees it."""

    def __init__(
        self, scheduler: Scheduler, prompted: Prompted, metrics: Metrics, model: str, on_over: Callable[[], None]
    ) -> None:
        self._scheduler, self._metrics, self._on_over = scheduler, metrics, on_over
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._copies, self._prompted = prompted.copies, prompted
        self._finishes = ["stop"] * prompted.copies
        self._times: list[list[float]] = [[] for _ in range(prompted.copies)]
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)
            if not isinstance(event, Piece):
                loop.call_soon_threadsafe(self._over)

        self._is_over = False
        self._ticket = scheduler.submit(prompted, listen)

    def _over(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_over()

    def close(self) -> None:
        """Whoever waits for this has left, or has all of it."""
        self._scheduler.cancel(self._ticket)
        self._over()

    async def _next(self) -> Piece | Report:
        event = await self._events.get()
        if isinstance(event, Failure):
            error = event.error
            raise _told(error if isinstance(error, Exception) else RuntimeError(str(error)))
        if isinstance(event, Piece):
            self._times[event.index].append(time.monotonic())
            if event.finish is not None:
                self._finishes[event.index] = event.finish
        else:
            self._metrics.done(event, self._finishes, self._times)
        return event

    async def first(self, request: Request) -> Piece | Report:
        """The first event: what fails before it fails with a status of its own."""
        return await _unless_gone(request, self._next())

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer at once, as a `chat.completion`."""
        texts = [""] * self._copies

        async def read() -> Report:
            while True:
                event = await self._next()
                if isinstance(event, Report):
                    return event
                texts[event.index] += event.text

        report = await _unless_gone(request, read())
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish,
            }
            for index, (text, finish) in enumerate(zip(texts, self._finishes, strict=True))
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": _usage(report)}

    async def chunks(self, event: Piece | Report, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, `chat.completion.chunk` each, the first event given."""
        head = {**self._head, "object": "chat.completion.chunk"}
        if include_usage:
            head["usage"] = None

        def choice(index: int, delta: dict[str, Any], finish: str | None = None) -> str:
            choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
            return _sse({**head, "choices": choices})

        try:
            for index in range(self._copies):
                yield choice(index, {"role": "assistant", "content": ""})
            while isinstance(event, Piece):
                if event.text:
                    yield choice(event.index, {"content": event.text})
                if event.finish is not None:
                    yield choice(event.index, {}, event.finish)
                event = await self._next()
            if include_usage:
                yield _sse({**head, "choices": [], "usage": _usage(event)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            self._metrics.failed(error.status)
            yield _sse(error.body())


class _Stream(StreamingResponse):
    """An answer as it comes. However the response ends, nobody waits for the answer then."""

    def __init__(self, answer: _Answer, first: Piece | Report, include_usage: bool) -> None:
        super().__init__(
            answer.chunks(first, include_usage), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _unless_gone(request: Request, work: Any) -> Any:
    """The outcome of `work`, which is given up when the client goes away."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, _GONE)
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(report: Report) -> dict[str, Any]:
    return {
        "prompt_tokens": report.prompt_rows,
        "completion_tokens": report.new_tokens,
        "total_tokens": report.prompt_rows + report.new_tokens,
        "visual_tokens": report.visual_tokens,
        "kept_visual_tokens": report.kept_visual_tokens,
        "flops_saved": report.flops_saved,
        "time_to_first_token_s": report.first_token_seconds,
        "queue_s": report.queue_seconds,
    }
