"""What the terminal shows of an answer: text as it streams, tables, and kept patches in half blocks."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llava.inference import Answer, LoadedModel
from llava.pruning import Method
from llava.pruning.flops import CONVENTIONS
from llava.serve.chat import ChatSession, Comparison
from llava.serve.describe import describe, expected_speed, rows_in_words
from llava.utils import clean_text
from llava.visualize.patches import PatchMap, kept_in_words, kept_rows, patch_maps

RANDOM_DRAWS = 3
_LONGEST_WORD = 30  # a longer one is not waited for: some scripts have no spaces


def notes() -> Console:
    """Where everything goes that nobody asked for: standard error."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())


def replies() -> Console:
    """Where what was asked for goes: standard output."""
    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


class Stream:
    """Writes an answer to standard output as it comes; in a terminal no word breaks at the end of a line."""

    def __init__(self) -> None:
        self._width = Console().width if sys.stdout.isatty() else None
        self._column, self._gap, self._word = 0, "", ""

    def __call__(self, text: str) -> None:
        text = clean_text(text)
        if self._width is None:
            self._write(text)
            return
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            if piece.isspace():
                self._end_word()
                self._gap += piece
            else:
                self._word += piece
            if piece == "\n" or cell_len(self._word) > _LONGEST_WORD:
                self._end_word()
                self._break_line() if piece == "\n" else None

    def end(self) -> None:
        """The answer is complete: end its line."""
        self._end_word()
        self._write("\n")
        self._column, self._gap = 0, ""

    def _end_word(self) -> None:
        if not self._word:
            return
        length = cell_len(self._gap) + cell_len(self._word)
        if self._width is not None and self._column and self._gap and self._column + length > self._width:
            self._write("\n")
            self._column, self._gap = 0, ""
            length = cell_len(self._word)
        self._write(self._gap + self._word)
        self._column += length
        self._gap = self._word = ""

    def _break_line(self) -> None:
        self._write("\n")
        self._column, self._gap = 0, ""

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)


# --- an answer in numbers ---


def comparison_table(both: Comparison) -> Table:
    """Dense and pruned beside each other."""
    dense, pruned = both.dense, both.pruned
    table = Table("", "dense", "pruned", show_lines=False)

    def row(name: str, value: Callable[[Answer], str]) -> None:
        table.add_row(name, Text(value(dense)), Text(value(pruned)))

    def saved(convention: str) -> Callable[[Answer], str]:
        return lambda answer: f"{answer.flops_saved[convention]:.1%}" if answer.flops_saved else "–"

    row("answer", lambda answer: clean_text(answer.text))
    row("visual tokens kept", lambda answer: f"{answer.kept} of {answer.visual_tokens}")
    row("selecting layer", lambda answer: _layer(answer.trace.select_layer if answer.trace else None))
    row("exit layer", lambda answer: _layer(answer.trace.exit_layer if answer.trace else None))
    row("rows per layer", lambda answer: rows_in_words(answer.rows_per_layer))
    row("FLOPs saved (paper)", saved("paper"))
    row("FLOPs saved (executed)", saved("executed"))
    row("time to first token", lambda answer: f"{answer.clock.first_token * 1000:.1f} ms")
    row("tokens/s", lambda answer: f"{answer.clock.tokens_per_second:.1f}" if answer.clock.tokens_per_second else "–")
    ratio = dense.clock.first_token / pruned.clock.first_token
    table.caption = Text(
        f"answers {'agree' if both.agree else 'differ'} · first token ×{ratio:.2f} as fast, measured once"
    )
    return table


