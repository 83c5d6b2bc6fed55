"""The server as OpenAI's own client meets it, and as nobody should."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import uvicorn
from PIL import Image
from serving_helpers import IMAGES, alone, config_of, picture, shipped
from tiny_stock import write_stock

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.serving import Limits, Request, Scheduler
from llava.serving.app import ServerSettings, build_app
from llava.serving.protocol import Defaults

KEY = "sk-right"
PATIENCE = 500  # seconds, against what hangs
PROMPT = [{"role": "user", "content": "What shape is in the image?"}]


class Running:
    """A server on a port of its own, in threads of this process."""

    def __init__(self, limits: Limits | None = None, model: LoadedModel | None = None, **settings) -> None:
        self.scheduler = Scheduler(model or shipped(), limits)
        settings.setdefault("model_name", "tiny")
        settings.setdefault("api_keys", [KEY])
        app = build_app(self.scheduler, ServerSettings(**settings))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=10))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)
        while not self.server.started:
            time.sleep(0.01)

    def ask(self, messages=PROMPT, **how):
        return self.openai.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 8, **how})

    def post(self, body=None, **patch) -> httpx.Response:
        given = {"model": "tiny", "messages": PROMPT, "max_tokens": 2, **patch} if body is None else body
        return self.http.post("/v1/chat/completions", json=given)

    def metric(self, name: str, *labels: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        values = [line for line in lines if line.startswith(name) and all(label in line for label in labels)]
        return sum(float(line.rpartition(" ")[2]) for line in values if line[len(name)] in "{ ")

    def settled(self) -> None:
        """Wait until nobody is answered any more; nothing may be left then."""
        until = time.monotonic() + PATIENCE
        while (load := self.scheduler.load).running or load.waiting:
            assert time.monotonic() < until, load
            time.sleep(0.01)
        assert (load.kv_used_bytes, load.kv_held_bytes) == (0, 0)
        assert load.is_alive

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join()
        self.scheduler.close()


@contextmanager
def running(*args, **settings) -> Iterator[Running]:
    server = Running(*args, **settings)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The server that most tests share. Each finds it empty and leaves it so."""
    with running(defaults=Defaults(config=config_of("shipped"), max_pictures=4)) as running_server:
        yield running_server


