"""A model behind an OpenAI-compatible server, such as `llava.serve.api`, in the place of a loaded one (extra ``web``).

`RemoteModel` is a `llava.serve.chat.ChatModel`: it opens no weights, sends a conversation's turns, pictures and pruning
config, and makes an `Answer` of what streams back.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import API_KEY_VARIABLE
from llava.errors import missing_extra
from llava.images import load_image
from llava.inference import Answer, Clock, GenerationOptions, Picture, Turn
from llava.utils import UserError, clean_text

_TIMEOUT = 600.0  # seconds without a word from the server: its queue may be long
_LARGEST_PNG = 4 * 2**20  # bytes; servers limit a request's, and a photo's PNG is several times its JPEG


@dataclass(frozen=True)
class RemoteConfig:
    """How a server is asked to prune. `settings`: a config as in its JSON; None: as the server does by default."""

    settings: Mapping[str, Any] | None = None
    is_dense = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return dict(self.settings or {})


@dataclass(frozen=True)
class RemotePicture(Picture):
    """A picture with the data URL that it is sent as."""

    url: str = ""


@dataclass(frozen=True)
class RemoteAnswer(Answer):
    """An answer from a server, which says how much was pruned and not where.

    Attributes:
        usage: the figures that it sent with the answer; None: it sent none, as for an answer that was stopped.
    """

    usage: Mapping[str, Any] | None = None

    @property
    def new_tokens(self) -> int:
        return self.clock.new_tokens

    @property
    def kept(self) -> int:
        return (self.usage or {}).get("kept_visual_tokens", self.visual_tokens)


@dataclass
class _Heard:
    """What came of an answer so far."""

    pieces: list[str] = field(default_factory=list)
    finish: str = "interrupted"
    usage: dict[str, Any] | None = None
    first_at: float | None = None


class RemoteCheckpoint:
    """What a conversation needs of a checkpoint, without one."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.model_path, self.conv_mode = name, url, "the server's"

    def pruning_config(self, given: str | Mapping[str, Any] | None = None) -> RemoteConfig:
        """A config to send: JSON or its values; nothing: the server's own. What it means, the server checks."""
        if isinstance(given, str):
            try:
                given = json.loads(given) if given.strip() else None
            except ValueError as error:
                raise UserError(f"the pruning config is no JSON: {error}") from error
        if given is not None and not isinstance(given, Mapping):
            raise UserError('the pruning config is no JSON object, such as {"method": "vtw", "layer": 16}')
        return RemoteConfig(given)

    def read_picture(self, source: str | Path | Image.Image) -> RemotePicture:
        """Open a picture, and write it as it will be sent. Raises as `load_image` does."""
        image = source if isinstance(source, Image.Image) else load_image(source)
        name = "picture" if isinstance(source, Image.Image) else str(source)
        return RemotePicture(name, image, url=_data_url(image))

    def encode(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The messages of a request."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": picture.url}}
                for picture in turn.pictures
                if isinstance(picture, RemotePicture)
            ]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            if turn.reply is not None:
                messages.append({"role": "assistant", "content": turn.reply})
        return messages


