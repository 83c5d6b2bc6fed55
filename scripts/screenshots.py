"""Screenshots of the web chat and of the report, made by a headless Chromium: ``docs/figures/{web_chat,report}*.png``.

The shipped model answers questions about pictures that ship with it. To be looked at after every change of a page
(extra ``dev``, and Debian's chromium and chromium-driver):

    python scripts/screenshots.py
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

from llava.constants import SHIPPED_MODEL_PATH
from llava.examples import FOLDER
from llava.inference import LoadedModel, open_checkpoint
from llava.serve.gradio_pruning import example_pictures
from llava.serve.web.page import launch
from llava.serve.web.state import WebChat

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
SIZES = {"": (1280, 900), "_phone": (390, 844)}
THEMES = {"": "light", "_dark": "dark"}
PORT = 7864
PICTURE, QUESTIONS = "scene_2.png", ("What does the text in the image say?", "How many shapes are there?")


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, url: str, size: tuple[int, int], theme: str) -> None:
    """Open a page in a window of this size."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preferred = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
    driver.get(url)


def until(driver: Any, script: str, timeout: float = 300) -> None:
    """Wait for a script to return something true."""
    end = time.monotonic() + timeout
    while not driver.execute_script(script):
        if time.monotonic() > end:
            raise SystemExit(f"error: not in {timeout:.0f} s: {script}")
        time.sleep(0.2)


def ready(driver: Any, answers: int) -> None:
    """Wait until so many answers stand on the page of the web chat."""
    until(
        driver,
        "return (document.querySelector('#status') || {innerText: ''}).innerText.includes('Ready.') && "
        f"document.querySelectorAll('.answer:not(.growing)').length >= {answers}",
    )


def ask(driver: Any, question: str, answers: int) -> None:
    """Ask the web chat, and wait for so many answers in all."""
    driver.find_element("css selector", "#question textarea").send_keys(question)
    driver.find_element("id", "send").click()
    ready(driver, answers)


def save(driver: Any, name: str) -> None:
    """What is in the window, as a small PNG."""
    time.sleep(0.5)  # scrolling ends
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    path = FIGURES / f"{name}.png"
    image.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(FIGURES.parent.parent)}: {path.stat().st_size / 1024:.0f} KiB")


def web_chat(driver: Any) -> None:
    """The web chat: a pruned answer, then both answers to another question."""
    model = LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH))
    page = launch(WebChat(model, example_pictures()), "127.0.0.1", PORT)
    try:
        for suffix, size in SIZES.items():
            for tone, theme in THEMES.items():
                show(driver, page.local_url, size, theme)
                ready(driver, 0)
                if size == SIZES["_phone"] and theme == "light":
                    save(driver, "web_chat_phone_start")
                driver.find_element("css selector", "#upload input").send_keys(str(FOLDER / PICTURE))
                until(driver, "return document.querySelectorAll('#shown figure').length === 1")
                ask(driver, QUESTIONS[0], 1)
                compare = "[...document.querySelectorAll('#run label')].find(l => l.innerText.trim() === 'Compare')"
                driver.execute_script(f"{compare}.click()")
                ask(driver, QUESTIONS[1], 3)
                save(driver, f"web_chat{suffix}{tone}")
    finally:
        page.close(verbose=False)


def report(driver: Any) -> None:
    """The top of the report on the second question."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        program = [sys.executable, "-m", "llava.visualize.report", "--image", str(FOLDER / PICTURE)]
        subprocess.run([*program, "--question", QUESTIONS[1], "-o", str(page)], check=True)
        for suffix, (width, height) in SIZES.items():
            for tone, theme in THEMES.items():
                # Down to the pictures.
                show(driver, page.as_uri(), (width, height * 3 // 2), theme)
                save(driver, f"report{suffix}{tone}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages = {"web_chat": web_chat, "report": report}
    parser.add_argument("page", nargs="?", choices=pages, help="default: both")
    only = parser.parse_args().page
    FIGURES.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        for name in [only] if only else pages:
            pages[name](driver)


if __name__ == "__main__":
    main()
