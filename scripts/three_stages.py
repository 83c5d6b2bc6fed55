"""Does the shipped model go through the paper's three stages? Measures it, for docs/three_stages.md.

    python scripts/three_stages.py                 # docs/figures/three_stages.json and .png, then the tables
    python scripts/three_stages.py --pictures 30   # a quick look

Every point has at least 1,000 questions unless `--pictures` says otherwise; intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from tiny_llava.data import held_out_batch
from tiny_llava.evaluate import evaluate
from tiny_llava.export import write_json
from tiny_llava.measure import Sample, Shipped, figures, learner_of, pruned_figures, rendered_samples

from llava.constants import SHIPPED_MODEL_PATH
from llava.pruning import Method, PruningConfig
from llava.pruning.methods import FastV, Random, Schedule

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
SPLIT = "stages"  # pictures of its own: neither training nor validation nor the model card's test draws them
SHOWN = ("overall", "attribute", "existence", "count", "position", "relation", "text")


@dataclass(frozen=True)
class Watch(Method):
    """Prunes nothing; notes every prompt's smallest cosine and largest share, layer by layer."""

    notes: dict[int, list[tuple[float, float]]]  # by prompt

    def looks_behind(self, num_layers: int) -> range:
        """Every layer."""
        return range(num_layers)

    def measure(self, view: Any) -> Any:
        """VisiPruner's measures."""
        return view.shares()

    def decide(self, layer: int, measured: Any, trace: Any) -> None:
        """Nothing leaves."""
        if measured is not None:
            note = float(measured["cosine"].min()), float(measured["norm"].max())
            self.notes.setdefault(id(trace), []).append(note)


def keep_behind(layer: int, kept: int, score: str) -> Method:
    """Keep `kept` visual tokens behind `layer`: drawn at random, or by the last row's attention or its shares' norm."""
    if score == "random":
        return Random(kept, layer + 1)
    return FastV(layer + 1, kept) if score == "attention" else Schedule(0, layer, kept)


def blind_curves(path: Path, pictures: int) -> dict[str, Any]:
    """Accuracy with the picture hidden from the text rows: below, in, and from every layer on."""
    learner, encoder = learner_of(path)
    before = torch.tensor(encoder.before)
    batches = [held_out_batch(encoder, start, 32, SPLIT) for start in range(0, pictures, 32)]
    layers = len(learner.llava.model.layers)

    def measure(blind: Container[int]) -> dict[str, Any]:
        return figures(evaluate(learner, before, batches, blind))

    return {
        "dense": measure(()),
        "below": [measure(range(layer)) for layer in range(layers + 1)],
        "alone": [measure((layer,)) for layer in range(layers)],
        "from": [measure(range(layer, layers)) for layer in range(layers + 1)],
    }


def cosines(shipped: Shipped, samples: list[Sample]) -> dict[str, Any]:
    """Quantiles over questions of each layer's smallest cosine and largest norm."""
    watch = Watch({})
    _, traces = shipped.answer(samples, watch)
    seen = np.array([watch.notes[id(trace)] for trace in traces if id(trace) in watch.notes])  # [questions, layers, 2]
    quantiles = np.quantile(seen, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0).round(5)
    return {
        "n": len(seen),
        "quantiles": [5, 25, 50, 75, 95],
        "cosine": quantiles[:, :, 0].tolist(),
        "norm": quantiles[:, :, 1].tolist(),
    }


