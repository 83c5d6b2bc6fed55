#!/usr/bin/env python3
"""The figures of docs/method.md: what the shipped model keeps of one picture for three questions, and why.

python scripts/method_figures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import LoadedModel, open_checkpoint
from llava.utils import run_main
from llava.visualize import observe, smallest_cosines, stay_of
from llava.visualize.draw import draw_cosine_curve, draw_rows_per_layer, draw_stays

PICTURE = SHIPPED_MODEL_PATH.parent / "images" / "scene_2.png"
QUESTIONS = ("What color is the star?", "What does the text in the image say?", "How many shapes are there?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/method.md.")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder (default: docs/figures)")
    folder = parser.parse_args(argv).output
    folder.mkdir(parents=True, exist_ok=True)
    chat = LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH))
    config = chat.checkpoint.pruning_config()
    runs = [observe(chat, PICTURE, question, config) for question in QUESTIONS]
    first, trace = runs[0], runs[0].trace
    dense = observe(chat, PICTURE, QUESTIONS[0])
    names = [f"{run.question}\n{run.answer}: {int(run.kept.sum())} of {run.trace.num_visual} kept" for run in runs]
    stays = {name: stay_of(run.trace) for name, run in zip(names, runs, strict=True)}
    figures = {
        "kept": draw_stays(first.picture.image, first.patches, stays, "What is kept for three questions"),
        "cosine": draw_cosine_curve(
            {"dense": smallest_cosines(dense.last), "pruned": smallest_cosines(first.last)},
            QUESTIONS[0],
            {"layer_threshold": config.layer_threshold, "exit_threshold": config.exit_threshold},
            trace.select_layer,
            trace.exit_layer,
        ),
        "rows": draw_rows_per_layer(trace.rows_per_layer, trace.num_visual, QUESTIONS[0]),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"method_{name}.png", dpi=130)
        print(f"wrote {folder / f'method_{name}.png'}")
    return 0


if __name__ == "__main__":
    run_main(main)
