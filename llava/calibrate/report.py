"""What a calibration leaves: the config, every figure as JSON and CSV, a picture and a page."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llava.calibrate.candidates import key_of
from llava.calibrate.goal import Figure, Result
from llava.calibrate.measure import contribution_order, withdrawal_layer
from llava.calibrate.search import FLOOR, Calibration, Family
from llava.eval.files import to_json
from llava.eval.scoring import show
from llava.utils import write_whole

VTW_ETA = 0.003
"""VTW's published bound for LLaVA-1.5-7B (arXiv 2405.05803)."""
_FEW_PICTURES = 32  # of both halves together
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def plain(result: Result | None) -> dict[str, Any] | None:
    """A result as JSON."""
    if result is None:
        return None
    figures = {
        name: {"mean": value.mean, "interval95": [value.low, value.high]}
        for name, value in vars(result).items()
        if isinstance(value, Figure)
    }
    times = {"milliseconds": result.milliseconds, "time_ratio": result.time_ratio}
    return {"n": result.n, **figures, **{name: value for name, value in times.items() if value is not None}}


def family_dict(family: Family) -> dict[str, Any]:
    """A method's candidates, what they were expected to do and what they did."""
    expected = {key_of(candidate.method): candidate for candidate in family.candidates}
    return {
        "meets_the_goal": family.meets,
        "why_not_tried": family.why_not or None,
        "candidates_swept": len(family.candidates),
        "looks_at_held_out": family.looks,
        "config": family.held_out.method.to_dict() if family.held_out else None,
        "held_out": plain(family.held_out),
        "run": [
            {
                "config": result.method.to_dict(),
                "predicted": {
                    "saved": expected[key_of(result.method)].saving,
                    "unread": expected[key_of(result.method)].unread,
                },
                "to_choose_on": plain(result),
            }
            for result in family.results
        ],
    }


def curves(found: Calibration) -> dict[str, Any]:
    """The methods' own pictures: what was measured, over the prompts to choose on."""
    measures, wanted = found.recording.measures, found.wanted
    drawn: dict[str, Any] = {}
    if wanted.shares:
        smallest = np.stack([each.cosine[0].min(-1) for each in measures])
        drawn["smallest_cosine"] = {
            "quantiles": list(_QUANTILES),
            "per_layer": np.quantile(smallest, _QUANTILES, axis=0).T.tolist(),
        }
    if len(wanted.boundaries):
        drawn["blind_below"] = {
            "layers": list(wanted.boundaries),
            "divergence": np.stack([each.blind for each in measures]).mean(0).tolist(),
        }
    if len(wanted.withdrawals):
        withdrawn = np.stack([each.withdrawn for each in measures])
        drawn["withdrawn_from"] = {
            "layers": list(wanted.withdrawals),
            "divergence": withdrawn.mean(0).tolist(),
            "vtw_eta": VTW_ETA,
            "vtw_layer": withdrawal_layer(withdrawn, wanted.withdrawals, VTW_ETA),
        }
    if len(wanted.frozen):
        frozen = np.stack([each.frozen for each in measures])
        drawn["frozen_alone"] = {
            "layers": list(wanted.frozen),
            "divergence": frozen.mean(0).tolist(),
            "shortv_order": [wanted.frozen[place] for place in contribution_order(frozen)],
        }
    return drawn


