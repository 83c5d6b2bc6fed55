"""The terminal chat: one answer, a whole conversation, and what it says about bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_checkpoints import VOCAB, tiny_config, tiny_model, write_original
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from visual_helpers import noise

from llava.images import load_image
from llava.inference import Answer, Clock, GenerationOptions, LoadedModel, Turn, checkpoint, open_checkpoint
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import METHODS, Cause, Decision, Keep, Method, PruningConfig, PruningTrace, register
from llava.serve import cli, cli_pruning, terminal
from llava.serve.chat import ChatSession
from llava.serve.describe import describe
from llava.serve.output import Stream, draw_kept
from llava.utils import clean_text
from llava.visualize.patches import PatchGrid, map_of_grids

LAYERS = 6
# Selects somewhere, keeps some tokens of a random model and drops others.
CONFIG = {"mode": ["middle", "deep"], "shallow_mid_layer": 1, "layer_threshold": 0.9999, "tokens_threshold": 0.3}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a word, so that whatever a random model says can be read."""
    words = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "this", "red", "and", "now", "\x1b[31mred"]
    vocab = {word: index for index, word in enumerate([*words, *(f"w{i}" for i in range(len(words), VOCAB))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    config = tiny_config(num_hidden_layers=LAYERS, max_position_embeddings=4096)
    model = tiny_model(config, seed=3)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # no end token: answers have the length that was asked for
    path = write_original(tmp_path_factory.mktemp("chat") / "tiny-llava", model)
    word_tokenizer().save_pretrained(path)
    (path / "pruning_config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    noise((40, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> LoadedModel:
    return LoadedModel(open_checkpoint(folder))


@pytest.fixture
def session(model, picture) -> ChatSession:
    session = ChatSession(model, model.checkpoint.pruning_config(), GenerationOptions(max_new_tokens=8))
    session.add_picture(picture)
    return session


def run(capsys, *argv: object, main=cli_pruning.main) -> tuple[int, str, str]:
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(folder: Path, prompt: str, pictures: list[Path], new_tokens: int, **kwargs) -> str:
    """The answer through the library alone."""
    tokenizer, model, processor, _ = load_pretrained_model(folder)
    images = [load_image(path) for path in pictures]
    ids = model.generate(
        tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
        images=process_images(images, processor, model.config),
        image_sizes=[image.size for image in images],
        max_new_tokens=new_tokens,
        do_sample=False,
        **kwargs,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True).strip()


# --- one answer ---


def test_one_shot_answers_as_the_library_does_and_says_what_was_pruned(capsys, folder, picture):
    ask = ("--model-path", folder, "--image-file", picture, "--question", "what is this", "--max-new-tokens", 8)
    prompt = f"{SYSTEM} USER: <image>\nwhat is this ASSISTANT:"
    code, out, err = run(capsys, *ask)
    expected = clean_text(generate(folder, prompt, [picture], 8, pruning_config=CONFIG))
    assert (code, out.split()) == (0, expected.split())
    line = err.strip()
    assert (
        line.startswith("[kept ")
        and "\n" not in line
        and "visual tokens, selected at layer" in line
        and "first token" in line
    )

    dense = clean_text(generate(folder, prompt, [picture], 8))
    for options in ({"main": cli.main}, {}):
        flags = () if options else ("--dense",)
        code, out, err = run(capsys, *ask, *flags, **options)
        assert (code, out.split()) == (0, dense.split())
        assert "[dense: all 4 visual tokens in every layer" in err


def test_json_is_one_object_that_agrees_with_the_trace(capsys, folder, picture):
    ask = ("--model-path", folder, "--image-file", picture, "--question", "what is this", "--max-new-tokens", 8)
    code, out, err = run(capsys, *ask, "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    trace = result["trace"]
    assert result["visual_tokens"] == len(trace["visual_positions"]) == 4
    assert result["kept_visual_tokens"] == len(trace["kept_positions"])
    assert result["select_layer"] == trace["select_layer"] is not None
    assert result["rows_per_layer"] == trace["rows_per_layer"] and len(trace["rows_per_layer"]) == LAYERS
    assert result["pruning_config"]["tokens_threshold"] == CONFIG["tokens_threshold"]
    assert (result["new_tokens"], result["finish"]) == (8, "length")
    assert 0 < result["time_to_first_token_s"] <= result["seconds"]
    # A saving is the share of the rows that layers after the selection no longer process.
    visual = [rows - (trace["num_rows"] - 4) for rows in trace["rows_per_layer"]]
    assert (result["flops_saved"]["paper"] > 0) == (sum(visual) < 4 * LAYERS)


def test_every_piped_line_is_a_question_of_its_own(capsys, folder, picture, monkeypatch):
    ask = ("--model-path", folder, "--image-file", picture, "--max-new-tokens", 2)

    def piped(text: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return run(capsys, *ask, *options)

    code, out, _ = piped("what is this\n", "--json")
    assert code == 0 and json.loads(out)["question"] == "what is this"
    code, out, err = piped("what is this\n\n red \n")
    alone = [run(capsys, *ask, "--question", question)[1] for question in ("what is this", "red")]
    assert (code, out) == (0, "".join(alone)) and err.count("[kept ") == 2
    code, out, _ = piped("what is this\nred\n", "--json")
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["what is this", "red"]
    code, out, err = piped("what is this\n/image a.png\n")
    assert (code, out) == (2, "") and "'/image a.png' is a command of the chat" in err


def test_compare_shows_both_answers(capsys, folder, picture):
    ask = ("--model-path", folder, "--image-file", picture, "--question", "what is this", "--max-new-tokens", 4)
    code, out, _ = run(capsys, *ask, "--compare", "--json")
    both = json.loads(out)
    prompt = f"{SYSTEM} USER: <image>\nwhat is this ASSISTANT:"
    assert code == 0
    assert both["dense"]["answer"] == generate(folder, prompt, [picture], 4)
    assert both["pruned"]["answer"] == generate(folder, prompt, [picture], 4, pruning_config=CONFIG)
    assert both["agree"] == (both["dense"]["answer"] == both["pruned"]["answer"])
    assert both["dense"]["trace"] is None and len(set(both["dense"]["rows_per_layer"])) == 1
    code, out, _ = run(capsys, *ask, "--compare")
    assert code == 0 and "rows per layer" in out and "time to first token" in out
    assert ("answers agree" if both["agree"] else "answers differ") in out


def test_beams_and_sampling_run(capsys, folder, picture):
    ask = ("--model-path", folder, "--image-file", picture, "--question", "what", "--max-new-tokens", 4)
    code, out, _ = run(capsys, *ask, "--num_beams", 3, "--json")
    prompt = f"{SYSTEM} USER: <image>\nwhat ASSISTANT:"
    assert code == 0
    assert json.loads(out)["answer"] == generate(folder, prompt, [picture], 4, pruning_config=CONFIG, num_beams=3)
    code, out, _ = run(capsys, *ask, "--temperature", 0.7, "--top_p", 0.9, "--json")
    assert code == 0 and json.loads(out)["new_tokens"] == 4


def test_debug_adds_the_trace(capsys, folder, picture):
    code, _, err = run(
        capsys, "--model-path", folder, "--image-file", picture, "--question", "what", "--max-new-tokens", 2, "--debug"
    )
    assert code == 0, err
    assert "selected here" in err and "kept positions" in err


# --- bad input ---

BAD = {
    "malformed JSON": (["--pruning-config", '{"mode": ['], "not valid JSON"),
    "unknown key": (["--pruning-config", '{"mode": [], "layers": 3}'], "unknown key 'layers'"),
    "threshold out of range": (
        ["--pruning-config", json.dumps({**CONFIG, "layer_threshold": 1.5})],
        "'layer_threshold' is 1.5; it must be a number between 0 and 1",
    ),
    "shallow_mid_layer ≥ layers": (
        ["--pruning-config", json.dumps({**CONFIG, "shallow_mid_layer": LAYERS})],
        f"'shallow_mid_layer' is {LAYERS}; it must be an integer from 1 to {LAYERS - 1}",
    ),
    "missing config file": (["--pruning-config", "@nowhere.json"], "nowhere.json"),
    "missing model folder": (["--model-path", "/nowhere/llava"], "model folder /nowhere/llava does not exist"),
    "missing image": (["--image-file", "nowhere.png"], "'nowhere.png' does not exist"),
    "unreachable URL": (["--image-file", "http://127.0.0.1:9/a.png"], "cannot download 'http://127.0.0.1:9/a.png'"),
    "URL of another kind": (["--image-file", "file:///etc/passwd"], "only http and https"),
    "prompt longer than the context": (["--question", "what " * 5000], "the model's context is 4,096"),
    "image token in the question": (["--question", "<image> and <image>"], "the question holds <image> 2 times"),
    "empty question": (["--question", "  "], "the question is empty"),
    "CUDA absent": (["--device", "cuda"], "torch sees no CUDA GPU"),
    "unknown device": (["--device", "tpu9"], "'tpu9'"),
    "unknown dtype": (["--dtype", "int8"], "'int8' is not supported"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0"),
    "top_p": (["--top_p", "1.5"], "top_p is 1.5"),
    "beams": (["--num_beams", "0"], "num_beams is 0"),
    "no new tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    "not a number": (["--max-new-tokens", "many"], "invalid int value: 'many'"),
    "unknown option": (["--pruning", "x", "--no-such"], "--no-such"),
    "unknown template": (["--conv-mode", "v99"], "unknown conversation template 'v99'"),
    "dense and config": (["--dense", "--pruning-config", "{}"], "exclude each other"),
    "dense and compare": (["--dense", "--compare"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_weights_are_read(capsys, folder, picture, monkeypatch, case):
    if case == "CUDA absent":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def read_weights(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "load_pretrained_model", read_weights)
    extra, message = BAD[case]
    code, out, err = run(capsys, "--model-path", folder, "--image-file", picture, "--question", "what is this", *extra)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_bad_pictures_are_found_before_weights_are_read(capsys, folder, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_pretrained_model", lambda *a, **k: pytest.fail("weights were read"))
    (tmp_path / "truncated.png").write_bytes(picture.read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name, message in (("truncated", "cannot read"), ("text", "in none of the formats"), ("large", "64,000,000")):
        code, _, err = run(
            capsys, "--model-path", folder, "--image-file", tmp_path / f"{name}.png", "--question", "what"
        )
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_checkpoint_with_missing_weights_is_refused(capsys, tmp_path, picture):
    broken = tiny_model(tiny_config(num_hidden_layers=LAYERS))
    del broken.model.layers[2].mlp.up_proj
    path = write_original(tmp_path / "broken", broken)
    code, _, err = run(capsys, "--model-path", path, "--image-file", picture, "--question", "what", "--dense")
    assert code == 2 and err.count("\n") == 1 and "model.layers.2.mlp.up_proj.weight" in err


def test_a_one_shot_needs_question_and_picture(capsys, folder, picture, monkeypatch):
    code, _, err = run(capsys, "--model-path", folder, "--question", "what is this")
    assert code == 2 and "--image-file" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = run(capsys, "--model-path", folder, "--image-file", picture)
    assert code == 2 and "the question is empty" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    code, _, err = run(capsys, "--model-path", folder, "--image-file", picture)
    assert code == 2 and "not utf-8 text" in err


def test_the_published_config_is_the_default_and_must_fit(capsys, tmp_path, picture):
    deep = write_original(tmp_path / "deep", tiny_model(tiny_config(num_hidden_layers=8)))
    assert open_checkpoint(deep).pruning_config().to_dict() == {
        "mode": ["shallow", "middle", "deep"],
        "shallow_mid_layer": 6,
        "layer_threshold": 0.995,
        "tokens_threshold": 0.2,
        "exit_threshold": 0.999,
        "exit_patience": 2,
    }
    flat = write_original(tmp_path / "flat", tiny_model())
    code, _, err = run(capsys, "--model-path", flat, "--image-file", picture, "--question", "what")
    assert code == 2 and "the published one does not fit" in err and "--dense" in err


def test_exit_code_and_single_line_of_the_real_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli_pruning", "--question", "x", "--image-file", "a.png"],
        cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# --- the conversation ---


def test_every_turn_prefills_the_whole_conversation(session, folder, picture, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (20, 50), "blue").save(other)
    first = session.ask("what is this")
    session.add_picture(other)
    second = session.ask("and now")
    third = session.ask("red")
    prompt = f"{SYSTEM} USER: <image>\nwhat is this ASSISTANT: {first.text}</s>USER: <image>\nand now ASSISTANT:"
    assert second.text == generate(folder, prompt, [picture, other], 8, pruning_config=CONFIG)
    prompt += f" {second.text}</s>USER: red ASSISTANT:"
    assert third.text == generate(folder, prompt, [picture, other], 8, pruning_config=CONFIG)
    assert [len(answer.trace.visual_positions) for answer in (first, second, third)] == [4, 8, 8]
    assert third.trace.rows_per_layer[0] == third.prompt_rows > second.prompt_rows > first.prompt_rows


def test_streamed_text_is_the_answer(session):
    pieces = []
    answer = session.ask("what is this", pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer.text


def test_stopping_keeps_what_was_said(session):
    stop = threading.Event()
    answer = session.ask("what is this", lambda text: stop.set(), stop)
    assert answer.finish == "interrupted" and 1 <= answer.new_tokens < 8
    assert session.last_answer is answer
    assert "stopped" in describe(answer)


def test_a_failed_question_leaves_the_conversation_as_it_was(session):
    with pytest.raises(ValueError, match="context"):
        session.ask("what " * 5000)
    assert session.turns == [] and len(session.waiting) == 1
    assert session.ask("what").visual_tokens == 4


def test_answers_end_before_the_context_does(model, picture):
    session = ChatSession(model, None, GenerationOptions(max_new_tokens=10_000))
    session.add_picture(picture)
    room = 6
    fill = model.checkpoint.context_len - room - model.checkpoint.encode([Turn("", session.waiting)]).num_rows
    answer = session.ask("what " * fill)
    assert (answer.new_tokens, answer.finish) == (room, "length")


def drive(monkeypatch, capsys, session, lines, **options) -> tuple[str, str]:
    given = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(given, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert terminal.Chat(session, can_prune=True, **options).run() == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_commands(monkeypatch, capsys, session, picture, tmp_path):
    target = tmp_path / "talk.json"
    target.write_text("mine")
    out, err = drive(
        monkeypatch,
        capsys,
        session,
        [
            "what is this",
            KeyboardInterrupt,  # at the prompt: the chat goes on
            "/trace",
            f"/save {target}",
            f"/save! {target}",
            "/dense",
            "red",
            "/dense",
            '/config {"mode": []}',
            "/config {",
            "/config",
            f"/image '{picture}'",
            "/image nowhere.png",
            "/nonsense",
            "/help",
            "/quit",
            "never asked",
        ],
    )
    assert "selected here" in out
    errors = [line for line in err.split("\n") if line.startswith("error: ")]
    assert len(errors) == 4
    for line, part in zip(errors, ("exists; /save! ", "not valid JSON", "does not exist", "'/nonsense'"), strict=True):
        assert part in line
    saved = json.loads(target.read_text())
    assert [turn["question"] for turn in saved["turns"]] == ["what is this"]
    assert saved["turns"][0]["images"] == [str(picture)] and saved["turns"][0]["trace"]["num_rows"] > 0
    assert "pruning: off (dense)" in out and "[dense: all 4 visual tokens" in err
    assert "[kept " not in out and "[dense" not in out  # figures are no answers
    assert [turn.question for turn in session.turns] == ["what is this", "red"]
    assert session.config is not None and session.config.mode == ()
    assert len(session.waiting) == 1
    assert list(tmp_path.iterdir()) == [target]
    for command in terminal.Chat(session, can_prune=True).commands:
        assert command in out


def test_a_picture_can_be_taken_back(monkeypatch, capsys, session, picture, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (20, 50), "blue").save(other)
    lines = ["/drop 2", f"/image {other}", "/drop 1", "/drop", "/drop"]
    out, err = drive(monkeypatch, capsys, session, lines)
    assert f"dropped {picture}; pictures: {other}" in out and f"dropped {other}; pictures: none" in out
    assert "no picture 2; the conversation has pictures 1 to 1" in err and "no picture to drop" in err
    session.add_picture(picture)
    said = session.ask("what is this").text
    assert session.drop_picture(1).source == str(picture)
    assert session.pictures == [] and session.turns[0].reply == said
    assert session.ask("red").visual_tokens == 0


def test_a_question_is_asked_again(monkeypatch, capsys, session):
    first = session.ask("what is this")
    session.add_picture(Image.new("RGB", (8, 8)))
    _, err = drive(monkeypatch, capsys, session, ["/dense", "/retry"])
    assert "> what is this" in err and len(session.turns) == 1 and len(session.waiting) == 1
    assert session.last_answer.config is None and session.last_answer.prompt_rows == first.prompt_rows
    with monkeypatch.context() as patch:
        patch.setattr(session.model.model, "generate", lambda *a, **k: 1 / 0)
        drive(monkeypatch, capsys, session, ["/retry"])
    assert len(session.turns) == 1 and len(session.waiting) == 1


def test_a_saved_conversation_goes_on(monkeypatch, capsys, session, model, tmp_path):
    target, again = tmp_path / "talk.json", ChatSession(model, session.config, session.options)
    drive(monkeypatch, capsys, session, ["what is this", f"/save {target}", "red"])
    written = target.read_text()
    assert re.search(r'"visual_positions": \[\d+(, \d+)*\]', written) and "\\u" not in written
    drive(monkeypatch, capsys, again, [f"/load {target}", "red"])
    assert [turn.reply for turn in again.turns] == [turn.reply for turn in session.turns]
    (tmp_path / "other.json").write_text('{"turns": [{"question": 1}]}')
    lines = [f"/load {tmp_path / 'other.json'}", f"/load {tmp_path / 'nowhere.json'}", "/load"]
    _, err = drive(monkeypatch, capsys, again, lines)
    assert err.count("error: ") == 3 and len(again.turns) == 2


CHANGES = {
    "tokens_threshold=0.5": {**CONFIG, "tokens_threshold": 0.5},
    "mode=middle exit_patience=3": {**CONFIG, "mode": ["middle"], "exit_patience": 3},
    "mode=shallow,middle,deep": {**CONFIG, "mode": ["shallow", "middle", "deep"]},
    'mode=["middle", "deep"] keep=2 tokens_threshold=null': {
        **{key: value for key, value in CONFIG.items() if key != "tokens_threshold"},
        "keep": 2,
    },
    "method=fastv keep=3": {"method": "fastv", "keep": 3},
}


@pytest.mark.parametrize("changes", CHANGES)
def test_knobs_change_one_by_one(changes):
    before = Method.from_any(CONFIG)
    after = Method.from_any(terminal.changed_config(before, changes))
    assert after == Method.from_any(CHANGES[changes])


NOT_OBEYED = {
    "/dense maybe": "/dense takes nothing",
    "/reset now": "/reset takes nothing",
    "/trcae": "did you mean /trace?",
    "/conf": "did you mean /config?",
    "/drop two": "a picture's number, not 'two'",
    "/drop 5": "no picture 5",
    "/config keep": "not valid JSON",
    "/config keep=many words": "is not KEY=VALUE",
    "/config no_such=1": "unknown key 'no_such'",
    "/retry": "nothing was asked yet",
    "/trace": "no answer yet",
    "/patches": "no answer yet",
    "/save": "needs a file name",
    "/load": "needs a file name",
}


@pytest.mark.parametrize("line", NOT_OBEYED)
def test_what_is_no_command_is_refused(line, capsys, session):
    before = session.config
    terminal.Chat(session, can_prune=True).handle(line)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and NOT_OBEYED[line] in err
    assert len(session.waiting) == 1 and session.turns == [] and session.config == before


def test_two_slashes_ask_what_begins_with_one(capsys, session):
    terminal.Chat(session, can_prune=True).handle("//what is this")
    assert session.turns[0].question == "/what is this"


def test_an_empty_answer_says_so(monkeypatch, capsys, session):
    monkeypatch.setattr(session.model.tokenizer, "decode", lambda *_a, **_k: "")
    out, err = drive(monkeypatch, capsys, session, ["what"])
    assert out.strip() == "" and "the answer is empty" in err


def test_home_folders_expand_and_commands_and_paths_complete(monkeypatch, capsys, session, picture, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.png").write_bytes(picture.read_bytes())
    (tmp_path / "folder").mkdir()
    drive(monkeypatch, capsys, session, ["/image ~/x.png"])
    assert len(session.waiting) == 2
    complete = terminal.Chat(session, can_prune=True).completions
    assert complete("/im") == ["/image "] and complete("/d") == ["/drop ", "/dense "] and complete("wha") == []
    assert complete("/image ~/") == ["~/folder/", "~/x.png"] and complete("/config @~/x") == ["@~/x.png"]
    assert complete("/dense ~/") == []


def test_no_word_breaks_at_the_end_of_a_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stream = Stream()
    for piece in ("one tw", "o thr", "ee\n", "four, five six", "teen"):
        stream(piece)
    stream.end()
    assert capsys.readouterr().out == "one two\nthree\nfour, five\nsixteen\n"


def test_patches_are_drawn_in_half_blocks_where_there_is_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    patches = map_of_grids((24, 24), [PatchGrid(2, 2)])
    kept = np.array([True, False, False, True])
    picture = Image.new("RGB", (24, 24), (255, 0, 0))

    def drawn(**settings) -> list[str]:
        console = Console(file=io.StringIO(), width=100, **settings)
        draw_kept(picture, patches, kept, console)
        return console.file.getvalue().splitlines()

    colours = drawn(force_terminal=True, color_system="truecolor")
    assert len(colours) == 24 and colours[0].count("▀") == 96 and "38;2;255;0;0" in colours[0]
    assert colours[0] != colours[-1]
    for settings in ({}, {"force_terminal": True, "no_color": True}):
        plain = drawn(**settings)
        assert plain == ["█" * 24 + "·" * 24] * 12 + ["·" * 24 + "█" * 24] * 12


def test_reset_forgets_pictures_and_turns(monkeypatch, capsys, session):
    _, err = drive(monkeypatch, capsys, session, ["what", "/reset", "what is this"])
    assert "no picture in the conversation, nothing to prune" in err
    assert len(session.turns) == 1


def test_an_unexpected_error_does_not_end_the_chat(monkeypatch, capsys, session, model):
    def broken(*_args, **_kwargs):
        raise RuntimeError("the roof\nis on fire")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", broken)
        _, err = drive(monkeypatch, capsys, session, ["what", "/help"])
    assert err.endswith("\nerror: RuntimeError: the roof is on fire (--debug shows where)\n")
    _, err = drive(monkeypatch, capsys, session, ["what"])
    assert "[kept" in err


def test_without_pruning_the_commands_about_it_are_gone(session, capsys):
    session.config = None
    plain = terminal.Chat(session, can_prune=False)
    plain.handle("/config {}")
    plain.handle("/dense")
    assert capsys.readouterr().err.count("there is no command") == 2


def test_control_characters_never_reach_the_terminal(monkeypatch, capsys, session, tmp_path):
    assert clean_text("a\x1b[31mb\x07\r\x9bc\u202ed\n\té\u200d") == "a[31mbcd\n\té\u200d"
    nasty = tmp_path / "a\x1b]0;owned\x07.png"
    Image.new("RGB", (8, 8)).save(nasty)
    out, err = drive(monkeypatch, capsys, session, [f"/image {nasty}", "/image \x1b[2Jno", "/\x1b[2J"])
    assert "\x1b" not in out + err and "\x07" not in out + err
    # The same for what a model says: the answer below is made of the token that holds an escape sequence.
    monkeypatch.setattr(session.model.tokenizer, "decode", lambda *_a, **_k: "\x1b[31mred \x1b[0m [bold]x[/bold]\n")
    out, _ = drive(monkeypatch, capsys, session, ["what"], compare=True)
    assert "\x1b" not in out and "[bold]x[/bold]" in out


def test_ctrl_c_stops_the_answer_and_not_the_chat(folder, picture, tmp_path):
    """The real program in a real terminal."""
    argv = [sys.executable, "-m", "llava.serve.cli_pruning", "--model-path", folder, "--image-file", picture]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path)}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, these tests among them, may ignore it
        os.execv(sys.executable, [str(arg) for arg in (*argv, "--max-new-tokens", 4000)])
    seen, read_to = "", 0

    def until(text: str, seconds: float = 600, press: bytes = b"") -> None:
        """Read on until the terminal has shown ``text`` after what was waited for before; press the key meanwhile."""
        nonlocal seen, read_to
        deadline = time.monotonic() + seconds
        while text not in seen[read_to:]:
            assert time.monotonic() < deadline, f"no {text!r} in {seen!r}"
            if select.select([terminal], [], [], 0.5)[0]:
                try:
                    seen += os.read(terminal, 4096).decode(errors="replace")
                except OSError:
                    pytest.fail(f"the chat ended early: {seen!r}")
            elif press:
                os.write(terminal, press)
        read_to = seen.index(text, read_to) + len(text)

    try:
        until("> ")
        os.write(terminal, b"what is this\n")
        until(" w")  # the answer has begun
        os.write(terminal, b"\x03")
        until("stopped]")
        until("> ")
        os.write(terminal, b"half a line\x03")
        until("leaves", press=b"\x03")  # pressed while the prompt is being set up, the key waits for the next one
        os.write(terminal, b"/trace\n")
        until("kept positions")
        until("> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        history = tmp_path / "visipruner" / "history"
        assert history.read_text().splitlines() == ["what is this", "/trace"]
        assert history.stat().st_mode & 0o777 == 0o600
        assert "Traceback" not in seen
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, 9)
        os.close(terminal)


# --- what happened, in words ---


def answer_with(trace: PruningTrace | None, mode=("shallow", "middle", "deep")) -> Answer:
    config = PruningConfig(mode, 2, 0.995, 0.2, 3 if "middle" not in mode else None)
    saved = {"paper": 0.25, "executed": 0.125}
    return Answer("x", (5, 6, 2), "stop", config, trace, saved, 6, 20, 8, Clock(1, 3, 0.5, 1.5))


KEPT = "kept 1 of 8 visual tokens, selected at layer 3"
LINES = [
    ("smd", {"select_layer": 3, "kept_positions": [5], "exit_layer": 5}, f"{KEPT}, exit at layer 5"),
    ("smd", {"select_layer": 3, "kept_positions": [5]}, f"{KEPT}, no exit"),
    ("sm", {"select_layer": 3, "kept_positions": [5]}, KEPT),
    (
        "smd",
        {"select_layer": 3},
        "kept 0 of 8 visual tokens, selected at layer 3, no picture from layer 4 on",
    ),
    (
        "smd",
        {"select_layer": 5, "kept_positions": [5]},
        "selected at layer 5, the last: nothing was left to prune",
    ),
    (
        "smd",
        {"smallest_cosine": {3: 0.9991, 4: 0.9962}},
        "kept all 8 visual tokens, nothing was selected: smallest cosine 0.9962 (layer 4), layer_threshold 0.995",
    ),
    ("s", {}, "kept all 8 visual tokens; text reads none of them below layer 2"),
    ("d", {"exit_layer": 3}, "kept 0 of 8 visual tokens from layer 3 on"),
]


@pytest.mark.parametrize(("mode", "trace", "expected"), LINES)
def test_the_line_after_an_answer(mode, trace, expected):
    stages = tuple(name for name in ("shallow", "middle", "deep") if name[0] in mode)
    made = PruningTrace(num_rows=20, visual_positions=list(range(4, 12)), rows_per_layer=[20] * 6)
    made.smallest_cosine = trace.get("smallest_cosine", {})
    for layer, cause, kept in (
        (trace.get("select_layer"), Cause.SELECTION, trace.get("kept_positions", [])),
        (trace.get("exit_layer", 0) - 1, Cause.EXIT, []),
    ):
        if layer is not None and layer >= 0:
            made.decisions.append(Decision(layer, cause, np.array(kept, dtype=int), {}, {}, made.alive))
    pruning, *rest = describe(answer_with(made, stages)).split(" · ")
    assert pruning == expected
    assert rest == ["FLOPs saved 25.0% (paper), 12.5% (executed)", "first token 500 ms", "2.0 tokens/s"]


def test_a_method_from_outside_the_package_prunes_the_chat(capsys, folder, picture):
    @register("keep_first")
    @dataclass(frozen=True)
    class KeepFirst(Method):
        keep: int = 2

        def decide(self, layer, measured, trace):
            return Keep(np.arange(self.keep)) if layer == 1 else None

    ask = ["--model-path", folder, "--image-file", picture, "--question", "what", "--max-new-tokens", 2, "--json"]
    try:
        code, out, _ = run(capsys, *ask, "--pruning-config", '{"method": "keep_first", "keep": 3}')
    finally:
        del METHODS["keep_first"]
    answer = json.loads(out)
    assert code == 0 and answer["pruning_config"] == {"method": "keep_first", "keep": 3}
    assert (answer["kept_visual_tokens"], answer["select_layer"]) == (3, 1) and answer["flops_saved"]["executed"] > 0
    code, _, err = run(capsys, *ask, "--pruning-config", '{"method": "keep_frist"}')
    assert code == 2 and err.startswith("error: pruning config: unknown method 'keep_frist'; ") and err.count("\n") == 1


def test_warnings_are_one_line(capsys, folder, picture):
    config = json.dumps({**CONFIG, "mid_deep_layer": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run(
            capsys, "--model-path", folder, "--image-file", picture, "--question", "what", "--max-new-tokens", 2,
            "--pruning-config", config,
        )  # fmt: skip
    assert code == 0
    warning, figures = err.splitlines()
    assert warning.startswith("warning: pruning config: 'mid_deep_layer' (4) is ignored") and figures.startswith("[")
