"""What OpenAI's clients say: a chat request's JSON, checked, and the prompt it becomes. And how errors are told."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from llava.images import URL_TIMEOUT, ImageError, decode_image, is_url, load_image
from llava.inference import Checkpoint, GenerationOptions, Turn
from llava.pruning import Method
from llava.utils import UserError

from .request import ClosingError, QueueFullError, Request, RequestTimeoutError, WorkerDeadError

LONGEST_MESSAGE = 500
"""Characters of an error's message: what was sent is not sent back whole."""
MOST_VALUES = 20_000
"""In a request's JSON. Checking a body of many millions would take minutes, in which nobody is answered."""
DOWNLOAD_SECONDS = 30.0
"""For all pictures of a request together."""
CHARACTERS_A_TOKEN = 64
"""Longer tokens are so rare that a prompt of many cannot fit."""


class ApiError(Exception):
    """An error as OpenAI's clients read it.

    Attributes:
        status: of HTTP.
        message, kind, code, param: the four fields of the body's `error`; `kind` is its `type`.
        retry_after: seconds after which it may be asked again; None: not said.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]} …"
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """What a caller is told of an error. Of one that is nobody's fault but ours: nothing."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            return cls(429, str(error), "rate_limit_error", "queue_full", retry_after=1)
        if isinstance(error, ClosingError):
            return cls(503, str(error), "server_error", "shutting_down", retry_after=5)
        if isinstance(error, WorkerDeadError):
            return cls(503, "the model is not running any more", "server_error", "worker_dead")
        if isinstance(error, RequestTimeoutError):
            return cls(504, str(error), "server_error", "timeout")
        if isinstance(error, UserError):
            return cls(400, str(error))
        return cls(500, "the request failed by an internal error", "server_error", "internal_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ImageURL(_Strict):
    url: str
    detail: str | None = None  # there is one way to look at a picture


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageURL


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, _TextPart))

    @property
    def pictures(self) -> list[str]:
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, _ImagePart)]


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


_KINDS = ("str", "constrained-", "dict[", "list[", "function-", "literal[")

