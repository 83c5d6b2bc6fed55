"""Every command and snippet of README and docs runs as written, or says in its page why it does not.

A block is run in a copy of the repository, with `visipruner` and `python` on the PATH, in the order of its page. An
HTML comment on the line above it says otherwise:

- ``<!-- not run: REASON -->``; its programs and their options must still exist;
- ``<!-- run: slowly -->``: kept for `make test-all`;
- ``<!-- run: with a server -->``: the same, while `visipruner serve` listens on port 8000;
- ``<!-- run: a server -->``: the same, each line started until it answers, then stopped.

Programs of the package run in this process where a line is nothing but their command; all else runs in bash.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_checkpoints import tiny_config, tiny_model, write_original
from tiny_stock import write_stock

from llava.pruning import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for weights that cannot be fetched here: a tiny random checkpoint of the same kind.
LLAVA, SMOLVLM = "liuhaotian/llava-v1.5-7b", "HuggingFaceTB/SmolVLM-256M-Instruct"
WEIGHTS = {LLAVA: "weights/llava-v1.5-7b", SMOLVLM: "weights/smolvlm"}
PORT = {"web": 7860, "serve": 8000, "gradio_pruning": 7860, "api": 8000}
# What a program does not know goes to another.
PASSES_ON = {"llava.integrations.ray": ["llava.serve.api"]}
TYPED = "How many shapes are there?\n"
MARKS = ("slowly", "with a server", "a server")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page, line: where its fence stands.
        language: bash or python.
        text: what is in it.
        mark: of `MARKS`, "not run", or "".
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Its command lines, those that go on in the next line joined, without comments."""
        commands: list[str] = []
        goes_on = ""
        for line in re.sub(r"\\\n\s*", "", self.text).splitlines():
            goes_on += line
            try:
                words = shlex.split(goes_on, comments=True)
            except ValueError:  # within quotes
                goes_on += "\n"
                continue
            commands += [goes_on] if words else []
            goes_on = ""
        return commands


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        assert not re.match(r"\s*```(sh|shell|console|py)\b", line), f"{page.name}:{number + 1}: say bash or python"
        if start is None and re.fullmatch(r"```(bash|python)", line):
            start = number
        elif start is not None and line == "```":
            above = lines[start - 1] if start else ""
            mark = re.fullmatch(r"<!-- (?:run: (.+)|(not run): \S.*) -->", above)
            assert mark or not above.startswith("<!--"), f"{page.name}:{start}: {above} is no mark that tests know"
            kind = (mark[1] or mark[2]) if mark else ""
            assert kind in ("", "not run", *MARKS), f"{page.name}:{start}: {kind!r} is no mark that tests know"
            text = "\n".join(lines[start + 1 : number])
            yield Block(page, start + 1, lines[start][3:], text, kind)
            start = None


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(page: Path, *marks: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and block.mark in marks]


def pages_with(*marks: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if of(page, *marks)]


# --- where they run ---


