"""What the four scorers' command lines share: completeness, tables, JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.eval.files import to_json
from llava.options import Parser
from llava.utils import UserError, write_whole

#: A score file: the headline ``score``, ``answered`` of ``total`` questions, and the benchmark's own figures.
Scores = dict[str, Any]


def check_complete(missing: Sequence[Any], total: int, allow_partial: bool) -> int:
    """Return how many of ``total`` questions are answered; refuse a gap unless ``allow_partial``."""
    answered = total - len(missing)
    if answered == 0:
        raise UserError(f"none of the {total} questions is answered: do these answers belong to this benchmark?")
    if missing and not allow_partial:
        raise UserError(
            f"{answered} of {total} questions are answered; missing, for example: {missing[0]!r}. "
            "Finish the run, or score what is there with --allow-partial"
        )
    return answered


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], file: Any = None) -> None:
    """Print a table; floats with two digits, None as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    Console(file=file or sys.stdout).print(table, markup=False)


def cell(value: Any) -> str:
    """A table cell's text."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def score_parser(description: str) -> Parser:
    """A parser with the flags every scorer has."""
    parser = Parser(description=description)
    parser.add_argument("--result-file", required=True, metavar="FILE", help="answers (jsonl)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the scores as JSON instead of a table, or write them to FILE beside the table",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="score an answers file that lacks some questions; prints n of N"
    )
    return parser


def publish(scores: Scores, args: argparse.Namespace, table: Callable[[Scores], None]) -> None:
    """Print or write ``scores`` as the common flags ask."""
    if args.json == "-":
        print(to_json(scores), end="")
        return
    if scores["answered"] != scores["total"]:
        print(f"PARTIAL: {scores['answered']} of {scores['total']} questions answered")
    table(scores)
    if args.json:
        write_whole(args.json, to_json(scores))
