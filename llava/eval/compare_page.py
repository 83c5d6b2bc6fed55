"""What `llava.eval.compare` shows: tables, the figure, and one page that holds both and names its conventions."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.budgets import CONVENTION
from llava.eval.scoring import cell
from llava.eval.verdicts import DRAWS, SEED
from llava.pruning.flops import CONVENTIONS

DENSE = "dense"

FIGURES = (
    "score",
    "difference to dense, 95 % interval",
    "answers as dense, %",
    "as dense, 95 % interval",
    "tokens a layer, asked",
    "tokens a layer",
    "visual tokens kept",
    "selecting layer",
    "exit layer",
    "prefill GFLOP (executed)",
    *(f"prefill FLOPs saved, % ({name})" for name in CONVENTIONS),
    "KV after prefill, KiB",
    "first token, ms (p90)",
    "first token / dense",
    "decode tokens/s (p90)",
    "questions/s",
)
# What a terminal has room for where every run is a row.
_BRIEF = ("", "score", "answers as dense, %", "tokens a layer", "prefill FLOPs saved, % (executed)")
# What the page shows of every run; the rest is in report.json.
_OF_PAGE = (
    "",
    "score",
    "difference to dense, 95 % interval",
    "answers as dense, %",
    "as dense, 95 % interval",
    "tokens a layer, asked",
    "tokens a layer",
    "prefill GFLOP (executed)",
    "prefill FLOPs saved, % (executed)",
    "first token, ms (p90)",
    "first token / dense",
    "KV after prefill, KiB",
)

Table = tuple[list[str], list[tuple[Any, ...]]]


def has_budgets(result: dict[str, Any]) -> bool:
    """Whether knobs were found for numbers of tokens a layer."""
    return any(run["tokens_a_layer"]["asked"] for run in result["runs"].values())


def rows_of(result: dict[str, Any], figures: Sequence[str] = ("", *FIGURES)) -> Table:
    """Columns (`figures`) and a row a run of one benchmark's table, published scores at the end."""
    rows = []
    for name, run in result["runs"].items():
        pruning, difference = run["pruning"] or {}, run.get("score_difference")
        values = (
            run["scores"]["score"] if "scores" in run else None,
            difference and "{value:+.2f} ({0:+.2f} to {1:+.2f})".format(*difference["interval"], **difference),
            100 * run["agreement_with_dense"],
            "{:.1f} to {:.1f}".format(*(100 * bound for bound in run["agreement_interval"])),
            run["tokens_a_layer"]["asked"],
            run["tokens_a_layer"]["measured"],
            pruning.get("kept"),
            pruning.get("select_layer"),
            pruning.get("exit_layer"),
            run["prefill_flops"]["executed"] / 1e9,
            *(None if share is None else 100 * share for share in run["flops_saved"].values()),
            run["kv_bytes_after_prefill"] / 1024,
            _with_p90(run["time_to_first_token_s"], 1000),
            run["first_token_over_dense"],
            _with_p90(run["decode_tokens_per_s"], 1),
            run["questions_per_s"],
        )
        rows.append({"": name, **dict(zip(FIGURES, values, strict=True))})
    rows += [{"": f"{name}, published", "score": score} for name, score in result["published"].items()]
    return list(figures), [tuple(row.get(figure) for figure in figures) for row in rows]


def table(result: dict[str, Any]) -> Table:
    """A column a run and a row a figure; with methods at budgets, which are many runs, the other way round."""
    columns, rows = rows_of(result)
    if has_budgets(result):
        return columns, rows
    corner, *figures = zip(columns, *rows, strict=True)
    return list(corner), figures


def brief(result: dict[str, Any]) -> Table:
    """The table for a terminal."""
    return rows_of(result, _BRIEF) if has_budgets(result) else table(result)


def _with_p90(values: dict[str, float | None], scale: float) -> str | None:
    if values["median"] is None or values["p90"] is None:
        return None
    return f"{scale * values['median']:.1f} ({scale * values['p90']:.1f})"


