"""Recordings, the report page and the web chat on models that transformers itself runs."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
import torch
from family_models import FAMILIES, IMAGE, LAYERS, family_model
from PIL import Image
from test_families import ONE_IMAGE, config_for
from tiny_stock import write_stock
from visual_helpers import noise

from llava.inference import LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.pruning import prune
from llava.serve.chat import ChatSession
from llava.visualize import logit_lens, observe, patch_maps, patches, record

CONFIG = {
    "mode": ["shallow", "middle", "deep"],
    "shallow_mid_layer": 2,
    "layer_threshold": 0.9999,
    "tokens_threshold": 0.2,
    "exit_threshold": 0.9,
}
SIZE = (112, 56)  # two tiles side by side, and the whole


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "tiles"])
def folder(request, tmp_path_factory):
    return write_stock(tmp_path_factory.mktemp("stock") / "idefics3", splits=request.param)


@pytest.fixture(scope="module")
def chat(folder):
    return LoadedModel(open_checkpoint(folder), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise(SIZE).save(path)
    return path


@pytest.fixture
def nowhere(monkeypatch):
    """A family of which it is not known where its rows look."""
    monkeypatch.setattr(patches, "LAYOUTS", {})


@pytest.mark.parametrize("mode", [[], ["shallow", "middle", "deep"]], ids=["dense", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_recording_is_what_the_layers_really_did(name, mode) -> None:
    model, inputs = family_model(name), FAMILIES[name].inputs(ONE_IMAGE)
    is_visual = inputs["input_ids"][0] == IMAGE
    num_rows = len(is_visual)
    config = config_for(name, "one image", mode, "first") if mode else None
    written: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, number=number: written[number].append(args[0][0, -1].detach().clone())
        )
        for number, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        with prune(model, config) as run, record(model, is_visual, [-1, num_rows]) as recording:
            output = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    (trace,) = run.traces
    assert recording.present.sum(1).tolist() == trace.rows_per_layer
    if trace.select_layer is not None:
        left = np.flatnonzero(recording.present[trace.select_layer + 1] & recording.is_visual)
        assert left.tolist() == trace.kept_positions
    for number, position in enumerate((-1, num_rows)):
        row = recording.row(position)
        for layer in range(LAYERS):
            np.testing.assert_allclose(row.output[layer].ravel(), written[layer][number], atol=2e-5)

    class Tokens:
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [str(each) for each in ids]

    lens = logit_lens(model, Tokens, recording.row(-1), k=1)
    assert lens.ids[-1, 0] == output.logits[0][0].argmax()


def test_an_observation_knows_its_rows_and_patches(chat) -> None:
    run = observe(chat, noise(SIZE), "what is this", CONFIG, max_new_tokens=2)
    prompt = chat.checkpoint.encode([Turn(run.question, [run.picture])])
    ids = prompt.ids[0].tolist()
    assert len(run.labels) == len(ids) + len(run.answer_ids)
    words = chat.tokenizer.convert_ids_to_tokens(ids)
    for index, word in enumerate(words):
        assert (word == "<image>") == run.recording.is_visual[index]
        assert run.labels[index] == word or run.labels[index].startswith("patch ")
    assert run.patches.boxes.shape == (words.count("<image>"), 4)
    whole = run.patches.boxes[run.patches.views == "whole"]
    np.testing.assert_allclose([*whole[0], *whole[-1]], [0, 0, 28, 14, 84, 42, 112, 56])
    if run.patches.has_tiles:
        tiles = run.patches.boxes[run.patches.views == "tiles"]
        np.testing.assert_allclose([*tiles[0], *tiles[-1]], [0, 0, 14, 14, 98, 42, 112, 56])
        assert len(tiles) == 32


def test_the_report_page(folder, photo, tmp_path) -> None:
    pytest.importorskip("jinja2")
    from llava.visualize import report

    page = tmp_path / "report.html"
    options = ["--image", str(photo), "--question", "what is this", "--model-path", str(folder), "-o", str(page)]
    options += ["--pruning-config", json.dumps(CONFIG), "--device", "cpu", "--max-new-tokens", "2", "--compare"]
    assert report.main(options) == 0
    text = page.read_text()
    (data,) = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))["questions"]
    splits = open_checkpoint(folder).image_processor.do_image_splitting
    total = 3 * 16 if splits else 16
    assert len(data["patches"]["boxes"]) == total == data["patches"]["total"]
    assert data["runs"]["dense"]["num_there"] == [total] * LAYERS
    assert data["runs"]["pruned"]["num_there"][-1] < total
    assert "is not known" not in text
    assert "idefics3" in text and "chat template" in text


def test_the_report_page_lists_what_it_cannot_draw(chat, photo, nowhere) -> None:
    pytest.importorskip("jinja2")
    from llava.visualize.findings import Asked, findings, question_findings
    from llava.visualize.report import page

    picture, config = chat.checkpoint.read_picture(photo), chat.checkpoint.pruning_config(CONFIG)
    run = observe(chat, picture, "what is this", config, max_new_tokens=2)
    assert not run.patches.is_known
    asked = Asked(None, "what is this", picture)
    found = findings(chat, config, [question_findings(chat, asked, config, compare=False, max_new_tokens=2)])
    text = html.unescape(page(found, [picture.image]))
    kept = np.flatnonzero(run.kept).tolist()
    assert kept, "this config keeps some"
    said = re.search(r"is not known.*Kept, of (\d+): ([\d, ]+)", text)
    assert int(said.group(1)) == run.trace.num_visual
    assert [int(each) for each in said.group(2).split(",")] == kept
    (data,) = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))["questions"]
    assert data["patches"]["boxes"] == [] and data["patches"]["total"] == run.trace.num_visual
    last = next(row for row in data["runs"]["pruned"]["attention"] if row["row"] == data["num_rows"] - 1)
    assert last["top"][LAYERS // 2] > 0, "the words beside the slider name the largest attention"


def test_the_web_chat(chat, photo) -> None:
    pytest.importorskip("gradio")
    from llava.serve.web.state import WebChat

    web = WebChat(chat, {})
    session = web.new_session()
    assert not web.take_pictures(session, [photo]).startswith("Error") and session.shown[0].image.size == SIZE
    for question in ("what is this", "and this"):
        assert list(web.ask(session, question, "pruned", json.dumps(CONFIG), 2, 0))[-1] == "Ready."
        assert [one.kept.width > one.kept.height for one in session.shown] == [True, False][: len(session.shown)]
        web.take_pictures(session, [_portrait(photo)])
    assert len(session.exchanges) == 2 == len(session.chat.turns)

    # A conversation's rows are those of its pictures, in order.
    maps = patch_maps(chat.checkpoint, session.chat.last_prompt())
    assert sum(len(each.boxes) for each in maps) == session.chat.last_answer.visual_tokens


def _portrait(photo):
    path = photo.with_name("portrait.png")
    Image.open(photo).rotate(90, expand=True).save(path)
    return path


def test_the_web_page_is_built_for_it(folder) -> None:
    pytest.importorskip("gradio")
    from llava.inference import LoadOptions, open_checkpoint
    from llava.serve.web.late import LateModel
    from llava.serve.web.page import build_page
    from llava.serve.web.state import WebChat

    web = WebChat(LateModel(open_checkpoint(folder), LoadOptions(device="cpu")), {})
    assert web.recommended.shallow_mid_layer == 2  # 6 of 32, for 8 layers
    assert "idefics3" in json.dumps(build_page(web).get_config_file(), default=str)


def test_the_web_chat_lists_what_it_cannot_draw(chat, photo, nowhere) -> None:
    pytest.importorskip("gradio")
    from llava.serve.web.state import WebChat

    web = WebChat(chat, {})
    session = web.new_session()
    web.take_pictures(session, [photo])
    assert list(web.ask(session, "what is this", "pruned", json.dumps(CONFIG), 2, 0))[-1] == "Ready."
    (shown,) = session.shown
    assert shown.kept is None, "the picture as it is"
    trace = session.chat.last_answer.trace
    listed = [trace.visual_positions.index(position) for position in trace.kept_positions]
    assert shown.note.endswith(f"of {trace.num_visual}: {', '.join(map(str, listed)) or 'none'}")


def test_the_last_prompt_is_the_one_that_was_answered(chat, photo) -> None:
    session = ChatSession(chat, chat.checkpoint.pruning_config(CONFIG))
    session.add_picture(photo)
    answer = session.ask("what is this")
    assert session.last_prompt().num_rows == answer.prompt_rows
