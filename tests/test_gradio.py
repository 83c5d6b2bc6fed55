"""The web chat: its logic without a browser, then the page in a real one."""

from __future__ import annotations

import base64
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from visual_helpers import HOSTILE, LAYERS, PRUNING, noise, word_tokenizer, write_checkpoint

pytest.importorskip("gradio")

from browser import chromium, console_errors

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import LoadedModel, LoadOptions, open_checkpoint
from llava.pruning import METHODS, PruningConfig
from llava.pruning.methods.visipruner import STAGES
from llava.serve import gradio_pruning
from llava.serve.gradio_pruning import example_pictures
from llava.serve.web import show, state
from llava.serve.web.late import LateModel
from llava.serve.web.page import build_page, launch
from llava.serve.web.settings import Settings, about, knobs_of
from llava.serve.web.state import Exchange, Said, WebChat
from llava.serve.web.upload import UploadedFile
from llava.utils import UserError

OF_THE_MODEL = json.dumps(PRUNING)


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


@pytest.fixture(scope="module")
def web(model, pictures):
    return WebChat(model, {"wide": (pictures["wide"], "what is this")})


def begun(web, *names):
    """A conversation with these pictures."""
    session = web.new_session()
    status = web.take_pictures(session, names)
    assert not status.startswith("Error"), status
    return session


def ask(web, session, question, run="pruned", pruning=OF_THE_MODEL, tokens=6, temperature=0):
    """The last status line."""
    return list(web.ask(session, question, run, pruning, tokens, temperature))[-1]


def changed(**knobs):
    given = {key: value for key, value in {**PRUNING, **knobs}.items() if value is not None}
    return json.dumps(given)


def test_an_answer_streams_and_says_what_was_pruned(web, pictures):
    session = begun(web, pictures["wide"])
    assert session.shown[0].image.size == (90, 60)
    partial = []
    for _ in web.ask(session, "what is this", "pruned", OF_THE_MODEL, 6, 0):
        partial.append(session.exchanges[-1].said[0].text)
    assert len(partial) > 4 and all(b.startswith(a) for a, b in itertools.pairwise(partial[:-1]))
    (exchange,) = session.exchanges
    assert (exchange.question, exchange.pictures) == ("what is this", ["wide.png"]) and not session.returned
    answer = session.chat.last_answer
    assert exchange.said[0].text == answer.text and exchange.said[0].answer is answer
    written = show.conversation(session.exchanges)
    assert f"kept {answer.kept} of 16 visual tokens" in written and "<details>" in written
    assert written.count("Computation saved") == 1, "statistics stand once"
    assert session.shown[0].kept.width > session.shown[0].kept.height
    assert session.shown[0].note == f"{answer.kept} of 16 patches kept for the newest answer"
    assert not session.shown[0].is_new
    ask(web, session, "and this")
    assert len(session.exchanges) == 2 == len(session.chat.turns)


def test_dense_and_compared_answers(web, pictures):
    session = begun(web, pictures["wide"])
    ask(web, session, "what", "dense")
    assert "dense: all 16 visual tokens" in show.conversation(session.exchanges)
    assert session.shown[0].kept is None
    ask(web, session, "what", "compare")
    dense, pruned = session.exchanges[-1].said
    assert (dense.label, pruned.label) == ("Dense", "Pruned") and pruned.answer is session.chat.last_answer
    assert dense.answer.config is None and pruned.answer.trace is not None
    written = show.conversation(session.exchanges[-1:])
    assert written.count("<section class='answer'>") == 2, "an answer a column"
    assert ("The same answer." if dense.text == pruned.text else "Different answers.") in written
    assert len(session.chat.turns) == 2