def conventions(report: dict[str, Any]) -> dict[str, str]:
    """What the figures count, by name."""
    facts, scores = report["about"], []
    for name, result in report["benchmarks"].items():
        dense = result["runs"][DENSE].get("scores")
        if dense is None:
            continue
        words = f"{BENCHMARKS[name].title}: {BENCHMARKS[name].unit}"
        if "cognition" in dense:
            words += " (the sum of acc and acc+ over its tasks; Cognition, which some tables add, is not in it)"
        if "prompts" in dense:
            words += f" (prompts {', '.join(f'{kind}: {count}' for kind, count in dense['prompts'].items())})"
        scores.append(words)
    clock = {
        "first_token": "the clock on the wall",
        "first_token_processor": "processor time, which other programs on the machine disturb less",
    }[facts["first_token_compared_by"]]
    return {
        **({"score": "; ".join(scores)} if scores else {}),
        "difference to dense": f"of scores, with the 95 % interval of a paired bootstrap ({DRAWS} draws, seed {SEED}): "
        "both runs get the same questions, drawn anew within each category, MME's two questions of a picture together",
        "as dense": "answers that equal the dense run's to the letter, with the 95 % interval of a share (Wilson's)",
        "tokens a layer": CONVENTION,
        **{f"FLOPs ({name})": words for name, words in CONVENTIONS.items()},
        "first token": f"from the call to the first token of a batch of {facts['batch_size']}, vision tower in it, "
        "reading pictures not; every batch is asked of all runs, whose order turns; milliseconds by the clock on the "
        f"wall, median and 90th percentile over the batches; beside dense: median over the batches, by {clock}",
        "KV after prefill": f"bytes of keys and values that the prefill leaves, in {facts['dtype']}, mean of the "
        "questions",
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    facts = report["about"]
    parts = [
        f"# {facts['model']}: dense and pruned",
        f"{facts['hardware']}, {facts['device']}, {facts['dtype']}, batch {facts['batch_size']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}, {facts['time']}",
        "\n".join(f"- {name[0].upper()}{name[1:]}: {words}." for name, words in conventions(report).items()),
    ]
    for name, result in report["benchmarks"].items():
        unit = BENCHMARKS[name].unit if name in BENCHMARKS else "no score"
        questions = result["runs"][DENSE]["questions"]
        columns, rows = table(result)
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
        lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
        parts += [f"## {name} ({result['data']} data, {questions} questions; score: {unit})", "\n".join(lines)]
        parts += [f"{way} is left out: {why}" for way, why in result["left_out"].items()]
        for way, run in result["runs"].items():
            if run["pruning"]:
                parts.append(
                    f"{way}: `{json.dumps(run['config'])}`; questions by selecting layer "
                    f"{run['pruning']['select_histogram']}, by exit layer {run['pruning']['exit_histogram']}"
                )
    return "\n\n".join(parts) + "\n"


def plot(report: dict[str, Any]) -> bytes:
    """Score against executed FLOPs of the prefill, one panel a benchmark, as PNG; the grey line is the front that no
    run beats in both.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    scored = {
        name: result for name, result in report["benchmarks"].items() if "scores" in result["runs"][DENSE]
    } or report["benchmarks"]
    figure = Figure(figsize=(4.6 * len(scored), 4.0), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(scored), squeeze=False)[0], scored.items(), strict=True):
        has_score = "scores" in result["runs"][DENSE]
        lines: dict[str, list[tuple[float, float]]] = {}  # a method's budgets are one line
        for way, run in result["runs"].items():
            value = run["scores"]["score"] if has_score else 100 * run["agreement_with_dense"]
            executed = run["prefill_flops"]["executed"] / 1e9
            line = way.removesuffix(f"-{run['tokens_a_layer']['asked']}")
            lines.setdefault(line, []).append((executed, value))
        front = pareto_front([point for points in lines.values() for point in points])
        axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color="0.8", linewidth=5, zorder=0)
        markers = "o" + "s" * (len(lines) - 1) if not has_budgets(result) else "osv^<>DPX*hdp" * len(lines)
        for (line, points), marker in zip(lines.items(), markers, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=6, label=line)
            if not has_budgets(result):
                axes.annotate(line, points[0], xytext=(6, 6), textcoords="offset points")
        if has_budgets(result):
            axes.legend(fontsize=6, loc="lower right", ncols=2)
        axes.set_title(f"{BENCHMARKS[name].title if name in BENCHMARKS else name} ({result['data']} data)")
        axes.set_xlabel("executed prefill FLOPs, mean (GFLOP)")
        axes.set_ylabel(BENCHMARKS[name].unit if has_score else "answers as dense, %")
        axes.margins(y=0.3)
        # Room for the labels, which stand to the right of their points.
        axes.set_xlim(0, 1.3 * max(run["prefill_flops"]["executed"] / 1e9 for run in result["runs"].values()))
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of `(cost, worth)`, those that none costs less than and is worth as much, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or worth > front[-1][1]:
            front.append((cost, worth))
    return front


def page(report: dict[str, Any], figure: bytes) -> str:
    """One HTML file that loads nothing: every benchmark's table, the figure, the conventions, the configs.

    Raises:
        ImportError: Jinja is missing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llava.eval", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("compare.html.j2").render(
        about=report["about"],
        figure="data:image/png;base64," + base64.b64encode(figure).decode(),
        conventions=conventions(report),
        benchmarks=[
            {
                "title": BENCHMARKS[name].title if name in BENCHMARKS else name,
                "unit": BENCHMARKS[name].unit if name in BENCHMARKS else None,
                "data": result["data"],
                "questions": result["runs"][DENSE]["questions"],
                "table": rows_of(result, _OF_PAGE),
                "left_out": result["left_out"],
                "configs": {way: json.dumps(run["config"]) for way, run in result["runs"].items() if run["config"]},
            }
            for name, result in report["benchmarks"].items()
        ],
        cell=cell,
    )
