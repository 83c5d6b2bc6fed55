"""Questions and requests on a local Ray: the answers of one process, whatever dies meanwhile.

Ray is large, so it lives in an environment of its own: `make test-ray` makes it and runs these there
(`RAY_PYTHON=FOLDER/bin/python pytest tests/test_ray.py` with one that is there).
"""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import openai
import psutil
import pytest
from eval_helpers import arguments, environment, read_lines, run, without_ids, write_benchmark, write_lines, write_model
from serving_helpers import CONFIGS, IMAGES, QUESTIONS, alone, config_of, picture, shipped

from llava.integrations import ray as ours
from llava.utils import UserError

PYTHON = os.environ.get("RAY_PYTHON") or (sys.executable if find_spec("ray") else None)
needs_ray = pytest.mark.skipif(PYTHON is None, reason="Ray is not installed and RAY_PYTHON names no Python that has it")
REPOSITORY = Path(__file__).parent.parent
KEY = "sk-right"


def on_ray(program: str, *argv) -> list[str]:
    return [str(PYTHON), "-m", "llava.integrations.ray", program, *map(str, argv)]


def in_environment() -> dict[str, str]:
    return {**environment(), "PYTHONPATH": str(REPOSITORY)}


def workers(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    """Ray's processes of a kind below one that we started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [each for each in below if any(name in part for part in each.cmdline()[:1])]


def until(condition: Callable, process: subprocess.Popen, seconds: float = 240):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)
    return value


# -- a question file -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llava-tiny")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("ray") / "bench", count=100)


@pytest.fixture(scope="module")
def one_process(model, bench, tmp_path_factory) -> tuple[Path, Path]:
    """Answers and traces of `llava.eval.model_vqa_loader`."""
    folder = tmp_path_factory.mktemp("one")
    argv = arguments(model, bench, folder / "answers.jsonl", "--trace-file", folder / "traces.jsonl")
    done = run([sys.executable, "-m", "llava.eval.model_vqa_loader", *argv])
    assert done.returncode == 0, done.stderr
    return folder / "answers.jsonl", folder / "traces.jsonl"


@contextmanager
def answering(*argv) -> Iterator[subprocess.Popen]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(on_ray("answer", *argv), env=in_environment(), cwd=REPOSITORY, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@needs_ray
def test_the_answer_file_of_one_process(model, bench, one_process, tmp_path) -> None:
    answers, traces = tmp_path / "answers.jsonl", tmp_path / "traces.jsonl"
    argv = arguments(model, bench, answers, "--trace-file", traces)
    # Begun by one process, gone on with by Ray: it is the same run.
    assert run([sys.executable, "-m", "llava.eval.model_vqa_loader", *argv, "--limit", "15"]).returncode == 0
    done = subprocess.run(
        on_ray("answer", *argv, "--actors", 2), env=in_environment(), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "15 are there already" in done.stdout
    assert without_ids(answers) == without_ids(one_process[0])
    assert traces.read_bytes() == one_process[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl", "answers.jsonl.run.json", "traces.jsonl"
    ]  # fmt: skip


@needs_ray
def test_a_killed_actor_is_replaced(model, bench, one_process, tmp_path) -> None:
    answers = tmp_path / "answers.jsonl"
    with answering(*arguments(model, bench, answers, "--actors", 2)) as process:
        until(lambda: lines_of(answers) >= 4, process)
        victim, *_ = workers(process, "ray::MapWorker")
        victim.suspend()  # so that it certainly has work when it dies
        assert lines_of(answers) < 90
        victim.kill()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "100 of 100 answers" in out
    assert without_ids(answers) == without_ids(one_process[0])
    ids = [line["answer_id"] for line in read_lines(answers)]
    assert len({each.partition("-")[0] for each in ids}) == len(ids) == 100


@needs_ray
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on(model, bench, one_process, tmp_path, how) -> None:
    answers = tmp_path / "answers.jsonl"
    argv = arguments(model, bench, answers)
    with answering(*argv) as process:
        until(lambda: lines_of(answers) >= 4, process)
        rays = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        _, err = process.communicate(timeout=300)
        if how is signal.SIGTERM:
            assert process.returncode == 130 and "llava.integrations.ray answer" in err
    assert 4 <= lines_of(answers) < 100
    assert not psutil.wait_procs(rays, timeout=180)[1], "Ray ends with the program"
    kept = answers.read_bytes()
    with answering(*argv) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "are there already" in out
    assert without_ids(answers) == without_ids(one_process[0])
    assert set(kept.split(b"\n")[:-1]) <= set(answers.read_bytes().split(b"\n")), "nothing was asked again"


@needs_ray
def test_a_question_that_cannot_be_asked(model, bench, tmp_path) -> None:
    broken = write_benchmark(tmp_path / "broken")
    questions = read_lines(broken / "questions.jsonl")
    questions[1]["image"] = "nowhere.png"
    write_lines(broken / "questions.jsonl", questions)
    with answering(*arguments(model, broken, tmp_path / "answers.jsonl")) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "line 2 (id0)" in err and "nowhere.png" in err and "11 of 12 answers" in out


POISON = """
import os, sys
from llava.eval.questions import Question
from llava.integrations import ray as ours
from llava.utils import run_main

class Poisoned(ours._Actor):
    def __call__(self, block):
        if any(b"id3" in question for question in block["question"]):
            os._exit(1)
        return super().__call__(block)

ours._Actor = Poisoned
run_main(lambda: ours.main(sys.argv[1:]))
"""


@needs_ray
def test_a_question_that_kills_every_actor_ends_the_run(model, tmp_path) -> None:
    bench = write_benchmark(tmp_path / "bench")
    argv = arguments(model, bench, tmp_path / "answers.jsonl")
    command = [str(PYTHON), "-c", POISON, "answer", *argv]
    done = subprocess.run(command, env=in_environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: an actor died 4 times over the same questions"), done.stderr


# -- requests --------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*argv) -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = on_ray("serve", "--device", "cpu", "--port", port, "--kv-memory", 1, *argv)
    process = subprocess.Popen(command, env=in_environment(), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if f"http://127.0.0.1:{port}/v1" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=120)


def messages(question: str, *numbers: int) -> list[dict]:
    urls = [f"data:image/png;base64,{base64.b64encode(IMAGES[number].read_bytes()).decode()}" for number in numbers]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def expected(question: str, number: int, config) -> str:
    from llava.inference import GenerationOptions, Turn
    from llava.serving import Request

    prompt = shipped().checkpoint.encode([Turn(question, [picture(number)])])
    return alone(Request(prompt, config_of(config), GenerationOptions(8))).text


@needs_ray
def test_replicas_answer_openais_client(tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with serving("--served-model-name", "tiny", "--api-key-file", keys, "--max-replicas", 2) as (process, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
        assert [model.id for model in client.models.list()] == ["tiny"]

        # Many at once, each with its own picture and config: the answers alone.
        source = random.Random(0)
        asked = [
            (source.choice(QUESTIONS), source.randrange(len(IMAGES)), source.choice(CONFIGS[2:])) for _ in range(16)
        ]

        def ask(question: str, number: int, config) -> str:
            completion = client.chat.completions.create(
                model="tiny", messages=messages(question, number), max_tokens=8, extra_body={"pruning": config}
            )
            assert completion.usage.kept_visual_tokens <= completion.usage.visual_tokens
            return completion.choices[0].message.content

        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(lambda each: ask(*each), asked))
        assert [text.strip() for text in texts] == [expected(*each) for each in asked]

        stream = client.chat.completions.create(
            model="tiny",
            messages=messages(QUESTIONS[0], 0),
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = stream
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text.strip() == expected(QUESTIONS[0], 0, "shipped") and last.usage.visual_tokens > 0

        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="layer"):
            ask(QUESTIONS[0], 0, {"method": "vtw", "layer": 99})

        below = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        open_to = {
            connection.laddr.ip.removeprefix("::ffff:")
            for each in below
            for connection in each.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert open_to == {"127.0.0.1"}

        # A replica that is killed is replaced.
        (replica,) = workers(process, "ray::ServeReplica")
        replica.kill()

        def answers() -> bool:
            try:
                return ask(QUESTIONS[0], 0, {"method": "vtw", "layer": 6}) != ""
            except openai.APIError:
                return False

        until(answers, process)
        assert [each.pid for each in workers(process, "ray::ServeReplica")] != [replica.pid]
        process.terminate()
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert not psutil.wait_procs(below, timeout=180)[1], "Ray ends with the program"


# -- without Ray -----------------------------------------------------------------------------------------------------


def test_without_ray_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray needs the extra 'ray' \(ray is missing\): "), ours._ray(None):  # fmt: skip  # noqa: E501
        pass


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--replicas", "0"], "1 <= replicas <= max"),
        (["--replicas", "3", "--max-replicas", "2"], "1 <= replicas <= max"),
        (["--target-requests", "0"], "--target-requests is 0"),
        (["--device", "cpu", "--cpus-per-replica", "0"], "more than 0 CPUs"),
        (["--device", "cpu", "--gpus-per-replica", "1"], "exclude each other"),
        (["--pruning-config", '{"mode": ["deep"], "mid_deep_layer": 99}'], "mid_deep_layer"),
    ],
)
def test_mistakes_are_found_before_ray_starts(argv, words, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=words):
        ours.main(["serve", *argv])


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            ours.main(["serve", "--port", str(port)])
