"""The web chat: its logic without a browser, then the page in a real one."""

from __future__ import annotations

import socket
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from visual_helpers import HOSTILE, PRUNING, noise, word_tokenizer, write_checkpoint

pytest.importorskip("gradio")

from browser import chromium

from llava.inference import LoadedModel, open_checkpoint
from llava.serve import gradio_pruning
from llava.serve.gradio_pruning import PictureFile, WebChat, launch
from llava.utils import UserError

STAGES = PRUNING["mode"]
NUMBERS = (PRUNING["shallow_mid_layer"], PRUNING["layer_threshold"], PRUNING["tokens_threshold"], None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("web") / "model", word_tokenizer((HOSTILE,)))
    return LoadedModel(open_checkpoint(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (90, 60)), ("tall", (50, 80))):
        noise(size).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of a picture")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def web(model, pictures):
    return WebChat(model, {"wide": pictures["wide"]})


def ask(web, session, question, run="pruned", stages=STAGES, numbers=NUMBERS, tokens=6, temperature=0):
    return list(web.ask(session, question, run, stages, *numbers, tokens, temperature))


def test_an_answer_streams_and_says_what_was_pruned(web, pictures):
    session = web.new_session()
    session, shown, status = web.take_picture(session, pictures["wide"])
    assert shown.size == (90, 60) and not status.startswith("Error")
    steps = ask(web, session, "what is this")
    partial = [step[1][-1]["content"] for step in steps[1:-1]]
    assert len(partial) > 3 and all(b.startswith(a) for a, b in pairwise(partial[:-1]))
    session, messages, box, kept, status = steps[-1]
    assert [m["role"] for m in messages] == ["user", "assistant"] and box == ""
    assert messages[0]["content"] == "[wide.png]\nwhat is this"
    answer = session.chat.last_answer
    assert (
        messages[1]["content"].startswith(answer.text) and "visual tokens, selected at layer" in messages[1]["content"]
    )
    assert status.startswith("kept ") and kept.size[0] > kept.size[1]
    steps = ask(web, session, "and this")
    assert len(steps[-1][1]) == 4 and len(session.chat.turns) == 2