def test_the_trace_of_each_answer_can_be_saved(web, pictures):
    session = begun(web, pictures["wide"])
    ask(web, session, "what", "compare")
    found = re.findall(
        r"download='([^']+)' href='data:application/json;base64,([^']+)'", show.conversation(session.exchanges)
    )
    assert [name for name, _ in found] == ["answer-1-dense.json", "answer-1-pruned.json"]
    saved = [json.loads(base64.b64decode(data)) for _, data in found]
    assert saved[0]["trace"] is None and saved[1] == json.loads(json.dumps(session.chat.last_answer.to_dict()))
    assert saved[1]["trace"]["kept_positions"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 5000}, "limit is 4,000"),
        ({"pruning": changed(shallow_mid_layer=99)}, "'shallow_mid_layer' is 99"),
        ({"pruning": changed(layer_threshold=None)}, "'layer_threshold' missing"),
        ({"pruning": changed(layer_threshold=2)}, "'layer_threshold' is 2"),
        ({"pruning": changed(mode=["deep"])}, "'mid_deep_layer' missing"),
        ({"pruning": "{"}, "the pruning config is no JSON"),
        ({"pruning": "[" * 9999}, "the pruning config is no JSON"),
        ({"pruning": "x" * 30_000}, "limit is 20,000"),
        ({"pruning": "[1]"}, "a JSON object is needed"),
        ({"pruning": '{"method": "fastw"}'}, "did you mean 'fastv'?"),
        ({"pruning": '"@/etc/hostname"'}, "opens no files"),
        ({"pruning": '{"method": "chain", "steps": ["@/etc/hostname"]}'}, "opens no files"),
        ({"pruning": '{"method": "cdpruner", "relevance": "clip", "clip": "/etc"}'}, "opens no files"),
        ({"run": "sideways"}, "'sideways' is no way to run"),
        ({"tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_a_mistake_loses_nothing(web, pictures, call, words):
    session = begun(web, pictures["wide"])
    ask(web, session, "what")
    before = list(session.exchanges)
    question = call.pop("question", "and now")
    status = ask(web, session, question, **call)
    assert status.startswith("Error: ") and words in status
    assert session.exchanges == before and session.returned == question and len(session.chat.turns) == 1
    assert not session.shown[0].is_new
    ask(web, session, "still there")
    assert len(session.exchanges) == 2 and not session.returned


def test_a_failing_model_loses_nothing(web, pictures, monkeypatch):
    session = begun(web, pictures["wide"])
    ask(web, session, "what")
    with monkeypatch.context() as patch:
        patch.setattr(web.model, "answer", lambda *args, **kwargs: 1 / 0)
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            status = ask(web, session, "and now")
    assert len(session.exchanges) == 1 and session.returned == "and now"
    assert status == "Error: the answer failed (ZeroDivisionError); the conversation is as it was. Try again."
    ask(web, session, "again")
    assert len(session.exchanges) == 2


def test_pictures_that_cannot_be_used(web, pictures, monkeypatch):
    session = begun(web, pictures["wide"])
    status = web.take_pictures(session, [pictures["broken"]])
    assert "broken.png" in status and str(pictures["broken"].parent) not in status
    assert [(one.name, one.is_new) for one in session.shown] == [("wide.png", True)], "the earlier one stays"
    with monkeypatch.context() as patch:
        patch.setattr(state, "MAX_PIXELS", 100)
        assert "limit is 100" in web.take_pictures(session, [pictures["wide"]])
    assert ask(web, web.new_session(), "what").startswith("Error: there is no picture yet")
    session = begun(web, *[pictures["wide"]] * state.MAX_PICTURES)
    assert "at most 8 pictures" in web.take_pictures(session, [pictures["tall"]])


def test_a_url_is_never_fetched():
    with pytest.raises(Exception, match="not fetched from URLs"):
        UploadedFile(render=False).move_resource_to_block_cache("http://127.0.0.1:9/x.png")


def test_stop_ends_an_answer_and_keeps_what_was_said(web, pictures):
    session = begun(web, pictures["wide"])
    steps = web.ask(session, "what", "pruned", OF_THE_MODEL, 400, 0)
    for _ in range(4):
        next(steps)
    session.stop.set()
    list(steps)
    assert show.in_short(session.chat.last_answer).endswith("stopped") and session.chat.last_answer.new_tokens < 100


def test_a_browser_that_leaves_stops_its_answer(web, pictures):
    session = begun(web, pictures["wide"])
    steps = web.ask(session, "what", "pruned", OF_THE_MODEL, 400, 0)
    for _ in range(3):
        next(steps)
    steps.close()
    assert session.stop.is_set() and not session.turn.locked()
    assert not any(thread.name == "answer" for thread in threading.enumerate())


def test_kept_patches_belong_to_their_picture(web, pictures):
    session = begun(web, pictures["wide"])
    ask(web, session, "what")
    web.take_pictures(session, [pictures["tall"]])
    wide, tall = session.shown
    assert wide.kept is not None and tall.kept is None and tall.is_new, "a new picture shows no other's patches"
    ask(web, session, "and this")
    assert wide.kept.width > wide.kept.height and tall.kept.width < tall.kept.height
    kept = [int(one.note.split()[0]) for one in session.shown]
    assert sum(kept) == session.chat.last_answer.kept


def test_several_pictures_go_with_one_question_and_can_be_taken_back(web, pictures):
    session = begun(web, pictures["wide"], pictures["tall"], pictures["wide"])
    assert web.take_back(session) == "wide.png is taken back." and len(session.shown) == 2
    ask(web, session, "what")
    assert session.exchanges[0].pictures == ["wide.png", "tall.png"]
    assert session.chat.last_answer.visual_tokens == 32
    assert web.take_back(session).startswith("No new picture") and len(session.shown) == 2
    drawn = show.pictures(session.shown)
    assert drawn.index("tall.png") < drawn.index("wide.png"), "the newest first"
    assert drawn.count("class='kept'") == 2


def test_a_picture_that_is_added_while_an_answer_comes_goes_with_the_next_question(web, pictures):
    session = begun(web, pictures["wide"])
    for step, _ in enumerate(web.ask(session, "what", "pruned", OF_THE_MODEL, 6, 0)):
        if step == 2:
            assert web.take_back(session).startswith("No new picture"), "it is being asked about"
            web.take_pictures(session, [pictures["tall"]])
    wide, tall = session.shown
    assert wide.kept is not None and tall.kept is None and tall.is_new and session.chat.last_answer.visual_tokens == 16
    assert ask(web, session, "what") == "Ready." and session.exchanges[1].pictures == ["tall.png"]
    assert session.chat.last_answer.visual_tokens == 32 and tall.kept is not None


def test_nothing_that_is_said_means_anything_in_html_or_a_template():
    hostile = HOSTILE + "<b>${1+1}{{value}}`\\"
    written = show.conversation([Exchange(hostile, [hostile], [Said("", hostile)])]) + show.status(hostile)
    assert not re.search(r"<(b|img|script)|[{}$`\\]", written) and written.count("&#36;&#123;1+1&#125;") == 4


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    checkpoint = open_checkpoint(SHIPPED_MODEL_PATH)
    return Settings(checkpoint, checkpoint.pruning_config(), checkpoint.num_layers)


@pytest.mark.parametrize("mode", [mode for n in range(4) for mode in itertools.combinations(STAGES, n)], ids="+".join)
def test_every_mode_has_defaults_that_are_valid(shipped, web, pictures, mode):
    for settings in (shipped, web.settings):
        written = settings.written({**settings.knobs, "mode": mode})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert set(settings.check(written).mode) == set(mode)
        # What the mode has no use for stays as it is in the controls.
        assert settings.written({**settings.knobs, **settings.read(written)}) == written
    session = begun(web, pictures["wide"])
    assert ask(web, session, "what", pruning=written, tokens=1) == "Ready."


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_begins_with_a_config_for_this_model(shipped, name):
    assert shipped.check(shipped.start_of(name)).name == name
    told = about(name)
    assert (
        told.words.endswith(".")
        and len(told.words) < 500
        and (told.link.startswith("https://arxiv.org") or not told.link)
    )
    assert {knob for knob, _, _ in knobs_of(name, LAYERS)} == set(METHODS[name].__dataclass_fields__)


def test_what_the_editor_leaves_alone_stays(shipped):
    given = {**json.loads(shipped.start_of("visipruner")), "probe_rows": "text", "keep": 0.25}
    del given["tokens_threshold"]
    assert json.loads(shipped.written({**shipped.knobs, **shipped.read(json.dumps(given))})) == given
    of_controls = {**shipped.knobs, "keep": "", "shallow_sink": ""}
    assert shipped.written(of_controls) == shipped.start_of("visipruner")
    assert json.loads(shipped.written({**of_controls, "keep": " 0.25 "}))["keep"] == 0.25
    with pytest.raises(UserError, match="'keep' is 'many'"):
        shipped.check(shipped.written({**of_controls, "keep": "many"}))
    assert shipped.read('{"method": "vtw", "layer": 6}') is None and shipped.read("{") is None


# -- the start -------------------------------------------------------------------------------------------------------


def test_a_question_waits_for_the_weights(model, pictures, monkeypatch):
    late = LateModel(model.checkpoint, LoadOptions())
    web = WebChat(late, {})
    arrival = web.arrival()
    assert next(arrival).startswith("Reading the model's weights") and late.placement == ""
    session = begun(web, pictures["wide"])
    steps = web.ask(session, "what", "pruned", "", 2, 0)
    assert next(steps) == "Waiting for the model's weights …"
    monkeypatch.setattr("llava.serve.web.late.LoadedModel", lambda checkpoint, options: model)
    threading.Timer(0.2, late.load).start()
    assert list(steps)[-1] == "Ready." == list(arrival)[-1] and late.placement == model.placement
    other = LateModel(model.checkpoint, LoadOptions())
    stop = threading.Event()
    stop.set()
    with pytest.raises(UserError, match="stopped while"):
        other.answer(None, stop=stop)


class Page:
    """What `launch` gives, for a program that is not to be blocked."""

    share_url, local_url = None, "http://127.0.0.1:7860/"

    def block_thread(self) -> None:
        pass

    def close(self, verbose: bool) -> None:
        self.is_closed = True


def test_settings_are_private_by_default(monkeypatch, capsys):
    seen, page = [], Page()
    monkeypatch.setattr(
        "llava.serve.web.page.launch", lambda web, host, port, share: seen.append((web, host, share)) or page
    )
    assert gradio_pruning.main([]) == 0
    ((web, host, share),) = seen
    assert (host, share) == ("127.0.0.1", False) and page.is_closed
    assert web.model.placement and isinstance(web.recommended, PruningConfig)
    said = capsys.readouterr()
    assert not said.out, "what is said about the start goes to stderr"
    for word in ("starting", "the page is open at http://127.0.0.1:7860/", "reading the weights", "ready (cpu"):
        assert word in said.err


def test_weights_that_cannot_be_read_end_the_program(monkeypatch, tmp_path):
    page = Page()
    monkeypatch.setattr("llava.serve.web.page.launch", lambda *args, **kwargs: page)
    with pytest.raises(UserError, match="--port is 0"):
        gradio_pruning.main(["--port", "0"])
    monkeypatch.setattr(LateModel, "load", lambda self: (_ for _ in ()).throw(UserError("no weights here")))
    with pytest.raises(UserError, match="no weights here"):
        gradio_pruning.main([])
    assert page.is_closed


def test_help_needs_no_libraries():
    code = "import sys; from llava.serve.gradio_pruning import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'gradio'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--server" in said and said.endswith("set()\n")


def test_examples_have_questions_that_are_known_to_be_answered():
    examples = example_pictures()
    assert 2 <= len(examples) <= 4
    assert all(path.is_file() and question.endswith("?") for path, question in examples.values())


def test_the_page_says_what_it_is_about(web):
    page = json.dumps(build_page(web).get_config_file(), default=str)
    for words in ("While the model reads your question", "arxiv.org/abs/2510.17205", "What the numbers mean"):
        assert words in page


# -- in a browser ----------------------------------------------------------------------------------------------------

# Of every frame: how far what is on the page moved, in pixels, without anybody having touched it.
SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput)
    for (const {node, previousRect: a, currentRect: b} of entry.sources)
      window.shifts.push([Math.max(Math.abs(a.x - b.x), Math.abs(a.y - b.y)), node?.id || node?.className || '?']);
}).observe({type: 'layout-shift', buffered: true});
"""
WIDTHS = {"wide": (1280, 900), "phone": (390, 844)}
ANSWERS = "return document.querySelectorAll('#talk .answer:not(.growing)').length"
CONVERSATION = "return document.querySelector('#talk').innerText"
STATUS = "return (document.querySelector('#status') || {innerText: ''}).innerText"
BOX = "return document.querySelector('#question textarea').value"


@pytest.fixture(scope="module")
def address(web):
    page = launch(web, "127.0.0.1", free_port())
    yield page.local_url
    page.close(verbose=False)


@pytest.fixture(scope="module")
def driver():
    with chromium(1280) as one:
        one.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SHIFTS})
        yield one


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def opened(driver, address, width="wide", theme="light"):
    """The page, anew, when it can answer."""
    across, down = WIDTHS[width]
    size = {"width": across, "height": down, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    console_errors(driver)  # those of the page before
    driver.get(f"{address}?__theme={theme}")
    until(driver, "return (document.querySelector('#status') || {innerText: ''}).innerText.includes('Ready.')")
    return driver


def until(driver, script, timeout=120):
    """Wait for a script to return something true, and return it."""
    end = time.monotonic() + timeout
    while not (value := driver.execute_script(script)):
        if time.monotonic() > end:
            pytest.fail(f"not in {timeout} s: {script}\n{driver.execute_script('return document.body.innerText')}")
        time.sleep(0.1)
    return value


def upload(driver, *paths):
    until(driver, "return document.querySelector('#upload input[type=file]') !== null")
    before = driver.execute_script("return document.querySelectorAll('#shown figure').length")
    driver.find_element("css selector", "#upload input[type=file]").send_keys("\n".join(map(str, paths)))
    until(driver, f"return document.querySelectorAll('#shown figure').length === {before + len(paths)}")


def send(driver, question):
    driver.find_element("css selector", "#question textarea").send_keys(question)
    driver.find_element("id", "send").click()


def answered(driver, number=1):
    """Wait for so many finished answers on the page."""
    until(driver, f"{ANSWERS} >= {number} && document.querySelector('#status').innerText.includes('Ready.')")


def choose(driver, label):
    driver.execute_script(
        "[...document.querySelectorAll('#run label')].find(l => l.innerText.trim() === arguments[0]).click()", label
    )


def answer_length(driver, tokens):
    """So that nobody waits for a model of random weights, which never ends by itself."""
    script = """const set = (box, value) => {
      Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, value);
      for (const kind of ['input', 'change', 'blur']) box.dispatchEvent(new Event(kind, {bubbles: true}));
    };
    set(document.querySelector('#length input[type=number]'), arguments[0]);"""
    driver.execute_script(
        "if (!document.querySelector('#length')) document.querySelector('#settings > button').click()"
    )
    until(driver, "return document.querySelector('#length input[type=number]') !== null")
    driver.execute_script(script, tokens)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_stands_still_and_fits(driver, address, pictures, width, theme):
    opened(driver, address, width, theme)
    time.sleep(0.5)
    moved = driver.execute_script("return window.shifts")
    assert all(distance <= 8 for distance, _ in moved), moved
    _, down = WIDTHS[width]
    box = driver.execute_script("return document.querySelector('#question textarea').getBoundingClientRect().toJSON()")
    assert box["top"] > 0 and box["bottom"] < down, "the question box is in sight"
    colours = "return getComputedStyle(document.querySelector('h1')).color.match(/\\d+/g).map(Number)"
    assert (sum(driver.execute_script(colours)) > 400) == (theme == "dark"), "light on dark, dark on light"
    # Everything that can be unfolded, a picture, and two answers beside each other.
    answer_length(driver, 3)
    for summary in driver.find_elements("css selector", "#meanings summary"):
        summary.click()
    upload(driver, pictures["wide"])
    choose(driver, "Compare")
    send(driver, "what is this")
    answered(driver, 2)
    driver.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    overflow = driver.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0, "nothing to scroll sideways"
    first, second = (
        driver.execute_script(f"return document.querySelectorAll('.answer')[{n}].getBoundingClientRect().toJSON()")
        for n in range(2)
    )
    assert first["right"] <= second["left"] and first["top"] == second["top"], "dense and pruned side by side"
    picture = driver.execute_script("return document.querySelector('#shown img').getBoundingClientRect().toJSON()")
    assert picture["width"] > 300 and picture["height"] > 250, "pictures are large"
    errors = console_errors(driver)
    assert len(errors) <= 2 and all(line.endswith('"Method not implemented."') for line in errors), "gradio's own two"


@pytest.fixture(
    params=[("wide", "light"), pytest.param(("phone", "dark"), marks=pytest.mark.slow)], ids=lambda view: "-".join(view)
)
def view(request):
    """Width and theme of what is done on the page."""
    return request.param


@pytest.fixture
def held(web, monkeypatch):
    """Answers hold after ten words, until they are stopped."""
    answer = web.model.answer

    def slowly(prompt, config, options, on_text, stop):
        words = itertools.count()

        def say(text):
            on_text(text)
            if next(words) >= 10:
                stop.wait(300)

        return answer(prompt, config, options, say, stop)

    monkeypatch.setattr(web.model, "answer", slowly)


@pytest.mark.usefixtures("held")
def test_a_conversation_that_is_left_shows_no_more(driver, address, pictures):
    opened(driver, address)
    upload(driver, pictures["wide"])
    send(driver, "what is this")
    until(driver, "return document.querySelector('.answer.growing p')?.innerText.length > 20")
    driver.find_element("id", "clear").click()
    until(driver, "return document.querySelectorAll('#shown figure').length === 0")
    upload(driver, pictures["tall"])
    time.sleep(0.5)
    assert "wide.png" not in driver.execute_script("return document.body.innerText")


@pytest.mark.usefixtures("held")
def test_what_is_typed_while_an_answer_streams_stays(driver, address, pictures, view):
    opened(driver, address, *view)
    upload(driver, pictures["wide"])
    send(driver, "what is this")
    until(driver, "return document.querySelector('.answer.growing p')?.innerText.length > 20")
    box = driver.find_element("css selector", "#question textarea")
    for word in ("and ", "what ", "is that?"):
        box.send_keys(word)
    assert driver.execute_script("return document.querySelector('.growing') !== null"), "it still streamed"
    assert driver.execute_script(BOX) == "and what is that?"
    driver.find_element("id", "stop").click()
    answered(driver)
    assert "stopped" in driver.execute_script(CONVERSATION)
    assert driver.execute_script(BOX) == "and what is that?"


def test_every_mode_can_be_ticked_and_asked(driver, address, pictures, view):
    opened(driver, address, *view)
    answer_length(driver, 1)
    upload(driver, pictures["wide"])
    config = "return document.querySelector('#pruning textarea').value"
    ticked, seen = set(STAGES), set()
    # One stage ticked or unticked after the other, from all three, so that every mode comes by once.
    for asked, stage in enumerate((None, "deep", "middle", "deep", "shallow", "middle", "deep", "middle"), 1):
        if stage:
            ticked ^= {stage}
            driver.execute_script(
                "[...document.querySelectorAll('#mode label')].find(l => l.innerText.trim() === arguments[0]).click()",
                stage,
            )
            until(
                driver, f'return /{stage}"/.test(({config.removeprefix("return ")})) === {str(stage in ticked).lower()}'
            )
        written = json.loads(driver.execute_script(config))
        assert set(written["mode"]) == ticked
        if ticked & {"middle", "deep"} == {"deep"}:  # the case that always failed
            assert written["mid_deep_layer"] > 0
        seen.add(frozenset(ticked))
        send(driver, "what")
        answered(driver, asked)
    assert len(seen) == 2 ** len(STAGES)


def test_a_second_picture_does_not_show_the_first_ones_patches(driver, address, pictures, view):
    opened(driver, address, *view)
    answer_length(driver, 2)
    upload(driver, pictures["wide"])
    send(driver, "what")
    answered(driver)
    said = "f => [f.innerText.trim(), !!f.querySelector('.kept')]"
    kept = f"return [...document.querySelectorAll('#shown figure')].map({said})"
    ((name, has_kept),) = driver.execute_script(kept)
    assert name.startswith("wide.png") and "patches kept" in name and has_kept
    visible = "return getComputedStyle(document.querySelector('#shown .kept')).visibility"
    assert driver.execute_script(visible) == "visible"
    driver.find_element("css selector", "#toggle input").click()
    assert driver.execute_script(visible) == "hidden"
    driver.find_element("css selector", "#toggle input").click()
    upload(driver, pictures["tall"])
    assert [has_kept for _, has_kept in driver.execute_script(kept)] == [False, True]
    send(driver, "and this")
    answered(driver, 2)
    newest, older = driver.execute_script(kept)
    assert newest[0].startswith("tall.png") and older[0].startswith("wide.png") and newest[1] and older[1]
    shape = "return [...document.querySelectorAll('#shown .kept')].map(i => i.naturalWidth > i.naturalHeight)"
    assert driver.execute_script(shape) == [False, True]


def test_two_pictures_one_question_and_a_new_conversation(driver, address, pictures):
    opened(driver, address, "phone", "dark")
    answer_length(driver, 2)
    upload(driver, pictures["wide"], pictures["tall"])
    send(driver, "what is <img src=x onerror=document.title='owned'> this")
    answered(driver)
    said = driver.execute_script(CONVERSATION)
    assert "wide.png" in said and "tall.png" in said and "32 visual tokens" in said
    assert "<img src=x onerror=" in said, "markup is shown as text"
    assert driver.title == "Ask about a picture · VisiPruner"
    assert driver.execute_script("return document.querySelectorAll('#talk img').length") == 0
    labels = "return [...document.querySelectorAll('button')].map(b => (b.ariaLabel || b.title || '').toLowerCase())"
    assert not any("share" in label for label in driver.execute_script(labels)), "nothing is published by a click"
    driver.find_element("id", "clear").click()
    until(driver, "return !document.querySelector('#talk').innerText.includes('wide.png')")
    until(driver, "return document.querySelectorAll('#shown figure').length === 0")


def test_a_broken_upload_gives_a_message_and_the_page_goes_on(driver, address, pictures):
    opened(driver, address, "phone")
    driver.find_element("css selector", "#upload input[type=file]").send_keys(str(pictures["broken"]))
    until(driver, "return document.querySelector('#status').innerText.startsWith('Error')")
    assert "broken.png" in driver.execute_script(STATUS)
    send(driver, "what is this")
    until(driver, "return document.querySelector('#status').innerText.includes('no picture yet')")
    until(driver, f"return (() => {{ {BOX} }})() === 'what is this'")


def test_a_config_is_imported_edited_and_exported(driver, address, tmp_path):
    opened(driver, address)
    driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    answer_length(driver, 1)
    (tmp_path / "mine.json").write_text('{"method": "vtw", "layer": 3}')
    driver.find_element("css selector", "#import input[type=file]").send_keys(str(tmp_path / "mine.json"))
    until(driver, "return document.querySelector('#pruning textarea').value.includes('vtw')")
    until(driver, "return document.querySelector('#method input').value === 'vtw'")
    until(driver, "return document.querySelector('#method-told').innerText.startsWith('VTW')")
    assert not driver.execute_script("return document.querySelector('#knobs')?.offsetHeight")
    driver.find_element("id", "export").click()
    exported = tmp_path / "pruning_config.json"
    end = time.monotonic() + 30
    while not exported.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    assert json.loads(exported.read_text()) == {"method": "vtw", "layer": 3}


@pytest.mark.slow
def test_two_people_at_once_stay_apart(driver, address, pictures):
    opened(driver, address)
    one = driver.current_window_handle
    driver.switch_to.new_window("tab")
    opened(driver, address)
    upload(driver, pictures["tall"])
    send(driver, "is this")
    driver.switch_to.window(one)
    upload(driver, pictures["wide"])
    send(driver, "what is this")
    answered(driver)
    said = driver.execute_script(CONVERSATION)
    assert "wide.png" in said and "tall.png" not in said
    driver.find_element("id", "clear").click()
    driver.switch_to.window(next(handle for handle in driver.window_handles if handle != one))
    answered(driver)
    said = driver.execute_script(CONVERSATION)
    assert "tall.png" in said and "wide.png" not in said
    driver.close()
    driver.switch_to.window(one)
