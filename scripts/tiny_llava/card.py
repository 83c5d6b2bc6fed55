"""The model card: fixed facts, and tables from `accuracy.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = Path(__file__).with_name("card_head.md").read_text()


def _cell(figure: dict[str, Any] | None) -> str:
    if not figure:
        return "–"
    low, high = figure["interval95"]
    return f"{figure['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _table(columns: dict[str, dict[str, Any]]) -> str:
    tasks = list(next(iter(columns.values())))
    lines = [f"| task | n | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for task in tasks:
        first = next(iter(columns.values()))[task]
        cells = " | ".join(_cell(column.get(task)) for column in columns.values())
        lines.append(f"| {task} | {first['n']} | {cells} |")
    return "\n".join(lines)


def card(report: dict[str, Any], pictures: int, minutes: int) -> str:
    """The card's Markdown from an accuracy report, pictures seen in training, and minutes it took."""
    same, cost = report["same_questions"], report["cost"]
    low, high = cost["interval95"]
    dense = _table(
        {
            "dense": report["dense"],
            "another picture": report["other_picture"],
            "no picture": report["text_only"],
            "majority": report["majority"],
        }
    )
    pruned = _table({name: result["accuracy"] for name, result in same.items()})
    lines = [
        "| way | executed prefill FLOPs saved | `paper` FLOPs saved | kept of 144 | selecting layer | exit layer |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in same.items():
        saved, row = result["saved"], (result["mean_kept"], result["mean_select_layer"], result["mean_exit_layer"])
        shown = " | ".join("–" if value is None else str(value) for value in row)
        lines.append(f"| {name} | {100 * saved['executed']:.1f} % | {100 * saved['paper']:.1f} % | {shown} |")
    return "\n".join(
        [
            _HEAD.format(pictures=pictures, minutes=minutes),
            "## Dense accuracy",
            "",
            "`another picture`: the same questions about a picture that is not theirs; `no picture`: questions see no",
            "visual token in any layer, which training never showed, so few answers are even of the right kind.",
            "`majority`: the most frequent answer to each wording (names left out; easy-VQA's questions whole), chosen",
            "on these very questions. Wording that gave answers away would lift the first two above the third.",
            "",
            dense,
            "",
            "## Dense and pruned on the same questions",
            "",
            f"`pruned` is `pruning_config.json`: `{json.dumps(report['pruning_config'])}`.",
            "It was chosen on other pictures, by `python -m llava.calibrate` (docs/calibration.md). **It costs",
            f"{cost['points_lost']:.2f} points of overall accuracy [{low:.2f}, {high:.2f}]** (paired, 95 % interval):",
            f"of {cost['n']:,} questions {cost['lost']} become wrong and {cost['won']} right.",
            "",
            pruned,
            "",
            "\n".join(lines),
            "",
            "All figures: `accuracy.json`, written by `scripts/train_tiny.py --measure llava/assets/tiny_llava`.",
            "",
        ]
    )