@pytest.fixture(autouse=True)
def _leaves_nothing(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").settled()


@pytest.fixture
def endless(monkeypatch):
    """Answers that only their limits end, an x a token."""

    def accept(self, answer, token):
        answer.ids.append(token)
        return "x", "length" if len(answer.ids) >= answer.limit else None

    monkeypatch.setattr("llava.serving.engine.Engine.accept", accept)


def data_url(content: bytes | Path, kind: str = "image/png") -> str:
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def with_pictures(question: str, *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def expected(question: str, *pictures: int, config="shipped", tokens: int = 8):
    prompt = shipped().checkpoint.encode([Turn(question, [picture(number) for number in pictures])])
    return alone(Request(prompt, config_of(config), GenerationOptions(tokens)))


# -- as any server ---------------------------------------------------------------------------------------------------


def test_models(server):
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").max_model_len == shipped().checkpoint.context_len
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        server.openai.models.retrieve("gpt-4")


def test_a_chat_with_a_picture_and_its_usage(server):
    messages = with_pictures("What shape is in the image?", data_url(IMAGES[0]))
    answer = server.ask(messages)
    alone_answer = expected("What shape is in the image?", 0)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (alone_answer.text, "assistant")
    assert choice.finish_reason == alone_answer.finish
    assert answer.model == "tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == alone_answer.prompt_rows
    assert usage.completion_tokens == alone_answer.new_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert (usage.visual_tokens, usage.kept_visual_tokens) == (alone_answer.visual_tokens, alone_answer.kept)
    assert usage.flops_saved == alone_answer.flops_saved
    assert 0 <= usage.queue_s <= usage.time_to_first_token_s


def test_a_stream_says_the_same_in_pieces(server):
    messages = with_pictures("What color is the shape?", data_url(IMAGES[1]))
    chunks = list(server.ask(messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = server.ask(messages)
    assert text == whole.choices[0].message.content == expected("What color is the shape?", 1).text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_in_done(server):
    answer = server.post(stream=True)
    lines = [line for line in answer.text.splitlines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_several_pictures_and_several_turns(server):
    messages = [
        *with_pictures("What is this?", data_url(IMAGES[0])),
        {"role": "assistant", "content": "a red circle"},
        *with_pictures("And these?", data_url(IMAGES[1]), data_url(IMAGES[2])),
    ]
    turns = [Turn("What is this?", [picture(0)], said="a red circle"), Turn("And these?", [picture(1), picture(2)])]
    prompt = shipped().checkpoint.encode(turns)
    whole = alone(Request(prompt, config_of("shipped"), GenerationOptions(8)))
    answer = server.ask(messages)
    assert answer.choices[0].message.content == whole.text
    assert answer.usage.visual_tokens == whole.visual_tokens


def test_a_system_message_goes_before_the_first_question(server):
    messages = [{"role": "system", "content": "Be brief."}, *with_pictures("What is this?", data_url(IMAGES[0]))]
    assert server.ask(messages).choices[0].message.content == expected("Be brief.\nWhat is this?", 0).text


@pytest.mark.parametrize(
    "pruning", [False, None, {"method": "fastv", "layer": 2, "keep": 0.5}, {"mode": ["deep"], "mid_deep_layer": 6}]
)
def test_a_request_brings_its_own_pruning(server, pruning):
    answer = server.ask(with_pictures("What is this?", data_url(IMAGES[0])), extra_body={"pruning": pruning})
    config = pruning or None
    assert answer.choices[0].message.content == expected("What is this?", 0, config=config).text
    assert (answer.usage.flops_saved == {}) == (config is None)


def test_n_answers_with_a_seed(server):
    how = {"n": 6, "temperature": 2, "top_p": 0.999, "seed": 5, "max_completion_tokens": 10, "max_tokens": None}
    messages = with_pictures("Describe the picture.", data_url(IMAGES[0]))
    first, second = server.ask(messages, **how), server.ask(messages, **how)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert [choice.index for choice in first.choices] == list(range(6)) and len(set(texts)) > 1
    streamed = dict.fromkeys(range(6), "")
    for chunk in server.ask(messages, **how, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_a_stop_string_ends_an_answer(server):
    messages = with_pictures("Describe the picture.", data_url(IMAGES[0]))
    whole = server.ask(messages, max_tokens=30).choices[0].message.content
    stop = whole[1:3]
    for given in (stop, [stop, "never"]):
        answer = server.ask(messages, max_tokens=30, stop=given)
        assert answer.choices[0].message.content == whole.split(stop)[0].strip()
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_too_small_to_divide_by_is_greedy(server, temperature):
    answer = server.ask(with_pictures("What is this?", data_url(IMAGES[0])), temperature=temperature, top_p=1e-300)
    assert answer.choices[0].message.content == expected("What is this?", 0).text


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": [{"role": "user", "content": "a\0b\u202e\ufeff</s><unk>"}]},
        {"max_tokens": 2**70},
        {"stop": ["a"] * 16},
        {"stop": ["\0", "🙂"], "stream": True, "n": 3},
        {"metadata": {"a": [{"b": None}]}, "user": "\0" * 10_000},
    ],
    ids=["characters", "max_tokens", "stops", "streams", "metadata"],
)
def test_what_is_odd_and_harmless_is_answered(server, odd):
    assert server.post(**odd).status_code == 200


def test_max_tokens_end_with_length(server, endless):
    answer = server.ask(max_tokens=3)
    assert answer.choices[0].message.content == "xxx"
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3


def test_the_async_client_asks_sixteen_times_at_once(server):
    import asyncio

    source = random.Random(0)
    wanted = [(source.randrange(6), question) for question in ("What is this?", "Is it red?") for _ in range(8)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def ask(number: int, question: str) -> str:
                messages = with_pictures(question, data_url(IMAGES[number]))
                answer = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
                return answer.choices[0].message.content

            return await asyncio.gather(*(ask(*each) for each in wanted))

    answers = asyncio.run(ask_all())
    cached = {each: expected(each[1], each[0], tokens=6).text for each in set(wanted)}
    assert answers == [cached[each] for each in wanted]


def test_a_stock_checkpoint_answers_as_alone(tmp_path):
    checkpoint = open_checkpoint(write_stock(tmp_path / "stock"))
    model = LoadedModel(checkpoint, LoadOptions(device="cpu"))
    config = checkpoint.pruning_config({"method": "fastv", "layer": 2, "keep": 0.25})
    with running(model=model, defaults=Defaults(config)) as server:
        answer = server.ask(with_pictures("what is this", data_url(IMAGES[0])), max_tokens=6)
        prompt = checkpoint.encode([Turn("what is this", [checkpoint.read_picture(IMAGES[0])])])
        expected_answer = model.answer(prompt, config, GenerationOptions(6))
        assert answer.choices[0].message.content == expected_answer.text
        assert answer.usage.kept_visual_tokens == expected_answer.kept < answer.usage.visual_tokens
        server.settled()


def test_health_and_metrics(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = server.metric("vllm:request_success_total"), server.metric("vllm:generation_tokens_total")
    answer = server.ask(with_pictures("What is this?", data_url(IMAGES[0])))
    assert server.metric("vllm:request_success_total") == before[0] + 1
    assert server.metric("vllm:generation_tokens_total") == before[1] + answer.usage.completion_tokens
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(f"vllm:{name}") == 0
    assert server.metric("vllm:time_to_first_token_seconds_count") >= 1
    assert server.metric("visipruner:visual_tokens_total") >= answer.usage.visual_tokens


def test_a_browser_gets_no_leave(server):
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = server.http.request("OPTIONS", "/v1/chat/completions", headers=origin)
    assert preflight.status_code == 405 and not any(name.startswith("access-control") for name in preflight.headers)
    answer = server.http.get("/v1/models", headers=origin)
    assert "access-control-allow-origin" not in answer.headers


# -- faulty requests -------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def gif_bomb() -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 16000, 16000, 0, 0, 0) + b";"


def truncated() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG")
    return stream.getvalue()[:300]


def text_bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    head, body = stream.getvalue()[:33], stream.getvalue()[33:]
    packed = b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 9)
    return (
        head
        + struct.pack(">I", len(packed))
        + b"zTXt"
        + packed
        + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
        + body
    )


QUESTION = {"type": "text", "text": "What is this?"}
BAD_PICTURES = {
    "10,000 x 10,000": data_url(png_header(10_000, 10_000)),
    "a long strip": data_url(png_header(60_000, 1)),
    "a GIF that declares 256 megapixels": data_url(gif_bomb()),
    "a comment that unpacks without end": data_url(text_bomb()),
    "broken base64": "data:image/png;base64,@@@@",
    "base64 with a wrong padding": "data:image/png;base64,iVBORw0KGgo",
    "no base64": "data:image/png,hello",
    "no comma": "data:image/png;base64",
    "empty": "data:image/png;base64,",
    "text": data_url(b"hello world", "text/plain"),
    "SVG": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "PostScript": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "application/postscript"),
    "truncated": data_url(truncated(), "image/jpeg"),
    "a path": "/etc/passwd",
    "a file URL": "file:///etc/passwd",
    "ftp": "ftp://127.0.0.1/a.png",
    "loopback": "http://127.0.0.1:{port}/a.png",
    "localhost": "http://localhost:{port}/a.png",
    "loopback in one number": "http://2130706433:{port}/a.png",
    "loopback in hexadecimal": "http://0x7f.1:{port}/a.png",
    "IPv6 loopback": "http://[::1]:{port}/a.png",
    "IPv4 in IPv6": "http://[::ffff:127.0.0.1]:{port}/a.png",
    "everywhere": "http://0.0.0.0:{port}/a.png",
    "cloud metadata": "http://169.254.169.254/latest/meta-data/",
    "a private network": "http://10.0.0.1/a.png",
    "a user in front": "http://example.com@127.0.0.1:{port}/a.png",
    "an unknown name": "http://no-such-host.invalid/a.png",
    "a name of a million letters": f"http://{'a' * 1_000_000}/a.png",
    "NUL in a name": "http://exam\0ple.com/a.png",
    "no name": "http:///a.png",
}
BAD_BODIES = {
    "empty": b"",
    "malformed": b'{"model": "tiny", "messages": [',
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "nested": b'{"messages":' + b"[" * 100_000,
    "millions of values": b'{"model":"tiny","messages":[' + b"1," * 2_000_000 + b"1]}",
    "half a character": b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    "temperature NaN": b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":NaN}',
    "keep Infinity": b'{"model":"tiny","messages":[{"role":"user","content":"a"}],'
    b'"pruning":{"method":"fastv","layer":2,"keep":Infinity}}',
    "a huge number": b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":' + b"9" * 5000 + b"}",
}
BAD_FIELDS = {
    "no messages": {"messages": []},
    "messages of a wrong kind": {"messages": "hello"},
    "unknown role": {"messages": [{"role": "tool", "content": "a"}]},
    "assistant first": {"messages": [{"role": "assistant", "content": "a"}]},
    "assistant last": {"messages": [*PROMPT, {"role": "assistant", "content": "a"}]},
    "user twice": {"messages": PROMPT * 2},
    "only a system message": {"messages": [{"role": "system", "content": "a"}]},
    "no text": {"messages": with_pictures("", data_url(IMAGES[0]))},
    "too many pictures": {"messages": with_pictures("What?", *[data_url(IMAGES[0])] * 5)},
    "an unknown part": {"messages": [{"role": "user", "content": [{"type": "video_url"}, QUESTION]}]},
    "a placeholder in text": {"messages": [{"role": "user", "content": "<image> <image> what?"}]},
    "a placeholder in an answer": {"messages": [*PROMPT, {"role": "assistant", "content": "<image>"}, *PROMPT]},
    "10,001 messages": {"messages": [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(10_001)]},
    "the same picture 200 times": {"messages": with_pictures("What?", *[data_url(IMAGES[0])] * 200)},
    "an endless prompt": {"messages": [{"role": "user", "content": "a b " * 3_000_000}]},
    "a prompt longer than the context": {"messages": [{"role": "user", "content": "a b " * 2_000}]},
    "max_tokens 0": {"max_tokens": 0},
    "max_tokens -1": {"max_tokens": -1},
    "max_tokens beneath every integer": {"max_tokens": -(2**70)},
    "temperature": {"temperature": 3},
    "temperature NaN": {"temperature": "NaN"},
    "top_p": {"top_p": 0},
    "n 0": {"n": 0},
    "n too large": {"n": 1000},
    "seed": {"seed": 2**70},
    "stop empty": {"stop": ""},
    "stops too many": {"stop": ["a"] * 17},
    "logprobs": {"logprobs": True},
    "tools": {"tools": [{"type": "function"}]},
    "an unknown field": {"num_beams": 5},
    "pruning as text": {"pruning": "@/etc/passwd"},
    "a file in a chain": {"pruning": {"method": "chain", "steps": ["@/etc/passwd", {"method": "vtw", "layer": 3}]}},
    "an unknown method": {"pruning": {"method": "fastvv"}},
    "an unknown knob": {"pruning": {"method": "fastv", "layers": 2}},
    "a knob of more than 64 bits": {"pruning": {"method": "pool", "factor": 2**70}},
    "thousands of unknown knobs": {"pruning": {f"knob {number}": number for number in range(5_000)}},
    "a layer too many": {"pruning": {"method": "vtw", "layer": 99}},
}


def assert_refused(answer: httpx.Response, status: int = 400) -> str:
    """One clear error in OpenAI's form, that tells nothing of the server."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message and "\n" not in message and "Traceback" not in message and "root:" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(server, name, monkeypatch):
    monkeypatch.setattr("llava.images.URL_TIMEOUT", 2.0)
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as inside:
        threading.Thread(target=inside.serve_forever, daemon=True).start()
        url = BAD_PICTURES[name].replace("{port}", str(inside.server_port))
        assert_refused(server.post(messages=with_pictures("What is this?", url)))
        inside.shutdown()
    assert not asked  # nothing inside the network was reached


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(server, name):
    headers = {"Content-Type": "application/json"}
    assert_refused(server.http.post("/v1/chat/completions", content=BAD_BODIES[name], headers=headers))


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields(server, name):
    assert_refused(server.post(**BAD_FIELDS[name]))


@pytest.mark.parametrize(
    ("given", "status"),
    [(None, 401), ("Bearer sk-wrong", 401), ("Bearer", 401), (f"Basic {KEY}", 401), ("Bearer ключ", 401)],
)
def test_a_wrong_key(server, given, status):
    headers = {} if given is None else {"Authorization": given.encode()}
    for path in ("/v1/models", "/v1/models/tiny"):
        assert_refused(httpx.get(server.url + path, headers=headers), status)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={}, headers=headers)
    assert_refused(answer, status)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key_in_the_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_client_reads_errors_as_errors(server):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.ask(temperature=5)
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        server.openai.chat.completions.create(model="gpt-4", messages=PROMPT)
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(extra_body={"pruning": {"method": "fastvv"}})
    assert caught.value.param == "pruning" and "fastv" in caught.value.message


def test_wrong_paths_methods_and_kinds(server):
    assert_refused(server.http.get("/v1/nothing"), 404)
    assert_refused(server.http.get("/docs"), 404)
    assert_refused(server.http.get("/v1/chat/completions"), 405)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": kind})
        assert_refused(answer, 415)


def test_a_body_of_50_mb(server):
    headers = {"Content-Type": "application/json"}
    assert_refused(server.http.post("/v1/chat/completions", content=b" " * 50_000_000, headers=headers), 413)

    def in_parts() -> Iterator[bytes]:  # without a declared length
        for _ in range(50):
            yield b" " * 1_000_000

    with suppress(httpx.WriteError):  # the connection may be closed before all is sent
        assert_refused(server.http.post("/v1/chat/completions", content=in_parts(), headers=headers), 413)


def test_a_body_that_does_not_come():
    with running(body_timeout=0.2) as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        connection.settimeout(PATIENCE)
        assert b" 408 " in connection.recv(1000)
        server.settled()


def test_a_body_that_breaks_off_is_nobodys_error(server, caplog):
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    before = server.metric("visipruner:request_errors_total", '"499"')
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode())
    wait_for(lambda: server.metric("visipruner:request_errors_total", '"499"') > before)
    assert not caplog.records


def test_a_flood_of_headers(server):
    for flood in ("X: a\r\n" * 100_000, f"X: {'a' * 1_000_000}\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(PATIENCE)
            with suppress(ConnectionError):  # hung up before all was sent
                connection.sendall(f"GET /health HTTP/1.1\r\nHost: a\r\n{flood}\r\n".encode())
                assert b" 200 " not in connection.recv(1000)
    assert server.ask().choices


def test_no_http_at_all(server):
    for garbage in (b"\x00" * 1000 + b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(PATIENCE)
            connection.recv(1000)
    assert server.ask().choices


# -- pictures by URL -------------------------------------------------------------------------------------------------


@contextmanager
def picture_host(respond) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}/a.png"
        host.shutdown()


def test_a_picture_by_url_where_that_is_allowed():
    def respond(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(IMAGES[0].read_bytes())

    with picture_host(respond) as url:
        with running(defaults=Defaults(config_of("shipped"), picture_urls="any")) as server:
            answer = server.ask(with_pictures("What is this?", url))
            assert answer.choices[0].message.content == expected("What is this?", 0).text
        with running(defaults=Defaults(picture_urls="off")) as server:
            assert "not downloaded" in assert_refused(server.post(messages=with_pictures("What is this?", url)))


def test_a_redirect_does_not_lead_inside(server, monkeypatch):
    """The first address passes for a public one; what it points to does not."""
    import llava.images

    inside: list[str] = []

    def respond(handler) -> None:
        inside.append(handler.path)
        handler.send_response(302)
        handler.send_header("Location", f"http://localhost:{handler.server.server_port}/secret")
        handler.end_headers()

    plain = llava.images._is_public
    calls = iter([True])
    monkeypatch.setattr(llava.images, "_is_public", lambda address: next(calls, None) or plain(address))
    with picture_host(respond) as url:
        assert "public" in assert_refused(server.post(messages=with_pictures("What is this?", url)))
    assert inside == ["/a.png"]


def test_a_redirect_does_not_lead_to_a_file():
    def respond(handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "file:///etc/passwd")
        handler.end_headers()

    with picture_host(respond) as url, running(defaults=Defaults(picture_urls="any")) as server:
        assert_refused(server.post(messages=with_pictures("What is this?", url)))


def test_pictures_that_do_not_come_hold_up_nobody_else(monkeypatch):
    monkeypatch.setattr("llava.serving.protocol.DOWNLOAD_SECONDS", 1.0)
    over, asked = threading.Event(), []

    def respond(handler) -> None:
        asked.append(handler.path)
        over.wait(PATIENCE)

    with picture_host(respond) as url, running(defaults=Defaults(picture_urls="any")) as server:
        answers = []
        slow = with_pictures("What is this?", *[url] * 3)
        threads = [threading.Thread(target=lambda: answers.append(server.post(messages=slow))) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: asked)
        picture_here = with_pictures("What is this?", data_url(IMAGES[0]))
        assert server.post(messages=picture_here).status_code == 200
        assert len(answers) < 8
        for thread in threads:
            thread.join()
        over.set()
        assert all("within" in assert_refused(answer) for answer in answers)


# -- clients and servers that leave ----------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_is_not_answered_on(server, endless):
    stream = server.ask(max_tokens=100_000, stream=True)
    next(iter(stream))
    while not server.scheduler.load.running:  # its first token is on the way before it counts
        time.sleep(0.001)
    stream.close()
    server.settled()


def test_a_client_that_leaves_before_its_answer(server, endless):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "tiny", "messages": PROMPT, "max_tokens": 100_000},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=0.3,
        )
    server.settled()


def test_a_client_that_leaves_while_it_waits(endless):
    with running(Limits(max_running=1)) as server:
        stream = server.ask(max_tokens=100_000, stream=True)
        next(iter(stream))
        body = json.dumps({"model": "tiny", "messages": PROMPT}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: server.scheduler.load.waiting == 1)
        wait_for(lambda: server.scheduler.load.waiting == 0)
        assert server.scheduler.load.running == 1
        stream.close()
        server.settled()


def test_a_full_queue_says_when_to_come_again(endless):
    with running(Limits(max_running=1, max_waiting=1)) as server:
        streams = [server.ask(max_tokens=100_000, stream=True)]
        next(iter(streams[0]))
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(server.post(max_tokens=3)))
        waiting.start()
        while not server.scheduler.load.waiting:
            time.sleep(0.01)
        refused = server.post()
        assert_refused(refused, 429)
        assert int(refused.headers["retry-after"]) > 0
        with pytest.raises(openai.RateLimitError):
            server.ask()
        streams[0].close()
        waiting.join()
        assert answers[0].status_code == 200
        server.settled()


def test_pictures_that_wait_are_bounded(endless):
    messages = with_pictures("What is this?", data_url(IMAGES[0]))
    with running(max_held_pixels=1000) as server:
        stream = server.ask(messages, max_tokens=100_000, stream=True)  # the first goes in any case
        next(iter(stream))
        assert "pictures" in assert_refused(server.post(messages=messages), 429)
        assert server.post().status_code == 200  # without a picture
        stream.close()
        server.settled()
        for _ in range(3):
            assert server.post(messages=messages).status_code == 200
        server.settled()


def test_pixels_are_counted_over_all_pictures_of_a_request():
    side = Image.open(IMAGES[0]).size
    with running(defaults=Defaults(max_pixels=int(1.5 * side[0] * side[1]))) as server:
        urls = [data_url(IMAGES[0])] * 2
        assert server.post(messages=with_pictures("What is this?", urls[0])).status_code == 200
        assert "pixels" in assert_refused(server.post(messages=with_pictures("What is this?", *urls)))


def test_a_request_that_takes_too_long(endless):
    with running(defaults=Defaults(timeout=0.2)) as server:
        assert "0.2 seconds" in assert_refused(server.post(max_tokens=100_000), 504)
        with pytest.raises(openai.APIError, match=r"0\.2 seconds"):
            list(server.ask(max_tokens=100_000, stream=True))
        server.settled()


def test_an_error_inside_one_request_fails_that_request_alone(server, monkeypatch):
    plain = server.scheduler._engine.prefill

    def prefill(requests):
        if any(request.options.max_new_tokens == 7 for request in requests):
            raise RuntimeError("secret of the machine")
        return plain(requests)

    monkeypatch.setattr(server.scheduler._engine, "prefill", prefill)
    answers: dict[int, httpx.Response] = {}

    def ask(tokens: int) -> None:
        answers[tokens] = server.post(max_tokens=tokens)

    threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in range(5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "secret" not in assert_refused(answers.pop(7), 500)
    assert all(answer.status_code == 200 for answer in answers.values())


def test_the_death_of_the_worker_shows_everywhere(endless, monkeypatch):
    with running(Limits(max_running=1)) as server:
        stream = server.ask(max_tokens=100_000, stream=True)
        next(iter(stream))
        answers: list[httpx.Response] = []
        waiting = [threading.Thread(target=lambda: answers.append(server.post())) for _ in range(3)]
        for thread in waiting:
            thread.start()
        wait_for(lambda: server.scheduler.load.waiting == 3)

        def die() -> None:
            raise SystemError("gone")

        monkeypatch.setattr(server.scheduler, "_turn", die)
        with pytest.raises(openai.APIError, match="not running"):
            list(stream)
        for thread in waiting:
            thread.join()
        assert len(answers) == 3
        for answer in answers:
            assert_refused(answer, 503)
        assert server.scheduler.load.kv_held_bytes == 0
        assert_refused(server.http.get("/health"), 503)
        assert_refused(server.post(), 503)


# -- as a program ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def program(*options: str, port: int | None = None, **variables: str) -> Iterator[tuple[subprocess.Popen, str]]:
    port = port or free_port()
    command = [sys.executable, "-m", "llava.serve.api", "--device", "cpu", "--port", str(port), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client() as client:
            while True:
                assert process.poll() is None, process.stderr.read()
                try:
                    if client.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def never_ending(tmp_path) -> Path:
    """The shipped model with an end token that it never says."""
    folder = tmp_path / "never-ending"
    shutil.copytree(SHIPPED_MODEL_PATH, folder)
    settings = {"eos_token_id": shipped().model.config.vocab_size - 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def read_stream(url: str, tokens: int, found: list) -> None:
    body = {"model": "never-ending", "messages": PROMPT, "max_tokens": tokens, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
            if answer.status_code != 200:
                found.append(json.loads(answer.read())["error"]["code"])
                return
            for line in answer.iter_lines():
                found.append(line)
    except httpx.TransportError as error:
        found.append(error)


def started(url: str, tokens: int) -> tuple[threading.Thread, list]:
    found: list = []
    reader = threading.Thread(target=read_stream, args=(url, tokens, found))
    reader.start()
    return reader, found


def wait_for(condition) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sigterm_lets_running_answers_end_and_refuses_waiting_ones(never_ending):
    with program("--model-path", str(never_ending), "--max-running", "1") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        assert client.chat.completions.create(model="never-ending", messages=PROMPT, max_tokens=3).choices
        client.close()
        running_reader, running_lines = started(url, 300)
        wait_for(lambda: running_lines)
        waiting_reader, waiting_lines = started(url, 300)
        waits = 'num_requests_waiting{model_name="never-ending"} 1.0'
        # On a machine that stands still at the wrong moment the first is over before the second has come.
        with httpx.Client(base_url=url, timeout=PATIENCE) as http:
            wait_for(lambda: waiting_lines or waits in http.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        running_reader.join()
        waiting_reader.join()
        done = ["data: [DONE]", ""]
        assert running_lines[-2:] == done
        assert waiting_lines == ["shutting_down"] or waiting_lines[-2:] == done
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.stderr.read()


def test_sigkill_breaks_streams_and_leaves_nothing(never_ending, tmp_path):
    """No process, no file, no port: the server that is started in its place answers at once."""
    port, temporary = free_port(), tmp_path / "temporary"
    temporary.mkdir()
    start = ("--model-path", str(never_ending))
    with program(*start, port=port, TMPDIR=str(temporary)) as (process, url):
        reader, lines = started(url, 1000)
        wait_for(lambda: lines)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        reader.join()
        assert isinstance(lines[-1], httpx.TransportError)  # and not a stream that seems whole
        assert not any(child.is_running() for child in children)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert not list(temporary.iterdir())
    with program(*start, port=port) as (_, url):
        reader, lines = started(url, 3)
        reader.join()
        assert lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model-path", "/nowhere"], "nowhere"),
        (["--pruning-config", '{"method": "fastvv"}'], "fastvv"),
        (["--max-running", "0"], "max_running is 0"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--max-pixels", "0"], "--max-pixels is 0"),
        (["--max-body-mb", "nan"], "--max-body-mb is nan"),
        (["--kv-memory", "inf"], "--kv-memory is inf"),
        (["--port", "70000"], "cannot listen on 127.0.0.1:70000"),
        (["--host", "no-such-host.invalid"], "cannot listen on no-such-host.invalid"),
    ],
)
def test_bad_options_are_one_line(options, says, capsys):
    from llava.serve import api
    from llava.utils import run_main

    with pytest.raises(SystemExit) as ended:
        run_main(lambda: api.main(options))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and "\n" not in error