def comparison(shipped: Shipped, samples: list[Sample], config: dict[str, Any]) -> dict[str, Any]:
    """Dense, VisiPruner as recommended, and other choices at its kept count and at its executed FLOPs."""
    rows = {"dense": pruned_figures(shipped, samples), "VisiPruner": pruned_figures(shipped, samples, config=config)}
    ours = rows["VisiPruner"]
    layer, kept = round(ours["mean_select_layer"]), max(1, round(ours["mean_kept"]))
    for score in ("random", "attention", "norm"):
        name = f"{score}, {kept} kept after layer {layer}"
        rows[name] = pruned_figures(shipped, samples, config=keep_behind(layer, kept, score))
    layers = shipped.model.config.num_hidden_layers
    early = 1  # FastV's layer; at equal FLOPs more tokens can stay there
    share = (layers - 1 - layer) / (layers - 1 - early)
    many = round(144 - (144 - kept) * share)
    for score in ("random", "attention"):
        name = f"{score}, {many} kept after layer {early}"
        rows[name] = pruned_figures(shipped, samples, config=keep_behind(early, many, score))
    few = f"attention, {kept} kept after layer {early}"
    rows[few] = pruned_figures(shipped, samples, config=keep_behind(early, kept, "attention"))
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against layer for the three ways to hide the picture, and cosines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "below": "(a) hidden from text in layers < L",
        "alone": "(b) hidden from text in layer L alone",
        "from": "(c) hidden from text from layer L on",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
        points = result["hidden"][name]
        for task in SHOWN:
            values = [point[task]["accuracy"] for point in points]
            low = [point[task]["interval95"][0] for point in points]
            high = [point[task]["interval95"][1] for point in points]
            line = axis.plot(values, marker="o", markersize=3, linewidth=2.2 if task == "overall" else 1.1, label=task)
            axis.fill_between(range(len(values)), low, high, alpha=0.12, color=line[0].get_color())
        axis.set(title=title, xlabel="layer L", ylabel="accuracy, %", ylim=(0, 101))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    low, lower, middle, upper, high = result["cosines"]["cosine"]
    axis = axes[1, 1]
    axis.fill_between(range(len(low)), low, high, alpha=0.2, label="5–95 % of questions")
    axis.fill_between(range(len(low)), lower, upper, alpha=0.35, label="25–75 %")
    axis.plot(middle, marker="o", markersize=3, label="median")
    axis.set(title="smallest cosine of a layer", xlabel="layer", ylabel="cos(o − c, o)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _cell(figure: dict[str, Any]) -> str:
    low, high = figure["interval95"]
    return f"{figure['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def hidden_table(hidden: dict[str, Any]) -> list[str]:
    """Overall and text accuracy against layer, as lines of Markdown."""
    total, text = hidden["dense"]["overall"]["n"], hidden["dense"]["text"]["n"]
    lines = [
        f"Dense: {_cell(hidden['dense']['overall'])} overall (n = {total}), {_cell(hidden['dense']['text'])} text "
        f"(n = {text}). Percent correct, 95 % intervals.",
        "",
        "| L | (a) layers < L: overall | text | (b) layer L: overall | text | (c) from L on: overall | text |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in range(len(hidden["below"])):
        cells = []
        for name in ("below", "alone", "from"):
            points = hidden[name]
            known = layer < len(points)
            cells += [_cell(points[layer][task]) if known else "–" for task in ("overall", "text")]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines


def tables(result: dict[str, Any]) -> str:
    """The figures as Markdown: accuracy against layer, cosines, and the ways to choose tokens."""
    lines = hidden_table(result["hidden"])
    cosine, norm = result["cosines"]["cosine"], result["cosines"]["norm"]
    lines += [
        "",
        f"Smallest cosine and largest share of a layer, over {result['cosines']['n']} questions:",
        "",
        "| layer | cosine 5 % | 25 % | median | 75 % | 95 % | median largest norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in range(len(cosine[0])):
        values = " | ".join(f"{quantile[layer]:.4f}" for quantile in cosine)
        lines.append(f"| {layer} | {values} | {norm[2][layer]:.3f} |")
    lines += [
        "",
        "| way | overall | text | attribute | executed FLOPs saved | kept of 144 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["comparison"].items():
        cells = " | ".join(_cell(row["accuracy"][task]) for task in ("overall", "text", "attribute"))
        kept = "–" if row["mean_kept"] is None else row["mean_kept"]
        lines.append(f"| {name} | {cells} | {100 * row['saved']['executed']:.1f} % | {kept} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path(SHIPPED_MODEL_PATH))
    parser.add_argument("--pictures", type=int, default=160)
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument(
        "--hidden-only", action="store_true", help="curves (a) to (c) alone, as a table; writes nothing"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.hidden_only:
        print("\n".join(hidden_table(blind_curves(arguments.model_path, arguments.pictures))))
        return
    config = PruningConfig.from_any(f"@{arguments.model_path / 'pruning_config.json'}")
    assert config is not None
    samples = rendered_samples(SPLIT, arguments.pictures)
    shipped = Shipped(str(arguments.model_path))
    result = {
        "pictures": arguments.pictures,
        "questions": len(samples),
        "pruning_config": config.to_dict(),
        "hidden": blind_curves(arguments.model_path, arguments.pictures),
        "cosines": cosines(shipped, samples),
        "comparison": comparison(shipped, samples, config.to_dict()),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - began),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "three_stages.json", result)
    draw(result, arguments.out / "three_stages.png")
    (arguments.out / "three_stages_tables.md").write_text(tables(result))
    print(tables(result))


if __name__ == "__main__":
    main()