class RemoteModel:
    """The model that a server has.

    Args:
        url: of the server, with or without ``/v1``.
        api_key: if it wants one.

    Attributes:
        checkpoint: stands for the model's own.
        placement: where it runs, for people.

    Raises:
        UserError: nothing there answers as it should; what to do is said.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            import openai
        except ImportError as missing:
            raise missing_extra("web", "--server", missing) from missing
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--server is {url!r}; give a URL such as http://127.0.0.1:8000")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key, self._openai = api_key, openai
        with openai.OpenAI(**{**self._access, "timeout": 30.0}) as client:
            try:
                name = client.models.list().data[0].id
            except openai.APIError as error:
                raise self._told(error) from error
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise UserError(f"{self._url} lists no models: no OpenAI-compatible server is there") from error
        self.checkpoint = RemoteCheckpoint(name, self._url)
        self.placement = f"on {self._url}"

    @property
    def _access(self) -> dict[str, Any]:
        # The client insists on a key, and would take OpenAI's own from the environment, which is not for others.
        return {
            "base_url": f"{self._url}/v1",
            "api_key": self._key or "none",
            "max_retries": 0,
            "timeout": _TIMEOUT,
        }

    def warm_up(self, prompt: Any, config: Any) -> None:
        """Nothing: a server is warm."""

    def answer(
        self,
        prompt: list[dict[str, Any]],
        config: RemoteConfig | None = None,
        options: GenerationOptions | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> RemoteAnswer:
        """The answer to `RemoteCheckpoint.encode`'s messages; arguments as for `LoadedModel.answer`.

        Raises:
            UserError: the server is gone, or answered with an error; in its words.
        """
        options = options or GenerationOptions()
        body: dict[str, Any] = {
            "model": self.checkpoint.name,
            "messages": prompt,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            **({} if options.top_p is None else {"top_p": options.top_p}),
        }
        if config is None:
            body["extra_body"] = {"pruning": False}
        elif config.settings is not None:
            body["extra_body"] = {"pruning": config.to_dict()}
        heard, begin = _Heard(), time.monotonic()
        try:
            asyncio.run(self._listen(body, heard, on_text, stop))
        except self._openai.APIError as error:
            raise self._told(error) from error
        seconds = time.monotonic() - begin
        usage = heard.usage or {}
        tokens = usage.get("completion_tokens", len(heard.pieces))
        return RemoteAnswer(
            text="".join(heard.pieces).strip(),
            ids=(),
            finish=heard.finish,
            config=config,  # type: ignore[arg-type]  # the server has the method
            trace=None,
            flops_saved=usage.get("flops_saved") or {},
            num_layers=0,
            prompt_rows=usage.get("prompt_tokens", 0),
            visual_tokens=usage.get("visual_tokens", 0),
            clock=Clock(1, tokens, (heard.first_at or time.monotonic()) - begin, seconds),
            usage=heard.usage,
        )

    async def _listen(
        self,
        body: dict[str, Any],
        heard: _Heard,
        on_text: Callable[[str], None] | None,
        stop: threading.Event | None,
    ) -> None:
        """Ask, and hear the answer to its end or until `stop`, which hangs up: the server ends it then."""

        async def read() -> None:
            async with self._openai.AsyncOpenAI(**self._access) as client:
                options = {"include_usage": True}
                async for chunk in await client.chat.completions.create(**body, stream=True, stream_options=options):
                    if chunk.usage is not None:
                        heard.usage = chunk.usage.model_dump()
                    for choice in chunk.choices:
                        if choice.delta.content:
                            heard.first_at = heard.first_at or time.monotonic()
                            heard.pieces.append(choice.delta.content)
                            if on_text:
                                on_text(choice.delta.content)
                        heard.finish = choice.finish_reason or heard.finish

        reading = asyncio.ensure_future(read())
        while not (await asyncio.wait({reading}, timeout=0.05))[0]:
            if stop and stop.is_set():
                reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading

    def _told(self, error: Exception) -> UserError:
        """An error of the client in one line."""
        openai, place = self._openai, f"the server {self._url}"
        if isinstance(error, openai.AuthenticationError):
            wants = "another API key" if self._key else "an API key"
            return UserError(f"{place} wants {wants}; give --api-key, or set {API_KEY_VARIABLE}")
        if isinstance(error, openai.APITimeoutError):
            return UserError(f"{place} did not answer in time; try again later")
        if isinstance(error, openai.APIConnectionError):
            reason = _one_line(error.__cause__ or error)
            return UserError(f"{place} cannot be reached ({reason}); is it running?")
        body = getattr(error, "body", None)
        words = _one_line(body["message"] if isinstance(body, Mapping) and body.get("message") else error)
        if isinstance(error, openai.APIStatusError):
            return UserError(f"{place} answered with status {error.status_code}: {words}")
        return UserError(f"{place} failed: {words}")


def _one_line(words: Any) -> str:
    return clean_text(" ".join(str(words).split()))[:500]


def _data_url(image: Image.Image) -> str:
    """The picture's pixels as they are, or as a fine JPEG where that would be much."""
    written = io.BytesIO()
    image.save(written, "PNG")
    kind = "png"
    if written.tell() > _LARGEST_PNG:
        written, kind = io.BytesIO(), "jpeg"
        image.save(written, "JPEG", quality=95)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