def copy_of_the_repository(folder: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # not a checkout
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "site", "runs"), dirs_exist_ok=True)
        return
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
            shutil.copymode(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """An installed clone: the files, and a .venv whose programs are this environment's."""
    folder = tmp_path_factory.mktemp("clone")
    copy_of_the_repository(folder)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, what in {"python": "", "visipruner": "-m llava.cli "}.items():
        (programs / name).write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" {what}"$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for stamp in ("torch", "installed", "installed-dev"):  # what make leaves when it has installed
        (folder / ".venv" / stamp).touch()
    write_original(folder / WEIGHTS[LLAVA], tiny_model(tiny_config(num_hidden_layers=8)))
    with contextlib.suppress(pytest.skip.Exception):
        write_stock(folder / WEIGHTS[SMOLVLM])
    return folder


@pytest.fixture
def here(clone, monkeypatch) -> Iterator[Path]:
    """The clone as the current folder."""
    monkeypatch.chdir(clone)
    monkeypatch.setenv("PATH", f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    methods, files = dict(METHODS), set(clone.iterdir())
    yield clone
    for made in set(clone.iterdir()) - files:  # a page does not find what another has left
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    METHODS.clear()  # of those that a page registers
    METHODS.update(methods)


def with_stand_ins(text: str) -> str:
    for name, folder in WEIGHTS.items():
        text = text.replace(name, folder)
    return text


def program(command: str) -> tuple[str, list[str]] | None:
    """Module of the package and arguments, where a line is one program's command and nothing else."""
    if re.search(r"[|<>;&$`]", re.sub(r"'[^']*'", "", command)):
        return None
    words = shlex.split(command, comments=True)
    if words and words[0] in ("visipruner", ".venv/bin/visipruner"):
        return "llava.cli", words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("llava."):
        return words[2], words[3:]
    return None


def run_here(module: str, arguments: list[str]) -> None:
    found = importlib.import_module(module)
    if not hasattr(found, "main"):
        found = importlib.import_module(f"{module}.__main__")
    try:
        # Of a chat's conversation a page says nothing, and a terminal there is none: one question, and it ends.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(TYPED if arguments[:1] == ["chat"] else ""))
            status = found.main(arguments) or 0
    except SystemExit as end:
        status = end.code or 0
    assert status == 0, f"{module} {shlex.join(arguments)} ended with {status}"


def run(block: Block) -> None:
    text = with_stand_ins(block.text)
    if block.language == "python":
        exec(compile(text, block.place, "exec"), {"__name__": "__main__"})
        return
    commands = [with_stand_ins(command) for command in block.commands()]
    if all(map(program, commands)):
        for command in commands:
            run_here(*program(command))
        return
    # Lines of bash stay together; the programs between them, if they are nothing else, save a start of Python.
    waiting: list[str] = []
    is_script = any(re.match(r"\s|for |while |if |done|\w+=", command) for command in commands)
    for command in commands:
        if is_script or not program(command):
            waiting.append(command)
            continue
        in_bash(waiting)
        waiting = []
        run_here(*program(command))
    in_bash(waiting)


def in_bash(commands: list[str]) -> None:
    if not commands:
        return
    script = ["bash", "-euo", "pipefail", "-c", "\n".join(commands)]
    done = subprocess.run(script, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{commands} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@contextlib.contextmanager
def serving(command: str, port: int) -> Iterator[None]:
    """A server that runs for the length of the block, from when it answers."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while True:
            assert process.poll() is None, f"{command} ended: {process.stderr.read().decode()[-2000:]}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()  # not by Ctrl-C, which whoever is started in the background may have been told to ignore
        try:
            process.wait(60)
        finally:
            process.kill()
            process.stderr.close()


def run_all(page: str, mark: str) -> None:
    """The blocks of a page with that mark, in its order."""
    for block in of(page, mark):
        try:
            run(block)
        except Exception as error:
            raise AssertionError(f"{block.place} does not run as written: {error}") from error


# --- the tests ---


@pytest.mark.parametrize("page", pages_with(""))
def test_every_block_of_the_page_runs(page, here):
    run_all(page, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("slowly"))
def test_every_slow_block_of_the_page_runs(page, here):
    run_all(page, "slowly")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("with a server"))
def test_what_asks_a_server_is_answered(page, here):
    with serving("visipruner serve", PORT["serve"]):
        for block in of(page, "with a server"):
            run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("a server"))
def test_every_server_of_the_page_starts(page, here):
    for block in of(page, "a server"):
        for command in block.commands():
            module, arguments = program(with_stand_ins(command))
            name = arguments[0] if module == "llava.cli" else module.rpartition(".")[2]
            with serving(with_stand_ins(command), PORT[name]):
                pass


def programs_not_run() -> list:
    return [
        pytest.param(command, id=f"{block.place} {number}")
        for block in BLOCKS
        if block.mark not in ("", "slowly")
        for number, command in enumerate(block.commands() if block.language == "bash" else [])
        if program(command) or re.match(r"(taskset -c \d+ )?python -m (llava|benchmarks)\.", command)
    ]


@pytest.mark.parametrize("command", programs_not_run())
def test_programs_that_are_not_run_have_the_options_that_are_named(command, here, capsys):
    """Their help names every one."""
    module, arguments = program(command) or (re.search(r"-m ([\w.]+)", command)[1], shlex.split(command))
    named = {word.partition("=")[0] for word in arguments if re.match(r"--\w", word)}
    if not named:
        return
    subcommand = arguments[:1] if arguments and re.fullmatch(r"[a-z]+", arguments[0]) else []
    for each in (module, *PASSES_ON.get(module, ())):
        if each.startswith("benchmarks"):
            with pytest.raises(SystemExit):
                importlib.import_module(each).main(["--help"])
        else:
            run_here(each, [*(subcommand if each == module else []), "--help"])
    unknown = named - set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert not unknown, f"{command} names {unknown}, which its help does not"


def test_every_example_runs(here, capsys):
    for example in sorted((ROOT / "examples").glob("*.py")):
        exec(compile(example.read_text(encoding="utf-8"), str(example), "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out, f"{example.name} prints nothing"
