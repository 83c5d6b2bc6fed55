"""The command `visipruner`, what goes wrong in any program, and what installs a package that is missing."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest
from PIL import Image

import llava
from llava import cli, extras
from llava.cli.commands import COMMANDS
from llava.constants import SHIPPED_MODEL_PATH
from llava.errors import exit_code_of, missing_extra
from llava.examples import FOLDER
from llava.integrations import ray
from llava.utils import to_json

ROOT = Path(__file__).parent.parent
ANSWERS = {"--model-path": SHIPPED_MODEL_PATH, "--image-folder": ".", "--answers-file": "new.jsonl"}
EVAL = ["eval", *(str(part) for pair in ANSWERS.items() for part in pair)]

# Program and arguments → what the one line says. What begins with "llava." is started with python -m.
BAD = {
    "nonsense": "there is no command 'nonsense'",
    "aks": "did you mean 'ask'?",
    "--no-such": "--no-such",
    "--print-completion fish": "'fish'",
    "chat --no-such": "--no-such",
    "chat --model-path nowhere --image-file picture.png --question x": "nowhere",
    "chat --example nope": "there is no example 'nope'; there are sign, ",
    "chat --dense --compare": "--dense and --compare exclude each other",
    "chat --image-file nowhere.png --question x": "'nowhere.png' does not exist",
    "ask --question x": "a question needs a picture",
    "ask --image-file nowhere.png --question x": "'nowhere.png' does not exist",
    "ask --image-file mine.txt --question x": "in none of the formats",
    "ask --image-file cut.png --question x": "cannot read",
    "ask --image-file . --question x": "is a folder",
    "ask --example sign --question \udcff": "is not utf-8 text",
    "ask --example sign --max-new-tokens 0": "max_new_tokens is 0",
    "ask --example sign --temperature hot": "invalid float value: 'hot'",
    "ask --example sign --pruning-config {": "not valid JSON",
    "ask --example sign --pruning-config @nowhere.json": "nowhere.json: cannot be read",
    "ask --example sign --pruning-config @mine.txt": "not valid JSON",
    'ask --example sign --pruning-config {"method":"fatsv"}': "did you mean 'fastv'?",
    'ask --example sign --pruning-config {"method":"fastv","layer":12}': "'layer' is 12",
    "ask --example sign --device tpu9": "'tpu9'",
    "ask --example sign --dtype int3": "'int3' is not supported",
    "ask --example sign --conv-mode v99": "unknown conversation template 'v99'",
    "ask --example sign --compare --show": "--compare and --show exclude each other",
    "web --port 0": "--port is 0",
    "web --server nowhere": "--server is 'nowhere'",
    "web --model-path nowhere": "nowhere",
    "web --pruning-config {": "not valid JSON",
    "report --question x -o new.html": "",
    "report --image nowhere.png --question x -o new.html": "'nowhere.png' does not exist",
    "report --image picture.png --question x -o .": "is a folder",
    "report --image picture.png --question x -o nowhere/new.html": "does not exist",
    "report --image picture.png --question x -o new.html --max-new-tokens 0": "--max-new-tokens is 0",
    "eval": "the following arguments are required",
    " ".join([*EVAL, "--question-file nowhere.jsonl"]): "nowhere.jsonl",
    " ".join([*EVAL, "--question-file empty.jsonl"]): "holds no questions",
    " ".join([*EVAL, "--question-file mine.txt"]): "mine.txt",
    " ".join([*EVAL, "--question-file questions.jsonl", "--answers-file mine.txt"]): "mine.txt",
    " ".join([*EVAL, "--question-file questions.jsonl", "--batch-size 0"]): "batch",
    "compare -o new": "either --benchmark or --question-file",
    "compare --benchmark nope -o new": "invalid choice: 'nope'",
    "compare --benchmark gqa --limit 0 -o new": "--limit is 0",
    "compare --benchmark gqa --method nope --tokens 8 -o new": "nope",
    "serve --dense --pruning-config {}": "exclude each other",
    "serve --api-key-file nowhere.txt": "nowhere.txt",
    "serve --max-running 0": "0",
    "serve --model-path nowhere": "nowhere",
    "calibrate --images nowhere --save-flops 0.3 -o new": "nowhere",
    "calibrate --images . --save-flops much -o new": "much",
    "calibrate --images . --save-flops 0.3 --pictures 1 -o new": "--pictures is 1",
    "train --model_name_or_path m --data_path d --no-such": "--no-such",
    "models --no-such": "--no-such",
    "methods --no-such": "--no-such",
    "methods nope": "unknown method 'nope'",
    "llava.eval.eval_gqa --no-such": "required",
    "llava.eval.eval_mme --no-such": "required",
    "llava.eval.eval_pope --no-such": "required",
    "llava.eval.eval_textvqa --no-such": "required",
    "llava.eval.benchmarks plan nope": "invalid choice: 'nope'",
    "llava.integrations.ray fly": "invalid choice: 'fly'",
    "llava.serve.cli --compare": "--compare",
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with files of all kinds, to which nothing may happen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    Image.new("RGB", (96, 96), "white").save("picture.png")
    Path("cut.png").write_bytes((FOLDER / "scene_2.png").read_bytes()[:300])
    Path("mine.txt").write_text("mine")
    Path("empty.jsonl").write_text("\n")
    Path("questions.jsonl").write_text('{"question_id": 1, "image": "picture.png", "text": "What is this?"}\n')
    return tmp_path


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_touches_nothing(line, here, capsys):
    program, *argv = line.split(" ")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    if program.startswith("llava."):
        main = importlib.import_module(program).main
        code = exit_code_of(lambda: main(argv), argv)
    else:
        code = cli.main([program, *argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[line] in err
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_an_error_is_json_where_json_was_asked_for(capsys):
    assert cli.main(["ask", "--question", "x", "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["kind"], error["exit_code"]) == ("bad_input", 2) and err == f"error: {error['message']}\n"


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


ERRORS = {
    "interrupted": (KeyboardInterrupt(), 130),
    "not UTF-8": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2),
    "nowhere: No such file": (FileNotFoundError(2, "No such file or directory", "nowhere"), 2),
    "ZeroDivisionError: by zero (--debug shows where)": (ZeroDivisionError("by\nzero"), 1),
    "prometheus_client is not installed: ": (ModuleNotFoundError("x", name="prometheus_client"), 2),
    "peft is not installed: ": (ModuleNotFoundError("x", name="peft.tuners"), 2),
}


@pytest.mark.parametrize("message", ERRORS)
def test_every_error_is_one_line(message, capsys):
    error, code = ERRORS[message]
    assert exit_code_of(raising(error), []) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message.replace("peft is", "peft.tuners is") in err
    assert exit_code_of(raising(error), ["--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == code


def test_a_reader_that_has_gone_is_no_error():
    command = [sys.executable, "-m", "llava.cli", "ask", "--examples"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


# --- the command ---


def test_help_and_version_do_not_wait_for_torch():
    script = (
        "import sys, contextlib\nfrom llava.cli import main\n"
        "for argv in (['--version'], ['--help'], ['ask', '--help'], ['serve', '--help'], ['ask', '--examples']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(argv)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"visipruner {llava.__version__}\n")
    assert all(f"\n  {name}" in done.stdout for name in COMMANDS)
    assert "usage: visipruner ask" in done.stdout and "usage: visipruner serve" in done.stdout
    assert all(example in done.stdout for example in COMMANDS["ask"].examples)


def test_every_example_begins_with_its_command():
    for name, command in COMMANDS.items():
        assert all(example.startswith(f"visipruner {name}") for example in command.examples) and command.examples


def test_methods_and_models_are_listed(capsys):
    assert cli.main(["methods", "fastv"]) == 0
    assert re.search(r"fastv: .*\n    layer +2 .*\n    keep +288 ", capsys.readouterr().out)
    assert cli.main(["methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)
    assert methods["visipruner"]["knobs"]["mode"]["needed"] and len(methods) > 20
    assert cli.main(["models", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert str(SHIPPED_MODEL_PATH) in models["shipped"] and "qwen3_vl" in models["families"] and models["refused"]


@pytest.mark.slow  # imports every program
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command_and_its_options(shell, capsys):
    assert cli.main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    for option in ("image-file", "answers-file", "api-key-file", "save-flops", "benchmark"):
        assert f"--{option}" in script


def test_an_example_is_shown_in_the_order_of_the_argument(here, capsys):
    assert cli.main(["ask", "--example", "sign", "--show"]) == 0
    out, err = capsys.readouterr()
    assert out == "6vm\n"
    parts = [
        "scene_2.png: What does the text",
        "42 of 144 patches kept",
        "█",
        "saved: kept 42",
        "at random",
        "speed: the clock tells little",
    ]
    places = [err.index(part) for part in parts]
    assert places == sorted(places) and "hint" not in err
    drawn = re.search(r"drawn at random, 3 times, answer: (.*)", err)[1].split(", ")
    assert len(drawn) == 3 and "6vm" not in drawn


# --- extras ---


class Project:
    """What importlib.metadata says of an installed project."""

    requires = (
        "torch>=2.6",
        'matplotlib>=3.8; extra == "viz"',
        'gradio>=6; extra == "web"',
        'llava-visipruner[viz]; extra == "web"',
        'gradio>=6; extra == "dev"',
    )

    def __init__(self, origin: dict | None) -> None:
        self.origin = origin
        self.metadata = Message()
        for extra in ("dev", "viz", "web"):
            self.metadata["Provides-Extra"] = extra

    def read_text(self, name: str) -> str | None:
        return json.dumps(self.origin) if self.origin and name == "direct_url.json" else None


def test_a_missing_extra_is_named_with_a_command_that_works_here(tmp_path, monkeypatch):
    wheel = tmp_path / "a folder" / "visipruner-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_text("")
    by_name = "'gradio>=6' 'matplotlib>=3.8'"
    for origin, expected in (
        ({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}, f"-e '{tmp_path}[web]'"),
        ({"url": tmp_path.as_uri(), "dir_info": {}}, f"'{tmp_path}[web]'"),
        ({"url": wheel.as_uri(), "archive_info": {}}, f"'{wheel}[web]'"),
        ({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}}, by_name),
        ({"url": "https://example.org/x.git", "vcs_info": {"vcs": "git"}},
         "'llava-visipruner[web] @ git+https://example.org/x.git'"),
        (None, by_name),
    ):  # fmt: skip
        monkeypatch.setattr(extras, "_project", lambda origin=origin: Project(origin))
        command = extras.install_command("web")
        assert command.endswith(f" install {expected}")
        assert str(missing_extra("web", "the page")) == f"the page needs the extra 'web': {command}"
    assert extras.missing_extra_of(ImportError(name="matplotlib.pyplot")) == "viz"
    assert extras.missing_extra_of(ImportError(name="numpy")) is None
    monkeypatch.setattr(extras, "_project", lambda: Project({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("viz").endswith(" install -e '.[viz]'")


def test_what_the_build_leaves_in_a_checkout_is_not_asked_where_it_came_from(tmp_path, monkeypatch):
    installed = Project({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    for found in ([Project(None), installed], [installed, Project(None)]):
        monkeypatch.setattr(extras, "distributions", lambda name, found=found: found)
        assert extras.install_command("web").endswith(f" install -e '{tmp_path}[web]'")


def test_the_project_that_runs_is_asked_for_its_extras():
    assert extras.missing_extra_of(ImportError(name="gradio")) == "web"
    assert extras.missing_extra_of(ImportError(name="bitsandbytes")) == "quant"


@pytest.mark.parametrize(("package", "argv"), [("uvicorn", ["serve"]), ("openai", ["web", "--server", "http://x"])])
def test_a_program_without_its_extra_says_what_to_type(package, argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert f"({package} is missing): " in err and " install " in err and err.count("\n") == 1


def test_ray_is_an_extra_too(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)

    def main() -> int:
        with ray._ray(None):
            return 0

    assert exit_code_of(main, []) == 2 and "Ray needs the extra 'ray'" in capsys.readouterr().err


# --- JSON ---


def test_json_reads_well():
    value = {"é": "中", "rows": [1, 2, 3], "deep": {"a": [[1, 2], []]}, 3: None, "empty": {}}
    written = to_json(value)
    assert json.loads(written) == json.loads(json.dumps(value))
    assert '"é": "中"' in written and '"rows": [1, 2, 3]' in written and "      [1, 2]," in written
