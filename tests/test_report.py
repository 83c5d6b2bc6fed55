"""The report page: what is in it, that nothing foreign runs in it, and how it behaves in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
from browser import chromium, console_errors
from visual_helpers import HOSTILE, LAYERS, PRUNING, noise, word_tokenizer, write_checkpoint

from llava.utils import UserError
from llava.visualize import report

pytest.importorskip("jinja2")

QUESTION = "what is </script><img src=x onerror=alert(1)> \"this\" & 'that'"
OWN_TAGS = {"img": 2}  # the picture under each run


class Page(HTMLParser):
    """Tags, their attributes, and the text of the script that holds data."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        if self._in_data:
            self.data += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hostile") / "<b>model", word_tokenizer((HOSTILE,)))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "<img src=x onerror=alert(2)>.png"
    noise((90, 60)).save(path)
    return path


@pytest.fixture(scope="module")
def page(folder, picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    options = ["--image", str(picture), "--question", QUESTION, "--model-path", str(folder), "-o", str(path)]
    assert report.main([*options, "--json-output", str(path.with_suffix(".json")), "--max-new-tokens", "6"]) == 0
    return path


@pytest.fixture(scope="module")
def questions(folder, tmp_path_factory):
    """A page of three questions about two pictures, one of them with the answer that the file expects."""
    place = tmp_path_factory.mktemp("questions")
    for number in range(2):
        noise((60, 60), seed=number).save(place / f"{number}.png")
    lines = [
        {"question_id": 7, "image": "0.png", "text": "what is this"},
        {"question_id": "b", "image": "1.png", "text": "is this what", "answer": "never"},
        {"question_id": "<i>", "image": "0.png", "text": "<b>what</b>"},
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = place / "report.html"
    options = ["--questions", str(place / "questions.jsonl"), "--model-path", str(folder), "-o", str(path)]
    assert report.main([*options, "--max-new-tokens", "3"]) == 0
    return path


def data_of(path):
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S).group(1)
    assert "<" not in raw and ">" not in raw
    return json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_nothing_foreign_becomes_markup(page):
    text = page.read_text()
    parsed = Page(text)
    assert parsed.count("script") == 2 and parsed.count("b") == 0
    assert parsed.count("img") == OWN_TAGS["img"]
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), "the page loads nothing"
    assert not re.search(r"https?://", text)
    assert html.escape(HOSTILE) in text, "the hostile token is shown, as text"
    assert "onerror=alert(2)&gt;.png" in text


def test_everything_is_in_the_page_and_in_the_file_as_json(page):
    data = data_of(page)
    assert data == json.loads(page.with_suffix(".json").read_text())
    (question,) = data["questions"]
    assert list(question["runs"]) == data["runs"] == ["dense", "pruned"]
    dense, pruned = question["runs"].values()
    assert dense["num_there"] == [16] * LAYERS
    counts = pruned["num_there"]
    assert counts[0] == 16 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    assert all(map(len, pruned["there"])) and pruned["trace"]["rows_per_layer"] == pruned["rows_per_layer"]
    assert pruned["kv_bytes"] / dense["kv_bytes"] == sum(pruned["rows_per_layer"]) / sum(dense["rows_per_layer"])
    assert pruned["flops"]["executed"] < dense["flops"]["executed"]
    for run in (dense, pruned):
        assert run["time"]["first_token_s"] > 0 and run["time"]["per_token_s"] > 0 and run["time"]["runs"] >= 1


def test_every_text_row_behind_the_picture_and_every_answer_row_has_its_attention(page):
    (question,) = data_of(page)["questions"]
    visual = set(question["runs"]["dense"]["trace"]["visual_positions"])
    rows = question["num_rows"]
    text = [row for row in range(min(visual), rows) if row not in visual]
    for run in question["runs"].values():
        assert [each["row"] for each in run["attention"]] == [*text, *range(rows, rows + 5)]
        for each in run["attention"]:
            steps = [base64.b64decode(layer) for layer in each["steps"]]
            assert len(steps) == LAYERS and all(len(layer) == len(question["patches"]["boxes"]) for layer in steps)
            assert all(max(layer) in (0, 255) for layer in steps)
    # Of a dense run's last row the curve's layers and the picture's share are those of the lens.
    last = next(each for each in question["runs"]["dense"]["attention"] if each["row"] == rows - 1)
    shares = [layer["image"] for layer in question["runs"]["dense"]["shares"]]
    assert last["image"] == pytest.approx(shares, rel=2e-3)