def _layer(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def show_trace(answer: Answer, console: Console) -> None:
    """What the engine decided for an answer, layer by layer, and what the words mean."""
    trace = answer.trace
    if trace is None:
        console.print(f"dense: {rows_in_words(answer.rows_per_layer)} rows a layer")
        return
    table = Table("layer", "rows", "smallest cosine", "", title="prefill")
    for layer, rows in enumerate(trace.rows_per_layer):
        cosine = trace.smallest_cosine.get(layer)
        event = {trace.select_layer: "selected here", trace.exit_layer: "kept tokens gone"}.get(layer, "")
        table.add_row(str(layer), str(rows), "" if cosine is None else f"{cosine:.5f}", event)
    console.print(table)
    console.print("rows: of text and picture that the layer worked on")
    if trace.smallest_cosine:
        console.print(
            "smallest cosine: between the last row's attention output with all visual tokens and without the one "
            "that matters most; below layer_threshold the layer selects"
        )
    console.print(f"kept positions (rows of the prompt): {trace.kept_positions}")
    for convention, fraction in answer.flops_saved.items():
        console.print(f"FLOPs saved ({convention}): {fraction:.2%} – {CONVENTIONS[convention]}")


# --- kept patches ---


def draw_kept(image: Image.Image, patches: PatchMap, kept: np.ndarray, console: Console) -> None:
    """A picture, and beside it the same with what was not kept dimmed.

    In half blocks where the terminal has colours; else one mark a cell, full where something was kept. `NO_COLOR` is
    heeded. ``kept``: bool [rows of the picture].
    """
    if not patches.is_known:
        console.print(kept_in_words(kept))
        return
    fancy = console.is_terminal and not console.no_color and console.color_system and not console.is_dumb_terminal
    side = 48 if console.width >= 98 else 36
    width = max(2, round(side * min(1, image.width / image.height)))
    height = max(2, 2 * round(side * min(1, image.height / image.width) / 2))
    mask = Image.fromarray(patches.heatmap(kept.astype(float)) > 0)
    if not fancy or not _can_write("▀", console):
        marks = "█·" if _can_write("█·", console) else "#."
        shown = np.asarray(mask.resize((width, height // 2), Image.Resampling.NEAREST))
        for line in shown:
            console.print("".join(marks[0] if cell else marks[1] for cell in line))
        return
    small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
    stays = mask.resize((width, height), Image.Resampling.NEAREST)
    dimmed = Image.composite(small, Image.blend(small, Image.new("RGB", small.size, (96, 96, 96)), 0.85), stays)
    left, right = np.asarray(small), np.asarray(dimmed)
    for top in range(0, height, 2):
        line = Text()
        for part in (left, right):
            for upper, lower in zip(part[top], part[top + 1], strict=True):
                style = Style(color=Color.from_rgb(*map(int, upper)), bgcolor=Color.from_rgb(*map(int, lower)))
                line.append("▀", style)
            line.append("  ")
        console.print(line, no_wrap=True, crop=False)


def _can_write(text: str, console: Console) -> bool:
    try:
        text.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def show_patches(session: ChatSession, answer: Answer, console: Console) -> None:
    """What was kept of every picture of the newest answer's prompt."""
    if answer.trace is None or not answer.visual_tokens:
        console.print("nothing was pruned: every patch was there in every layer")
        return
    prompt = session.last_prompt()
    kept, begin = kept_rows(answer.trace), 0
    for picture, patches in zip(prompt.pictures, patch_maps(session.model.checkpoint, prompt), strict=True):
        own = kept[begin : begin + len(patches.boxes)]
        begin += len(own)
        console.print(clean_text(f"{picture.source}: {own.sum()} of {len(own)} patches kept"))
        draw_kept(picture.image, patches, own, console)


def show_what_choosing_does(session: ChatSession, answer: Answer, console: Console) -> None:
    """Kept patches, what they saved, what as many patches drawn at random answer, and what to expect of speed."""
    show_patches(session, answer, console)
    console.print(f"saved: {describe(answer)}")
    trace = answer.trace
    layers = len(answer.rows_per_layer)
    if trace is not None and trace.select_layer is not None and 0 < answer.kept < answer.visual_tokens:
        behind, images = trace.select_layer + 1, max(1, len(trace.image_spans))
        keep = answer.kept if images == 1 else answer.kept / answer.visual_tokens
        if behind < layers:
            prompt = session.last_prompt()
            draws = [
                Method.from_any({"method": "random", "keep": keep, "layer": behind, "seed": seed})
                for seed in range(RANDOM_DRAWS)
            ]
            said = [session.model.answer(prompt, draw, session.options).text or "(nothing)" for draw in draws]
            console.print(
                clean_text(f"as many patches drawn at random, {RANDOM_DRAWS} times, answer: {', '.join(said)}")
            )
    say_what_speed_to_expect(session, console)


def say_what_speed_to_expect(session: ChatSession, console: Console) -> None:
    """One line where the model is too small for pruning to make it faster."""
    model = session.model
    if isinstance(model, LoadedModel) and (expectation := expected_speed(model.num_parameters)):
        console.print(expectation)
