"""Load test of a running server with OpenAI's own client: dense and pruned, one at a time and batched, in turns.

The server is a process of its own (`llava.serving`, weights random, decisions forced, answers of exactly `--tokens`
tokens) that answers at several addresses with the same weights: one request at a time, and batched. A closed loop keeps
`--concurrency` requests on the way; with `--rates` an open loop sends so many a second, whether answers come or not.
Vision tower, picture processing, HTTP and tokenizer are in every figure.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava.inference import LlavaCheckpoint, LoadedModel, LoadOptions
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.serving import Limits, Scheduler

from .report import DTYPES, Report, Setting, parser
from .shapes import CLIP_TINY, Shape
from .timing import Timings

NAME = "random"
MAX_RUNNING = 16
"""Answers that are written together, unless a closed loop says how many."""


def variants(budgets: list[int]) -> dict[str, tuple[str, bool]]:
    """For each variant's name, in the table's order, the server's address and whether requests are pruned."""
    return {
        f"{kind}, {way}": (way, kind == "pruned")
        for kind in ("dense", "pruned")
        for way in ("one at a time", *batched(budgets))
    }


def batched(budgets: list[int]) -> dict[str, int]:
    """The batched servers and their row budgets; one says so in its name where there are several."""
    return {"batched" if len(budgets) == 1 else f"batched by {rows} rows": rows for rows in budgets}


# -- the server ------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, shape: Shape, tower: dict[str, int]) -> None:
    """A LLaVA checkpoint without weights: words for a tokenizer, and a tower of 24 x 24 patches."""
    decoder = shape.decoder_config().to_dict()
    config = {
        key: decoder[key] for key in decoder if key not in ("architectures", "model_type", "transformers_version")
    }
    config |= {
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "inside",
        "mm_hidden_size": tower["hidden_size"],
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "conv_mode": "vicuna_v1",
        "vision_config": {"model_type": "clip_vision_model", **tower},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    side = tower["image_size"]
    image_processor = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor), encoding="utf-8")
    words = {f"w{number}": number for number in range(shape.vocab)}
    for number, mark in enumerate(("<unk>", "<s>", "</s>")):
        del words[f"w{number}"]
        words[mark] = number
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