def test_visual_rows_are_recorded_when_asked_for(folder, picture, tmp_path):
    path = tmp_path / "report.html"
    options = ["--image", str(picture), "--question", "what", "--model-path", str(folder), "-o", str(path)]
    report.main([*options, "--rows", "all", "--no-compare", "--max-new-tokens", "1"])
    data = data_of(path)
    (run,) = data["questions"][0]["runs"].values()
    recorded = {each["row"]: each for each in run["attention"]}
    assert data["runs"] == ["pruned"] and set(run["trace"]["visual_positions"]) <= set(recorded)
    gone = next(row for row in run["trace"]["visual_positions"] if row not in run["trace"]["kept_positions"])
    assert recorded[gone]["image"][0] is not None and recorded[gone]["image"][-1] is None


def test_many_questions_have_a_table_and_a_rate_of_agreement(questions):
    data = data_of(questions)
    agree = [each["runs"]["dense"]["answer"] == each["runs"]["pruned"]["answer"] for each in data["questions"]]
    assert [each["agree"] for each in data["questions"]] == agree
    assert data["overview"]["questions"] == 3 and data["overview"]["agreement"] == sum(agree) / 3
    assert data["overview"]["expected"] == 1 and data["overview"]["right"] == {"dense": 0, "pruned": 0}
    text = html.unescape(questions.read_text())
    assert "answered as dense" in text and f"{sum(agree)} of 3" in text
    parsed = Page(questions.read_text())
    assert [
        dict(attributes).get("id") for tag, attributes in parsed.tags if dict(attributes).get("class") == "question"
    ] == ["question-0", "question-1", "question-2"]
    assert parsed.count("b") == 0


def test_the_page_says_what_happened(page):
    text = html.unescape(page.read_text())
    for word in (
        "paper",
        "fastv",
        "prompt",
        "executed",
        "vision-related",
        "torch",
        "transformers",
        "layer_threshold",
        "time to first token",
        "keys and values",
        "shallow",
    ):
        assert word in text
    assert QUESTION in text
    for key, value in PRUNING.items():
        assert f'"{key}": {json.dumps(value)}' in text


def test_every_image_and_chart_has_words(page):
    for tag, attributes in Page(page.read_text()).tags:
        if tag == "img":
            assert attributes.get("alt")
        if tag in ("svg", "canvas") and "aria-hidden" not in attributes:
            assert attributes.get("role") == "img" and attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")


