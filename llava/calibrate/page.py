"""The figure and the page of a calibration. Needs matplotlib and jinja2 (extra `viz`)."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from llava.calibrate.search import FLOOR, Calibration

_LEAST = 1e-7  # divergences below are drawn here: rounding


def draw(found: Calibration, measured: dict[str, Any]) -> str:
    """Pareto curves of all methods, and what they were chosen by, as SVG."""
    panels = [name for name in ("smallest_cosine", "withdrawn_from", "blind_below", "frozen_alone") if name in measured]
    columns = 2
    lines = 1 + math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "calibration", "font.size": 9}):
        canvas = Canvas(figsize=(9.5, 4.2 + 2.9 * (lines - 1)), layout="constrained")
        grid = canvas.add_gridspec(lines, columns, height_ratios=[1.45, *[1] * (lines - 1)])
        _pareto(canvas.add_subplot(grid[0, :]), found)
        for number, name in enumerate(panels):
            axes = canvas.add_subplot(grid[1 + number // columns, number % columns])
            _PANELS[name](axes, measured[name])
            axes.set_xlabel("layer")
            axes.grid(alpha=0.25)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _pareto(axes: Any, found: Calibration) -> None:
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    named = [family for family in found.families if family.results]
    for number, family in enumerate(sorted(named, key=lambda each: each.name == FLOOR)):
        results = sorted(family.results, key=lambda result: result.saved.mean)
        color = "0.45" if family.name == FLOOR else colors[number % len(colors)]
        saved = [100 * result.saved.mean for result in results]
        agreed = [100 * result.agreement.mean for result in results]
        spread = [
            [100 * (result.agreement.mean - result.agreement.low) for result in results],
            [100 * (result.agreement.high - result.agreement.mean) for result in results],
        ]
        axes.errorbar(saved, agreed, spread, fmt="o", ms=3.5, lw=0.8, color=color, alpha=0.55)
        # The best at each saving or more: a curve that never rises.
        best = [max(agreed[place:]) for place in range(len(agreed))]
        axes.step(saved, best, where="pre", color=color, lw=1.4, ls="--" if family.name == FLOOR else "-")
        axes.plot([], [], color=color, ls="--" if family.name == FLOOR else "-", label=family.name)
    axes.plot([0], [100], "s", color="k", ms=6, label="dense")
    if found.best is not None and found.best.held_out is not None:
        taken = found.best.held_out
        low, high = (100 * each for each in (taken.agreement.low, taken.agreement.high))
        mean = 100 * taken.agreement.mean
        axes.errorbar(
            [100 * taken.saved.mean],
            [mean],
            [[mean - low], [high - mean]],
            fmt="*",
            ms=15,
            color="gold",
            mec="k",
            ecolor="k",
            zorder=5,
            label=f"taken: {found.best.name}, held-out half",
        )
    if found.goal.save_flops is not None:
        axes.axvline(100 * found.goal.save_flops, color="0.3", lw=1, ls=":")
    if found.goal.min_agreement is not None:
        axes.axhline(100 * found.goal.min_agreement, color="0.3", lw=1, ls=":")
    axes.set_xlabel("executed prefill FLOPs saved, %")
    axes.set_ylabel("greedy answers as dense, %")
    axes.set_title("Points: on the half to choose on, 95 % intervals. Dotted: the budget")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower left")


def _smallest_cosine(axes: Any, measured: dict[str, Any]) -> None:
    bands = list(zip(*measured["per_layer"], strict=True))
    gaps = [[max(1 - value, _LEAST) for value in band] for band in bands]
    layers = range(len(gaps[0]))
    axes.fill_between(layers, gaps[0], gaps[-1], alpha=0.15, lw=0)
    axes.fill_between(layers, gaps[1], gaps[-2], alpha=0.3, lw=0)
    axes.plot(layers, gaps[len(gaps) // 2], lw=1.5)
    axes.set_yscale("log")
    axes.set_title("VisiPruner: 1 - smallest cosine (median, quartiles, all)")


def _divergence(axes: Any, measured: dict[str, Any], title: str, bars: bool = False) -> None:
    values = [max(value, _LEAST) for value in measured["divergence"]]
    (axes.bar if bars else axes.plot)(measured["layers"], values, **({} if bars else {"marker": "o", "ms": 3}))
    axes.set_yscale("log")
    axes.set_title(title)


def _withdrawn(axes: Any, measured: dict[str, Any]) -> None:
    _divergence(axes, measured, "KL with the picture gone from this layer on (VTW, exit)")
    axes.axhline(measured["vtw_eta"], color="0.3", lw=1, ls=":")


_PANELS = {
    "smallest_cosine": _smallest_cosine,
    "withdrawn_from": _withdrawn,
    "blind_below": lambda axes, one: _divergence(axes, one, "KL with text blind below this layer (shallow stage)"),
    "frozen_alone": lambda axes, one: _divergence(axes, one, "KL with this layer alone frozen (ShortV)", bars=True),
}


def page(
    document: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caveats: Sequence[str],
    figure: str,
) -> str:
    """One HTML file that needs no network and runs no script.

    Args:
        document: what `calibration.json` holds.
        columns, rows: the table of the held-out half, as text.
        caveats: sentences below it.
        figure: SVG, of `draw`.
    """
    environment = Environment(
        loader=PackageLoader("llava.calibrate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("calibration.html.j2").render(
        goal=document["goal"],
        best=document["best"],
        config=json.dumps(document["pruning_config"], ensure_ascii=False) if document["best"] else None,
        about=document["about"],
        columns=columns,
        rows=rows,
        caveats=caveats,
        why_not={name: each["why_not_tried"] for name, each in document["methods"].items() if each["why_not_tried"]},
        command=shlex.join(document["about"]["command"]),
        measured=document["measured"],
        figure=Markup(figure[figure.index("<svg") :]),  # drawn here, from numbers and names of methods
    )