def write_results(found: Calibration, about: dict[str, Any], out: Path) -> None:
    """Write all files of the folder, say what was found, and where it is."""
    best = found.best
    chosen = best.held_out if best is not None else None
    measured = curves(found)
    document = {
        "about": about,
        "goal": str(found.goal),
        "best": best.name if best is not None else None,
        "pruning_config": chosen.method.to_dict() if chosen else None,
        "held_out": plain(chosen),
        "methods": {family.name: family_dict(family) for family in found.families},
        "measured": measured,
    }
    write_whole(out / "calibration.json", to_json(document))
    write_whole(out / "calibration.csv", table(found))
    written = ["calibration.json", "calibration.csv"]
    try:
        from llava.calibrate.page import draw, page
    except ImportError:
        print("No figure and no page: matplotlib or jinja2 is missing (extra: viz)", file=sys.stderr)
    else:
        figure = draw(found, measured)
        write_whole(out / "calibration.svg", figure)
        write_whole(out / "calibration.html", page(document, COLUMNS, rows_of(found), caveats(found, about), figure))
        written += ["calibration.svg", "calibration.html"]
    if chosen is not None:
        write_whole(out / "pruning_config.json", to_json(chosen.method.to_dict()))
        written.insert(0, "pruning_config.json")
    _say(found, about)
    print(f"{out}: {', '.join(written)}")


def table(found: Calibration) -> str:
    """Every config that was run, a line each, as CSV."""
    stream = io.StringIO()
    columns = ["method", "config", "prompts", "n"]
    for name in ("saved", "agreement", "divergence", "tokens"):
        columns += [name, f"{name}_low", f"{name}_high"]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*columns, "milliseconds", "time_ratio"])
    for family in found.families:
        held_out = [("held out", family.held_out)] if family.held_out else []
        for half, result in [*(("to choose on", result) for result in family.results), *held_out]:
            figures = [result.saved, result.agreement, result.divergence, result.tokens]
            values = [value for each in figures for value in (each.mean, each.low, each.high)]
            times = [result.milliseconds, result.time_ratio]
            writer.writerow([family.name, key_of(result.method), half, result.n, *values, *times])
    return stream.getvalue()


def percent(value: Figure) -> str:
    """``98.3 [96.1, 99.4] %``."""
    return f"{100 * value.mean:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}] %"


def rows_of(found: Calibration) -> list[tuple[str, ...]]:
    """Method, whether it meets the goal, and its figures on the held-out half, as text."""
    rows: list[tuple[str, ...]] = []
    for family in found.families:
        result = family.held_out
        if result is None:
            rows.append((family.name, "not tried", "–", "–", "–", "–"))
            continue
        verdict = "meets the goal" if family.meets else "does not"
        if family is found.best:
            verdict = "taken"
        elif family.name == FLOOR:
            verdict += " (floor)"
        if family.looks > 1:
            verdict += f", look {family.looks}"
        time = f"{result.time_ratio:.2f} x" if result.time_ratio is not None else "–"
        divergence = f"{result.divergence.mean:.4f}"
        rows.append((family.name, verdict, percent(result.saved), percent(result.agreement), divergence, time))
    return rows


COLUMNS = ("method", "verdict", "FLOPs saved", "answers as dense", "KL", "time")


def caveats(found: Calibration, about: dict[str, Any]) -> list[str]:
    """What a reader of the held-out figures must know, a sentence each."""
    said = []
    if not isinstance(about["data"]["questions"], str):
        said.append(
            "The questions are this program's own, and the result depends on them: give yours with --questions."
        )
    if about["data"]["pictures"] < _FEW_PICTURES:
        said.append(
            f"{about['data']['pictures']} pictures are few: intervals of so small halves are too narrow; "
            f"take {_FEW_PICTURES} or more."
        )
    if any(family.looks > 1 for family in found.families):
        said.append("Look 2 or 3: earlier choices failed on this half, so that what it says of this one flatters it.")
    return said


def _say(found: Calibration, about: dict[str, Any]) -> None:
    result = found.best.held_out if found.best is not None else None
    show(f"held-out half ({found.goal})", COLUMNS, rows_of(found))
    for family in found.families:
        if family.why_not:
            print(f"{family.name} was not tried: {family.why_not}")
    for sentence in caveats(found, about):
        print(sentence)
    if result is None:
        print("No config of these methods meets the budget; above is what the nearest of each does.")
        return
    print(f"Taken: {key_of(result.method)}")
