"""Arguments that all benchmarks share, and what they leave behind: a table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .hardware import environment
from .shapes import SHAPES, Schedule, Shape
from .timing import Timings
from .variants import DENSE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(description: str) -> argparse.ArgumentParser:
    """The shared arguments. Every benchmark adds its own."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = arguments.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="model shape; weights are random")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default=None, help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--batch", type=int, default=1, help="prompts in a batch")
    add("--visual", type=int, default=576, help="visual rows of a prompt: 576 an image, 2928 for anyres")
    add("--prefix", type=int, default=35, help="rows before the image")
    add("--text", type=int, default=40, help="rows behind the image")
    add("--schedule", type=Schedule.parse, default=None, help="SHALLOW,SELECT,KEPT,EXIT; default: the shape's own")
    add("--threads", type=int, default=None, help="processor threads of torch")
    add("--repetitions", type=int, default=10, help="turns that count")
    add("--warmup", type=int, default=2, help="turns before them")
    add("--variants", nargs="+", default=None, metavar="NAME", help="compare these alone (as the table names them)")
    add("--output", type=Path, default=Path("benchmarks/results"), help="folder for the JSON file and the plot")
    return arguments


class Setting:
    """The parsed arguments as objects."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.device = torch.device(arguments.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"error: --device {arguments.device}: this torch sees no CUDA device")
        fallback = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.dtype = DTYPES.get(arguments.dtype, fallback)
        self.shape: Shape = SHAPES[arguments.shape]
        self.schedule: Schedule = arguments.schedule or self.shape.schedule
        self.part = (arguments.prefix, arguments.visual, arguments.text)
        # Processor time is steady on a machine that others use; a GPU's work shows on the wall clock alone.
        self.clocks = ("wall", "cpu") if self.device.type == "cpu" else ("wall",)

    def to_dict(self) -> dict[str, Any]:
        known = {key: value for key, value in vars(self.arguments).items() if isinstance(value, int | str | list)}
        return known | {"dtype": str(self.dtype).removeprefix("torch."), "schedule": asdict(self.schedule)}


def timing_rows(timings: Timings, clocks: Sequence[str], over: str = DENSE) -> list[dict[str, Any]]:
    """A row for each variant: its times, and how often it fits into `over`'s."""
    rows = []
    for name in timings.wall:
        row: dict[str, Any] = {"variant": name, **timings.summary(name)}
        for clock in clocks:
            if over in timings.wall:
                row[f"speedup_{clock}"] = timings.ratio(over, name, clock)
        rows.append(row)
    return rows


class Report:
    """Collects named tables and figures of one benchmark and writes them.

    Args:
        about: in the files' name, where one benchmark measures several things.

    Attributes:
        tables: rows of plain values, by title.
        facts: single figures.
    """

    def __init__(self, benchmark: str, setting: Setting, about: str = ""):
        self.benchmark, self.setting, self._about = benchmark, setting, about
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, Any] = {}
        self.timings: dict[str, Timings] = {}
        self.environment = environment(setting.device)

    @property
    def name(self) -> str:
        plain = self.setting.to_dict()
        parts = [self.benchmark, self._about, plain["shape"], self.setting.device.type, plain["dtype"]]
        return "_".join([*filter(None, parts), f"b{plain['batch']}", f"v{plain['visual']}"])

    def finish(self) -> Path:
        """Print everything, write JSON and plot, and return the JSON file's path."""
        self.environment["load_average_at_end"] = environment(self.setting.device)["load_average"]
        self._print()
        folder = self.setting.arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = {
            "benchmark": self.benchmark,
            "command": f"python -m benchmarks.{self.benchmark} {shlex.join(sys.argv[1:])}".strip(),
            "environment": self.environment,
            "settings": self.setting.to_dict(),
            "facts": self.facts,
            "tables": self.tables,
            "seconds": {name: asdict(timings) for name, timings in self.timings.items()},
        }
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        self._plot(path.with_suffix(".png"))
        return path

    def _print(self) -> None:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(f"[bold]{self.name}[/bold] (random weights)")
        for title, rows in self.tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = Table(title=title, title_justify="left")
            for column in columns:
                table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
            for row in rows:
                table.add_row(*(_show(row.get(column)) for column in columns))
            console.print(table)
        for name, value in self.facts.items():
            console.print(f"{name}: {_show(value)}")

    def _plot(self, path: Path) -> None:
        """Bars of the median times, with p10 … p90; silently absent without matplotlib, which is optional."""
        if not self.timings:
            return
        # One busy thread's processor time is its time on an idle machine; several threads' would be a sum.
        clock = "cpu" if "cpu" in self.setting.clocks and torch.get_num_threads() == 1 else "wall"
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        bars_in_all = sum(len(timings.wall) for timings in self.timings.values())
        figure, axes = pyplot.subplots(
            len(self.timings), 1, figsize=(9, 1 + 0.45 * bars_in_all + len(self.timings)), squeeze=False
        )
        for axis, (title, timings) in zip(axes[:, 0], self.timings.items(), strict=True):
            rows = [timings.summary(name, clock) for name in timings.wall]
            medians = [row["median_ms"] for row in rows]
            low = [row["median_ms"] - row["p10_ms"] for row in rows]
            high = [row["p90_ms"] - row["median_ms"] for row in rows]
            bars = axis.barh(list(timings.wall), medians, xerr=[low, high], color="#4c78a8", height=0.6)
            axis.bar_label(
                bars,
                [f" {median:.0f}" if median >= 100 else f" {median:.3g}" for median in medians],
                padding=3,
                fontsize=8,
            )
            axis.invert_yaxis()
            axis.set_xlabel(f"ms ({clock} clock), median; whiskers p10 to p90")
            axis.set_title(title, fontsize=10, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.name} (random weights)", fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(_show, value))
    return str(value)