def test_an_old_report_stays_until_the_new_one_is_whole(folder, picture, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    options = ["--image", str(picture), "--question", "what", "--model-path", str(folder), "-o", str(path)]
    with pytest.raises(UserError, match="exists; name another file, or give --overwrite"):
        report.main(options)
    assert path.read_text() == "old"
    options += ["--overwrite"]

    def fail(*args):
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "replace", fail)
        with pytest.raises(UserError, match="No space left on device"):
            report.main([*options, "--max-new-tokens", "2"])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    report.main([*options, "--max-new-tokens", "2"])
    assert path.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"-o": "no/such/folder/r.html"}, "does not exist"),
        ({"-o": "."}, "is a folder"),
        ({"--question": "  "}, "--question is empty"),
        ({"--questions": "q.jsonl"}, "leave out --image and --question"),
        ({"--image-folder": "."}, "--image-folder is for the pictures of --questions"),
        ({"--json-output": "no/such/folder/r.json"}, "--json-output 'no/such/folder/r.json': folder"),
        ({"--image": "missing.png"}, "missing.png"),
        ({"--pruning-config": '{"mode": ["sideways"]}'}, "sideways"),
        ({"--max-new-tokens": "0"}, "must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(folder, picture, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(report, "LoadedModel", lambda *args: pytest.fail("weights were read"))
    options = {
        "--image": str(picture),
        "--question": "what",
        "--model-path": str(folder),
        "-o": str(tmp_path / "r.html"),
        **change,
    }
    with pytest.raises(UserError, match=re.escape(message)):
        report.main([part for pair in options.items() for part in pair])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question_id": 1, "text": "what"}, 'question 1 has no "image"'),
        ({"question_id": 1, "text": " ", "image": "0.png"}, '"text" is empty'),
        ({"question_id": 1, "text": "what", "image": "../0.png"}, "leads out of"),
        ({"question_id": 1, "text": "what", "image": "absent.png"}, "none of the images"),
        ({"question_id": 1, "text": "what " * 9000, "image": "0.png"}, "question 1: the prompt has"),
    ],
)
def test_bad_question_files_are_refused_before_weights_are_read(folder, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(report, "LoadedModel", lambda *args: pytest.fail("weights were read"))
    noise((60, 60)).save(tmp_path / "0.png")
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    options = ["--questions", str(tmp_path / "q.jsonl"), "--model-path", str(folder), "-o", str(tmp_path / "r.html")]
    with pytest.raises(UserError, match=re.escape(message)):
        report.main(options)


def strokes(text):
    """Colour and dashes of every rule of the style sheet that draws a line in a chart."""
    rules = re.findall(r"svg \.((?:curve\.)?\w+) \{ ([^}]*stroke: var\(--(\w+)\)[^}]*)\}", text)
    return {
        name: (colour, (re.findall(r"stroke-dasharray: ([\d ]+)", rule) or ["solid"])[0])
        for name, rule, colour in rules
    }


def test_no_two_lines_of_the_curve_share_colour_or_dashes(page):
    style = re.search(r"<style>(.*?)</style>", page.read_text(), re.S).group(1)
    lines = strokes(style)
    drawn = [
        lines[name]
        for name in ("curve.dense", "curve.pruned", "layer_threshold", "exit_threshold", "selection", "exit")
    ]
    assert len({colour for colour, _ in drawn}) == len({dashes for _, dashes in drawn}) == len(drawn)


@pytest.fixture(scope="module")
def driver():
    with chromium() as browser:
        yield browser


def seen(driver, run):
    """The canvas of one run's view, and what is said below it."""
    return driver.execute_script(
        f"const v = document.querySelector('.view[data-run={run}]');"
        "return [v.querySelector('canvas').toDataURL(), v.querySelector('figcaption').textContent,"
        " v.querySelector('canvas').getAttribute('aria-label')]"
    )


def test_in_a_browser(page, driver):
    driver.get(page.as_uri())
    blank = "const c = document.createElement('canvas'), v = document.querySelector('canvas');"
    blank += "c.width = v.width; c.height = v.height; return c.toDataURL()"
    nothing = driver.execute_script(blank)
    assert seen(driver, "dense")[:2] == [nothing, "All 16 visual tokens are there."], "opens on the picture itself"
    slider = driver.find_element("css selector", ".layer")
    slider.send_keys("\ue011")  # Home
    assert seen(driver, "pruned")[0] == nothing
    slider.send_keys("\ue010")  # End
    assert seen(driver, "pruned")[1] == "0 of 16 visual tokens are there."
    slider.send_keys("\ue011")
    driver.find_element("css selector", "input[value=attention]").click()
    first, words, label = seen(driver, "dense")
    assert first != nothing and "% of its attention to the picture" in words and label == f"dense: {words}"
    slider.send_keys("\ue014")  # right arrow: the keyboard moves it
    assert seen(driver, "dense")[0] != first
    options = driver.find_elements("css selector", "select[name=row] option")
    rows = [int(option.get_attribute("value")) for option in options]
    assert rows == sorted(rows) and len(rows) > 6
    before = seen(driver, "dense")[1]
    select = "const s = document.querySelector('select[name=row]'); s.selectedIndex = 0;"
    driver.execute_script(f"{select} s.dispatchEvent(new Event('input', {{bubbles: true}}))")
    assert seen(driver, "dense")[1].startswith(f"Row {rows[0]} gives") and seen(driver, "dense")[1] != before
    assert driver.execute_script("return document.title").startswith("what is </script>")
    assert driver.execute_script("return document.getElementById('save').href").startswith("blob:")
    assert console_errors(driver) == []


def test_a_row_of_the_overview_opens_its_question(questions, driver):
    driver.get(questions.as_uri())
    opened = "return [...document.querySelectorAll('details.question')].map((each) => each.open)"
    assert driver.execute_script(opened) == [True, False, False]
    driver.find_element("css selector", "a[href='#question-2']").click()
    assert driver.execute_script(opened) == [True, False, True]
    words = "return document.querySelectorAll('#question-2 figcaption')[1].textContent"
    assert "visual tokens are there" in driver.execute_script(words)
    assert console_errors(driver) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out(page, questions, driver, scheme):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for path in (page, questions):
        driver.get(path.as_uri())
        driver.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 391
        page_colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (page_colour == "rgb(255, 255, 255)") == (scheme == "light")
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