def test_dense_and_compared_answers(web, pictures):
    session, _, _ = web.take_picture(None, pictures["wide"])
    messages = ask(web, session, "what", "dense")[-1][1]
    assert "dense: all 16 visual tokens" in messages[-1]["content"]
    messages = ask(web, session, "what", "compare")[-1][1]
    assert messages[-2]["content"].startswith("Dense: ") and messages[-1]["content"].startswith("Pruned (")
    assert len(session.chat.turns) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 5000}, "limit is 4,000"),
        ({"numbers": (99, 0.9, 0.2, None)}, "'shallow_mid_layer' is 99"),
        ({"numbers": (1, None, 0.2, None)}, "'layer_threshold' missing"),
        ({"numbers": (1, 2, 0.2, None)}, "'layer_threshold' is 2"),
        ({"stages": ["deep"]}, "'mid_deep_layer' missing"),
        ({"run": "sideways"}, "'sideways' is no way to run"),
        ({"tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_a_mistake_loses_nothing(web, pictures, call, words):
    session, _, _ = web.take_picture(None, pictures["wide"])
    ask(web, session, "what")
    before = [dict(message) for message in session.messages]
    question = call.pop("question", "and now")
    session, messages, box, _, status = ask(web, session, question, **call)[-1]
    assert status.startswith("Error: ") and words in status
    assert messages == before and box == question and len(session.chat.turns) == 1
    assert len(ask(web, session, "still there")[-1][1]) == 4


def test_a_failing_model_loses_nothing(web, pictures, monkeypatch):
    session, _, _ = web.take_picture(None, pictures["wide"])
    ask(web, session, "what")
    with monkeypatch.context() as patch:
        patch.setattr(web.model, "answer", lambda *args, **kwargs: 1 / 0)
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            _, messages, box, _, status = ask(web, session, "and now")[-1]
    assert len(messages) == 2 and box == "and now"
    assert status == "Error: the answer failed (ZeroDivisionError); the conversation is as it was. Try again."
    assert len(ask(web, session, "again")[-1][1]) == 4


def test_pictures_that_cannot_be_used(web, pictures, monkeypatch):
    session, _, _ = web.take_picture(None, pictures["wide"])
    session, shown, status = web.take_picture(session, pictures["broken"])
    assert shown is None and "broken.png" in status and str(pictures["broken"].parent) not in status
    assert [picture.source for picture in session.chat.waiting] == ["wide.png"], "the earlier one stays"
    monkeypatch.setattr(gradio_pruning, "MAX_PIXELS", 100)
    assert "limit is 100" in web.take_picture(session, pictures["wide"])[2]
    assert ask(web, web.new_session(), "what")[-1][4].startswith("Error: there is no picture yet")


def test_a_url_is_never_fetched():
    with pytest.raises(Exception, match="not fetched from URLs"):
        PictureFile(render=False).move_resource_to_block_cache("http://127.0.0.1:9/x.png")


def test_stop_ends_an_answer_and_keeps_what_was_said(web, pictures):
    session, _, _ = web.take_picture(None, pictures["wide"])
    steps = web.ask(session, "what", "pruned", STAGES, *NUMBERS, 400, 0)
    for _ in range(4):
        next(steps)
    session.stop.set()
    step = list(steps)[-1]
    assert step[4].endswith("stopped") and session.chat.last_answer.new_tokens < 100


def test_a_browser_that_leaves_stops_its_answer(web, pictures):
    session, _, _ = web.take_picture(None, pictures["wide"])
    steps = web.ask(session, "what", "pruned", STAGES, *NUMBERS, 400, 0)
    for _ in range(3):
        next(steps)
    steps.close()
    assert session.stop.is_set()
    assert not any(thread.name == "answer" for thread in threading.enumerate())


def test_the_kept_patches_are_those_of_the_newest_picture(web, pictures):
    session, _, _ = web.take_picture(None, pictures["wide"])
    ask(web, session, "what")
    session, _, _ = web.take_picture(session, pictures["tall"])
    kept = ask(web, session, "and this")[-1][3]
    assert kept.size[0] < kept.size[1]


def test_settings_are_private_by_default(monkeypatch):
    seen = {}
    monkeypatch.setattr(gradio_pruning, "launch", lambda web, host, port, share: seen.update(host=host, share=share))
    monkeypatch.setattr(gradio_pruning, "LoadedModel", lambda checkpoint, options: None)
    monkeypatch.setattr(
        gradio_pruning, "open_checkpoint", lambda *args: type("C", (), {"pruning_config": lambda s, g=None: 0})()
    )
    monkeypatch.setattr(gradio_pruning, "WebChat", lambda *args: type("W", (), {})())
    gradio_pruning.main([])
    assert seen == {"host": "127.0.0.1", "share": False}
    with pytest.raises(UserError, match="--port is 0"):
        gradio_pruning.main(["--port", "0"])


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(model, pictures):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch(WebChat(model, {"wide": pictures["wide"]}), "127.0.0.1", port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


def until(driver, script, timeout=600):
    """Wait for a script to return something true, and return it."""
    end = time.monotonic() + timeout
    while not (value := driver.execute_script(script)):
        if time.monotonic() > end:
            pytest.fail(f"not in {timeout} s: {script}\n{driver.execute_script('return document.body.innerText')}")
        time.sleep(0.2)
    return value


STATUS = "return (document.querySelector('#status textarea') || {}).value"
CONVERSATION = "return document.querySelector('#conversation').innerText"


def upload(driver, path):
    until(driver, "return document.querySelector('#upload input[type=file]') !== null")
    driver.find_element("css selector", "#upload input[type=file]").send_keys(str(path))


def send(driver, question):
    box = driver.find_element("css selector", "#question textarea, #question input")
    box.send_keys(question)
    driver.find_element("id", "send").click()


def test_two_people_at_once_stay_apart(address, pictures):
    with chromium() as one, chromium() as two:
        for driver, name in ((one, "wide"), (two, "tall")):
            driver.get(address)
            upload(driver, pictures[name])
            until(driver, "return document.querySelector('#status textarea').value.startsWith('Ask')")
        send(one, "what is <img src=x onerror=document.title='owned'> this")
        send(two, "is this")
        for driver in (one, two):
            until(driver, "return document.querySelector('#status textarea').value.includes('visual tokens')")
        first, second = one.execute_script(CONVERSATION), two.execute_script(CONVERSATION)
        assert "[wide.png]" in first and "[wide.png]" not in second
        assert "[tall.png]" in second and "[tall.png]" not in first
        assert "<img src=x onerror=" in first, "markup is shown as text"
        assert one.title == "Chat about pictures, pruned"
        assert one.execute_script("return document.querySelectorAll('#conversation img[src=\"x\"]').length") == 0
        assert one.execute_script("return document.querySelectorAll('#kept img').length") == 1
        labels = (
            "return [...document.querySelectorAll('button')].map(b => (b.ariaLabel || b.title || '').toLowerCase())"
        )
        assert not any("share" in label for label in one.execute_script(labels)), "nothing is published by a click"
        one.find_element("id", "clear").click()
        until(one, "return !document.querySelector('#conversation').innerText.includes('wide.png')")
        assert "[tall.png]" in two.execute_script(CONVERSATION)


def test_a_broken_upload_gives_a_message_and_the_page_goes_on(address, pictures):
    with chromium(390) as driver:
        driver.get(address)
        upload(driver, pictures["broken"])
        until(driver, "return (document.querySelector('#status textarea') || {value: ''}).value.startsWith('Error')")
        assert "broken.png" in driver.execute_script(STATUS)
        send(driver, "what is this")
        until(driver, "return document.querySelector('#status textarea').value.includes('no picture yet')")
        box = "return document.querySelector('#question textarea, #question input').value"
        assert driver.execute_script(box) == "what is this"
