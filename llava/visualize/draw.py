"""Drawings of what the lenses give (extra `viz`). Each function takes plain arrays and returns a matplotlib figure.

Colours are told apart by people with any colour vision (cividis, and Okabe and Ito's set), and bars by hatching too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch as Frame
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .lenses import Shares, TopTokens
from .overlay import BLUE, GREEN, GREY, GROUPS, ORANGE, SKY, mixed, overlay_kept, overlay_stay
from .patches import PatchMap, Stay, View

MAP = "cividis"


def draw_top_tokens(top: TopTokens, title: str, rows: Sequence[str] | None = None) -> Figure:
    """A table: a row for each layer, its likeliest tokens from left to right, darker where likelier.

    Args:
        top: [rows, k].
        title: of the figure.
        rows: a name for each row; absent, those of the logit lens (the input, then layer 0, 1, …).
    """
    count, k = top.ids.shape
    names = list(rows) if rows is not None else ["input", *(f"layer {n}" for n in range(count - 1))]
    figure = Figure(figsize=(1.5 + 1.35 * k, 1.1 + 0.3 * count), layout="constrained")
    axes = figure.subplots()
    shades = np.nan_to_num(top.probabilities)
    image = axes.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row in range(count):
        for column in range(k):
            if not top.texts[row, column]:
                continue
            text = f"{shorten(top.texts[row, column])}  {top.probabilities[row, column]:.2f}"
            colour = "white" if shades[row, column] > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set_xticks(range(k), [f"{n + 1}." for n in range(k)], fontsize=8)
    axes.set_xlabel("rank of the token")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="probability", fraction=0.04)
    return figure


def draw_token_probabilities(probabilities: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """How likely chosen tokens are in the logit lens, layer by layer. `probabilities`: [L + 1, tokens]."""
    figure, axes = _layers_figure()
    styles = ("-", "--", ":", "-.")
    colours = (BLUE, ORANGE, GREEN, GREY, SKY)
    layers = np.arange(-1, len(probabilities) - 1)
    for number, name in enumerate(names):
        axes.plot(
            layers,
            probabilities[:, number],
            styles[number % len(styles)],
            color=colours[number % len(colours)],
            marker="o",
            markersize=3,
            label=shorten(name),
        )
    axes.set_xlabel("layer (−1: the input)")
    axes.set_ylabel("probability")
    axes.set_ylim(-0.03, 1.03)
    _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def draw_on_picture(
    picture: Image.Image,
    patches: PatchMap,
    scores: np.ndarray,
    names: Sequence[str],
    title: str,
    label: str,
    view: View | None = None,
    columns: int = 4,
    shared_scale: bool = False,
) -> Figure:
    """Scores of the visual rows over the picture, a panel for each row of `scores`.

    Args:
        picture, patches: what the rows look at.
        scores: [panels, visual rows]; NaN counts as 0.
        names: a title for each panel.
        title: of the figure.
        label: what is measured, with its unit.
        view: only the whole picture or only the tiles of an anyres picture.
        columns: panels side by side.
        shared_scale: one colour scale for all panels; else each has its own, and the panel names its maximum.
    """
    columns = min(columns, len(scores))
    lines = ceil(len(scores) / columns)
    aspect = picture.height / picture.width
    width = 2.1 * columns
    figure = Figure(figsize=(width + 1.0, lines * (2.1 * aspect + 0.4) + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    maps = [patches.heatmap(np.nan_to_num(each), view) for each in scores]
    top = max((each.max() for each in maps), default=0.0)
    small = picture.convert("L").resize((maps[0].shape[1], maps[0].shape[0]))
    for axes in panels:
        axes.set_axis_off()
    for axes, heat, name in zip(panels, maps, names, strict=False):
        limit = top if shared_scale else heat.max()
        axes.imshow(small, cmap="gray", vmin=0, vmax=255)
        axes.imshow(heat, cmap=MAP, vmin=0, vmax=limit or 1.0, alpha=0.72, interpolation="nearest")
        axes.set_title(name if shared_scale else f"{name} (max {heat.max():.2g})", fontsize=8)
    scale = ScalarMappable(Normalize(0, top or 1.0 if shared_scale else 1.0), MAP)
    bar = figure.colorbar(scale, ax=figure.axes, fraction=0.03, shrink=min(1.0, 2.0 / lines + 0.3))
    bar.set_label(label if shared_scale else f"{label}, share of the panel's maximum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_shares(shares: Shares, title: str, select_layer: int | None = None, exit_layer: int | None = None) -> Figure:
    """Stacked bars: where one row's attention goes in every layer."""
    figure, axes = _layers_figure()
    layers, base = np.arange(len(shares.image)), np.zeros(len(shares.image))
    parts = [
        ("prefix", shares.prefix, GREY, ""),
        ("image", shares.image, ORANGE, "///"),
        ("text behind it", shares.text, BLUE, ""),
        ("lost in the shallow stage", shares.lost, "white", "..."),
    ]
    for name, share, colour, hatch in parts:
        if share.max() > 0.001:
            axes.bar(layers, share, bottom=base, color=colour, hatch=hatch, edgecolor="#333333", width=0.8, label=name)
        base = base + share
    _stage_lines(axes, select_layer, exit_layer)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of attention (mean over heads)")
    _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def draw_sinks(norms: np.ndarray, attention: np.ndarray, layer: int, title: str) -> Figure:
    """Each visual row of one layer: the L1 norm of its values against the attention it gets.

    Rows far to the right and low are sinks: looked at, with little to give. `norms`, `attention`: [visual rows].
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(attention, norms, s=16, color=BLUE, alpha=0.7, edgecolors="none")
    for row in np.argsort(-np.nan_to_num(attention))[:3]:
        # To the left of the point: the most attended rows are at the right edge.
        place: dict[str, Any] = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(f"patch {row}", (attention[row], norms[row]), **place)
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"attention from the recorded row, layer {layer} (mean over heads)")
    axes.set_ylabel("L1 norm of the values")
    axes.set_title(title, fontsize=10)
    return figure


def draw_norms_per_layer(norms: np.ndarray, attention: np.ndarray, title: str) -> Figure:
    """The most-attended visual row's value norm in every layer, inside the range of all visual rows.

    Args:
        norms, attention: [L, visual rows]; NaN where rows were pruned.
    """
    figure, axes = _layers_figure()
    there = ~np.isnan(norms).all(axis=1)
    layers = np.flatnonzero(there)
    low, middle, high = (np.nanquantile(norms[there], q, axis=1) for q in (0.05, 0.5, 0.95))
    axes.fill_between(layers, low, high, color=SKY, alpha=0.35, label="5 % to 95 % of the visual rows")
    axes.plot(layers, middle, color=BLUE, label="their median")
    most = np.nan_to_num(attention[there]).argmax(axis=1)
    axes.plot(layers, norms[layers, most], "o--", color=ORANGE, markersize=4, label="the row most attended to")
    axes.set_ylabel("L1 norm of the values")
    axes.set_ylim(bottom=0)
    _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def draw_kept(picture: Image.Image, patches: PatchMap, kept: np.ndarray, title: str) -> Figure:
    """The picture with the kept patches bright and outlined. `kept`: bool [visual rows]."""
    scale = 4.2 / max(picture.size)
    figure = Figure(figsize=(picture.width * scale + 0.3, picture.height * scale + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(overlay_kept(picture, patches, kept))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return figure


def draw_stays(
    picture: Image.Image,
    patches: PatchMap,
    stays: Mapping[str, Stay],
    title: str,
    columns: int = 4,
) -> Figure:
    """The picture once for each run, each patch the paler, the sooner it left.

    Args:
        picture, patches: what the rows look at.
        stays: what became of the patches, by what stands above the panel; the first line in bold.
        title: of the figure.
        columns: panels side by side.
    """
    columns = min(columns, len(stays))
    lines = ceil(len(stays) / columns)
    side = 2.2
    size = side * columns, lines * (side * picture.height / picture.width + 0.65) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, stay) in zip(panels, stays.items(), strict=False):
        axes.imshow(overlay_stay(picture, patches, stay))
        head, _, rest = name.partition("\n")
        rest = ", ".join(filter(None, [rest, f"{stay.without_patch} of no patch" if stay.without_patch else ""]))
        axes.set_title(rest, fontsize=8, pad=4, parse_math=False)
        above = {"xytext": (0, 6 + 10 * len(rest.splitlines())), "textcoords": "offset points", "ha": "center"}
        axes.annotate(head, (0.5, 1), xycoords="axes fraction", fontsize=9, weight="bold", parse_math=False, **above)
    keys = [Frame(facecolor="white", edgecolor=ORANGE, linewidth=1.5, label="stays, a token of its own")]
    if any(stay.groups for stay in stays.values()):
        label = "one token for several"
        keys.append(Frame(facecolor=mixed(GROUPS[0], 0.5), edgecolor=GROUPS[0], linewidth=1.5, label=label))
    keys.append(Frame(facecolor="#dddddd", label="gone: the paler, the sooner"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    figure.suptitle(title + "\n", fontsize=11)
    return figure


def draw_cosine_curve(
    curves: Mapping[str, np.ndarray],
    title: str,
    thresholds: Mapping[str, float] | None = None,
    select_layer: int | None = None,
    exit_layer: int | None = None,
) -> Figure:
    """The smallest cosine of every layer, with the thresholds that decide.

    Args:
        curves: float [L] by name; NaN where nothing was measured.
        thresholds: by name.
    """
    figure, axes = _layers_figure()
    styles = (("o-", BLUE), ("s--", ORANGE), ("^:", GREEN))
    for number, (name, curve) in enumerate(curves.items()):
        style, colour = styles[number % len(styles)]
        axes.plot(np.arange(len(curve)), curve, style, color=colour, markersize=4, label=name)
    limits = ((GREY, (0, (6, 3))), ("#CC79A7", (0, (1, 2))))  # of neither a curve's colour nor its dashes
    for (name, value), (colour, dashes) in zip((thresholds or {}).items(), cycle(limits), strict=False):
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.4, label=f"{name} {value:g}")
    _stage_lines(axes, select_layer, exit_layer)
    axes.set_ylabel("smallest cos(o − c, o) of a visual row")
    _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def draw_rows_per_layer(rows: Sequence[int], num_visual: int, title: str) -> Figure:
    """Rows each layer processed: text, and the visual rows still there, beside what a dense run processes.

    Args:
        rows: [L].
        num_visual: visual rows of the unpruned prompt; layer 0 holds all rows.
    """
    figure, axes = _layers_figure()
    counts, layers = np.asarray(rows), np.arange(len(rows))
    text = counts[0] - num_visual
    axes.bar(layers, np.full(len(counts), text), color=BLUE, edgecolor="#333333", width=0.8, label="text")
    axes.bar(
        layers, counts - text, bottom=text, color=ORANGE, hatch="///", edgecolor="#333333", width=0.8, label="visual"
    )
    axes.axhline(counts[0], color="#333333", linestyle="--", linewidth=1, label=f"dense: {counts[0]}")
    axes.set_ylabel("rows processed in the prefill")
    _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def draw_savings(savings: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """FLOPs saved, a group of bars for each convention and a bar for each run. `savings`: run → convention → share."""
    names = list(next(iter(savings.values())))
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = ((BLUE, ""), (ORANGE, "///"), (GREEN, "..."), (SKY, "xx"), (GREY, "\\\\"))
    width = 0.8 / len(savings)
    for number, (run, saved) in enumerate(savings.items()):
        colour, hatch = styles[number % len(styles)]
        at = np.arange(len(names)) + (number - (len(savings) - 1) / 2) * width
        bars = axes.bar(
            at, [saved[name] for name in names], width, color=colour, hatch=hatch, edgecolor="#333333", label=run
        )
        axes.bar_label(bars, [f"{saved[name]:.0%}" for name in names], fontsize=7, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("convention")
    axes.set_ylabel("FLOPs saved in the prefill")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.15)
    if len(savings) > 1:
        _legend(axes)
    axes.set_title(title, fontsize=10)
    return figure


def shorten(text: str, length: int = 12) -> str:
    """A token's text cut to fit a table."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _layers_figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _stage_lines(axes: Any, select_layer: int | None, exit_layer: int | None) -> None:
    for name, layer, colour, style in (
        ("selection", select_layer, "black", "-"),
        ("exit", exit_layer, "#5E3C99", "-."),
    ):
        if layer is not None:
            axes.axvline(layer, color=colour, linestyle=style, linewidth=1.2, label=f"{name}: layer {layer}")
