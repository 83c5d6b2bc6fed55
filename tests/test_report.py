"""The report page: what is in it, that nothing foreign runs in it, and how it behaves in a browser."""

from __future__ import annotations

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
OWN_TAGS = {"img": 2}  # the picture, and the kept patches


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
    assert report.main([*options, "--compare", "--max-new-tokens", "6"]) == 0
    return path


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


def test_embedded_data_cannot_end_its_script(page):
    text = page.read_text()
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    assert "<" not in raw and ">" not in raw
    data = json.loads(raw)
    assert set(data["runs"]) == {"pruned", "dense"}
    for run in data["runs"].values():
        assert len(run["attention"]) == len(run["there"]) == LAYERS
        assert all(max(layer) in (0, 255) for layer in run["attention"])
    assert data["runs"]["dense"]["count"] == [16] * LAYERS
    counts = data["runs"]["pruned"]["count"]
    assert counts[0] == 16 and counts[-1] == 0 and counts == sorted(counts, reverse=True)


def test_the_page_says_what_happened(page):
    text = html.unescape(page.read_text())
    for word in ("paper", "fastv", "prompt", "executed", "vision-related", "torch", "transformers", "layer_threshold"):
        assert word in text
    assert QUESTION in text
    for key, value in PRUNING.items():
        assert f'"{key}": {json.dumps(value)}' in text


def test_every_image_and_chart_has_words(page):
    for tag, attributes in Page(page.read_text()).tags:
        if tag == "img":
            assert attributes.get("alt")
        if tag in ("svg", "canvas"):
            assert attributes.get("role") == "img" and attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")


def test_an_old_report_stays_until_the_new_one_is_whole(folder, picture, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    options = ["--image", str(picture), "--question", "what", "--model-path", str(folder), "-o", str(path)]

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


def test_in_a_browser(page):
    with chromium() as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return document.querySelectorAll('#overlay').length") == 1
        read = "const c = document.getElementById('overlay'); return c.toDataURL()"
        said = "return document.getElementById('said').textContent"
        slider = driver.find_element("id", "layer")
        slider.send_keys("\ue011")  # Home
        first, words = driver.execute_script(read), driver.execute_script(said)
        assert words.startswith("Layer 0, pruned:")
        slider.send_keys("\ue014")  # right arrow: the keyboard moves it
        second = driver.execute_script(read)
        assert driver.execute_script(said).startswith("Layer 1, pruned:") and second != first
        driver.find_element("css selector", "input[value=dense]").click()
        assert driver.execute_script(said).startswith("Layer 1, dense:")
        driver.find_element("css selector", "input[value=kept]").click()
        assert "16 of 16 patches" in driver.execute_script(said)
        assert driver.execute_script("return document.getElementById('overlay').getAttribute('aria-label')").startswith(
            "Layer 1, dense:"
        )
        assert driver.execute_script("return document.title").startswith("what is </script>")
        assert console_errors(driver) == []


def test_on_a_phone_nothing_sticks_out(page):
    with chromium() as driver:
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 391