class RandomCheckpoint(LlavaCheckpoint):
    """A checkpoint whose weights are drawn when they are asked for, and whose answers no token ends."""

    def load(self, options: LoadOptions) -> tuple[Any, Any]:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[options.dtype or "float32"])
        try:
            with torch.device(options.device or "cpu"):
                model = LlavaLlamaForCausalLM(LlavaConfig.from_pretrained(self.folder)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return self.tokenizer, model


def serve(arguments: argparse.Namespace) -> None:
    """Answer at a socket for each way until killed; prints their ports."""
    import uvicorn

    from llava.serving.app import ServerSettings, build_app
    from llava.serving.protocol import Defaults

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    checkpoint = RandomCheckpoint(arguments.serve)
    model = LoadedModel(checkpoint, LoadOptions(arguments.device, arguments.dtype or "float32"))
    ports = {}
    settings = ServerSettings(NAME, defaults=Defaults(timeout=36_000))
    ways = {"one at a time": Limits(1, 4096, 1)}
    running = max(arguments.concurrency, default=MAX_RUNNING)
    ways |= {way: Limits(running, 4096, rows) for way, rows in batched(arguments.prefill_rows).items()}
    for way, limits in ways.items():
        app = build_app(Scheduler(model, limits), settings)
        listening = socket.create_server(("127.0.0.1", 0))
        ports[way] = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    print(json.dumps(ports), flush=True)
    threading.Event().wait()


@contextmanager
def running(setting: Setting, given: list[str]) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """The server's process, and its addresses."""
    arguments = setting.arguments
    tower = CLIP_TINY if arguments.tiny_tower else setting.shape.tower
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), setting.shape, {**tower, "projection_dim": tower["hidden_size"]})
        command = [sys.executable, "-m", "benchmarks.serving", *given, "--serve", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ports = json.loads(process.stdout.readline())
            yield psutil.Process(process.pid), {way: f"http://127.0.0.1:{port}" for way, port in ports.items()}
        finally:
            process.kill()
            process.wait()


# -- the clients -----------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Requests of one variant and load, all turns together.

    Attributes:
        wall, cpu: seconds of each turn, by the clock and of the server's processor time.
        requests: in each turn.
        first, between, whole: seconds to each first token, between tokens, and to each last token.
        kv_bytes, memory: the most that was used for keys and values, and by the server's process.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    requests: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    kv_bytes: float = 0
    memory: float = 0

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for clock, seconds in (("wall", self.wall), ("cpu", self.cpu)):
            row[f"requests_per_{clock}_s"] = self.requests / float(np.median(seconds))
        for name, values in (("first_token", self.first), ("between_tokens", self.between)):
            median, p95 = np.percentile(values, [50, 95])
            row |= {f"{name}_median_s": float(median), f"{name}_p95_s": float(p95)}
        row["between_tokens_max_s"] = max(self.between)
        return row | {"kv_peak_MB": self.kv_bytes / 1e6, "memory_peak_MB": self.memory / 1e6}


def picture_url(number: int) -> str:
    """A picture unlike the others, small on the wire."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((336, 336)).save(stream, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


class Load:
    """Requests of one kind against one server."""

    def __init__(self, setting: Setting, url: str, process: psutil.Process, pruned: bool) -> None:
        self.url, self.process = url, process
        arguments = setting.arguments
        self.tokens, self.text = arguments.tokens, arguments.text
        method = setting.schedule.method()
        self.pruning = method.to_dict() if pruned else False
        self._number = 0

    async def ask(self, client: openai.AsyncOpenAI, measured: Measured) -> None:
        self._number += 1
        random = np.random.default_rng(self._number)
        question = " ".join(f"w{word}" for word in random.integers(100, 400, self.text))
        parts = [
            {"type": "image_url", "image_url": {"url": picture_url(self._number % 16)}},
            {"type": "text", "text": question},
        ]
        begin = time.perf_counter()
        times = []
        stream = await client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
            max_tokens=self.tokens,
            stream=True,
            extra_body={"pruning": self.pruning},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
        measured.first.append(times[0] - begin)
        measured.between += np.diff(times).tolist()
        measured.whole.append(times[-1] - begin)

    async def run(self, measured: Measured, count: int, concurrency: int | None, rate: float | None) -> None:
        """One turn of `count` requests, `concurrency` of them on the way, or `rate` a second."""
        over = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=36_000) as client:
            watching = asyncio.ensure_future(self._watch(measured, over))
            cpu, wall = self._cpu(), time.perf_counter()
            if rate is None:
                left = iter(range(count))

                async def person() -> None:
                    for _ in left:
                        await self.ask(client, measured)

                await asyncio.gather(*(person() for _ in range(concurrency or 1)))
            else:
                random = np.random.default_rng(0)
                asked = []
                for _ in range(count):
                    asked.append(asyncio.ensure_future(self.ask(client, measured)))
                    await asyncio.sleep(random.exponential(1 / rate))
                await asyncio.gather(*asked)
            measured.wall.append(time.perf_counter() - wall)
            measured.cpu.append(self._cpu() - cpu)
            measured.requests = count
            over.set()
            await watching

    def _cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    async def _watch(self, measured: Measured, over: asyncio.Event) -> None:
        async with httpx.AsyncClient() as client:
            while not over.is_set():
                text = (await client.get(f"{self.url}/metrics", timeout=600)).text
                (line,) = (line for line in text.splitlines() if line.startswith("visipruner:kv_used_bytes{"))
                measured.kv_bytes = max(measured.kv_bytes, float(line.rpartition(" ")[2]))
                measured.memory = max(measured.memory, self.process.memory_info().rss)
                try:
                    await asyncio.wait_for(over.wait(), 0.5)
                except asyncio.TimeoutError:
                    continue


# -- the comparison --------------------------------------------------------------------------------------------------


def run(setting: Setting, given: list[str]) -> Report:
    arguments = setting.arguments
    arguments.batch = max(arguments.concurrency, default=MAX_RUNNING)  # names the files
    about = "budgets" if len(arguments.prefill_rows) > 1 else "" if arguments.concurrency else "open"
    report = Report("serving", setting, about)
    known = variants(arguments.prefill_rows)
    names = arguments.variants or list(known)
    loads: list[tuple[str, int | None, float | None]] = [
        (f"closed loop, {concurrency} at a time", concurrency, None) for concurrency in arguments.concurrency
    ]
    loads += [(f"open loop, {rate:g} requests/s", None, rate) for rate in arguments.rates]
    measured = {(title, name): Measured() for title, _, _ in loads for name in names}
    with running(setting, given) as (process, urls):
        asking = {name: Load(setting, urls[known[name][0]], process, known[name][1]) for name in names}
        for name in names:
            asyncio.run(asking[name].run(Measured(), arguments.warmup, 1, None))
        for turn in range(arguments.repetitions):
            for title, concurrency, rate in loads:
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    count = max(arguments.requests, concurrency or 1)
                    asyncio.run(asking[name].run(measured[title, name], count, concurrency, rate))
                    print(f"{turn + 1}/{arguments.repetitions} {title}: {name}", file=sys.stderr, flush=True)
    for title, _, _ in loads:
        rows = {name: {"variant": name, **measured[title, name].row()} for name in names}
        report.tables[title] = list(rows.values())
        for clock in setting.clocks:
            key = f"requests_per_{clock}_s"
            for over in names[:-1]:
                report.facts[f"{title}: {names[-1]} / {over} ({clock})"] = rows[names[-1]][key] / rows[over][key]
        turns = {name: measured[title, name] for name in names}
        report.timings[title] = Timings(
            {name: each.wall for name, each in turns.items()}, {name: each.cpu for name, each in turns.items()}
        )
    return report


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(repetitions=3, warmup=1)
    add = arguments.add_argument
    add("--concurrency", type=int, nargs="*", default=[1, 4, 8, 16], help="requests on the way, closed loop")
    add("--rates", type=float, nargs="*", default=[], help="requests a second, open loop")
    add("--requests", type=int, default=16, help="in a turn, at least as many as are on the way")
    add("--tokens", type=int, default=64, help="new tokens of each answer")
    add("--prefill-rows", type=int, nargs="+", default=[2048], help="row budgets of prefills; one batched server each")
    add("--tiny-tower", action="store_true", help="a vision tower that takes no time")
    add("--serve", type=Path, default=None, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if argv is None else argv)
    parsed = arguments.parse_args(given)
    if parsed.serve is not None:
        serve(parsed)
        return
    run(Setting(parsed), given).finish()


if __name__ == "__main__":
    main()