_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`. What would change answers and is not served is refused, not ignored."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    pruning: dict[str, Any] | Literal[False] | None = None

    # Accepted where they ask for what is done anyway.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    # These say nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Read a request's body. Raises `ApiError` 400 with the first thing that is wrong."""
        try:
            values = from_json(body)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None
        if not _holds_at_most(MOST_VALUES, values):
            raise ApiError(400, f"the body holds more than {MOST_VALUES:,} values; send fewer messages")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            # Of a value that may be of several kinds, the one that it came nearest to; names of kinds are no place.
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            first = max(errors, key=lambda each: len(each["loc"]))
            parts = [str(part) for part in first["loc"] if not str(part).startswith(_KINDS)]
            place = ".".join(part for part, _ in groupby(parts))  # a part's type comes twice
            if first["type"] == "extra_forbidden":
                raise ApiError(400, f"{place!r} is not known or not served here; leave it out", param=place) from None
            raise ApiError(400, f"{place}: {first['msg']}" if place else first["msg"], param=place or None) from None

    @property
    def downloads(self) -> bool:
        """Whether pictures are to be fetched from elsewhere."""
        return any(is_url(source) for message in self.messages for source in message.pictures)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _holds_at_most(most: int, values: Any) -> bool:
    """Whether plain JSON values, those inside of them included, are no more than so many."""
    inside = [values]
    while inside:
        each = inside.pop()
        most -= len(each) if isinstance(each, dict | list) else 0
        if most < 0:
            return False
        if isinstance(each, dict | list):
            inside += each.values() if isinstance(each, dict) else each
    return True


@dataclass(frozen=True)
class Defaults:
    """What a request means that does not say, and what it may ask for.

    Attributes:
        config: pruning of requests without a `pruning`; None: dense.
        max_new_tokens: of requests without `max_tokens`.
        temperature: of requests without one.
        max_pictures: in one request.
        max_pixels: of all pictures of one request together.
        picture_urls: whether pictures are downloaded: ``public`` (from public addresses alone), ``any``, ``off``.
        timeout: seconds for a request, its time in the queue included.
    """

    config: Method | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    max_pictures: int = 16
    max_pixels: int = 50_000_000
    picture_urls: str = "public"
    timeout: float = 600.0


def to_request(chat: ChatRequest, checkpoint: Checkpoint, defaults: Defaults) -> Request:
    """The prompt and how to answer it. Pictures are opened here, which takes time: not for an event loop.

    Raises:
        ApiError, UserError: what cannot be answered.
    """
    config = _config(chat, checkpoint, defaults)
    messages = _messages(chat)
    sources = sum(len(message.pictures) for message in messages)
    if sources > defaults.max_pictures:
        raise ApiError(400, f"{sources} pictures in one request; {defaults.max_pictures} are allowed", param="messages")
    length, most = sum(len(message.text) for message in messages), CHARACTERS_A_TOKEN * checkpoint.context_len
    if length > most:  # before a tokenizer spends seconds on it
        raise ApiError(400, f"the messages have {length:,} characters; no more than {most:,} can fit", param="messages")
    turns: list[Turn] = []
    pixels, until = defaults.max_pixels, time.monotonic() + DOWNLOAD_SECONDS
    for message in messages:
        if message.role == "user":
            turns.append(Turn(message.text))
            for source in message.pictures:
                image = _open(source, defaults, pixels, until - time.monotonic())
                pixels -= image.width * image.height
                turns[-1].pictures.append(checkpoint.read_picture(image))
        else:
            turns[-1].said = message.text
    temperature = defaults.temperature if chat.temperature is None else chat.temperature
    return Request(
        checkpoint.encode(turns),
        config,
        GenerationOptions(
            max_new_tokens=chat.max_completion_tokens or chat.max_tokens or defaults.max_new_tokens,
            temperature=temperature,
            top_p=chat.top_p,
        ),
        seed=chat.seed,
        stop=chat.stops,
        copies=chat.n or 1,
        timeout=defaults.timeout,
    )


def _config(chat: ChatRequest, checkpoint: Checkpoint, defaults: Defaults) -> Method | None:
    if "pruning" not in chat.model_fields_set:
        return defaults.config
    if chat.pruning is None or chat.pruning is False:
        return None
    for value in _leaves(chat.pruning):
        if isinstance(value, str) and value.strip().startswith("@"):
            raise ApiError(400, "pruning: files are not read here; write the config itself", param="pruning")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ApiError(400, "pruning: an integer has more than 64 bits", param="pruning")
    try:
        return checkpoint.pruning_config(chat.pruning)
    except UserError as error:
        raise ApiError(400, str(error), param="pruning") from error


def _leaves(value: Any) -> Iterator[Any]:
    """All plain values in JSON's lists and objects."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _messages(chat: ChatRequest) -> list[_Message]:
    """User and assistant in turns, the user first and last; a system message goes in front of the first question."""
    first, *rest = chat.messages
    messages: list[_Message] = []
    if first.role in ("system", "developer"):
        if first.pictures or not rest:
            raise ApiError(
                400, f"messages.0: a {first.role} message takes text, and a question behind it", param="messages.0"
            )
        question = _TextPart(type="text", text=f"{first.text}\n{rest[0].text}")
        pictures = [part for part in rest[0].content if isinstance(part, _ImagePart)]
        rest[0] = _Message(role=rest[0].role, content=[*pictures, question])
    else:
        rest = chat.messages
    for number, message in enumerate(rest, start=len(chat.messages) - len(rest)):
        place = f"messages.{number}"
        wanted = "assistant" if len(messages) % 2 else "user"
        if message.role != wanted:
            raise ApiError(
                400, f"{place}: role {message.role!r}; user and assistant take turns, the user begins", param=place
            )
        if message.role == "assistant" and message.pictures:
            raise ApiError(400, f"{place}: an assistant's message with a picture", param=place)
        messages.append(message)
    if messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    if not messages[-1].text.strip():
        raise ApiError(400, "the last message has no text: a picture needs a question", param="messages")
    return messages


def _open(source: str, defaults: Defaults, max_pixels: int, seconds: float) -> Image.Image:
    if source[:5].lower() == "data:":
        head, comma, content = source[5:].partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ImageError("a picture's data URL must read data:image/…;base64,…")
        try:
            decoded = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"a picture's data URL holds broken base64: {error}") from error
        return decode_image(decoded, "in the data URL", max_pixels=max_pixels)
    if not is_url(source):
        raise ImageError("a picture must be a data URL or an http(s) URL; files of the server are not read")
    if defaults.picture_urls == "off":
        raise ImageError("pictures are not downloaded here; send a data URL")
    if seconds <= 0:
        raise ImageError(f"the pictures were not there within {DOWNLOAD_SECONDS:g} seconds; send data URLs")
    return load_image(
        source,
        max_pixels=max_pixels,
        timeout=min(URL_TIMEOUT, seconds),
        only_public=defaults.picture_urls == "public",
    )
