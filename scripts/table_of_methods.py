"""Folders of `llava.eval.compare` → `docs/data/shipped_methods.json` and the table in `docs/methods.md`.

    python scripts/table_of_methods.py compare/gqa compare/pope compare/textvqa --times compare/times

Figures are the reports'; scores, their differences to dense and the agreement are judged anew from the answers. A later
folder adds runs to an earlier one of the same benchmark, whose dense answers have to be the same. The time to the first
token is that of one comparison of all runs (`--times`), since times of different hours are not alike.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.compare_page import DENSE
from llava.eval.files import read_answers, read_json
from llava.eval.verdicts import difference_interval, interval_of
from llava.options import Parser
from llava.utils import UserError, run_main, write_whole

DOCS = Path(__file__).parent.parent / "docs"
DATA, PAGE = DOCS / "data" / "shipped_methods.json", DOCS / "methods.md"
ABOUT = ("hardware", "device", "torch", "transformers", "dtype", "threads", "batch_size", "seed", "decoding", "time")


def collect(folders: Sequence[Path], times: Path) -> dict[str, Any]:
    """All runs that every benchmark has, as plain values, figures rounded as they are shown."""
    reports = [(folder, read_json(folder / "report.json")) for folder in folders]
    runs: dict[str, dict[str, dict[str, Any]]] = {}  # by benchmark and run
    left_out: dict[str, dict[str, str]] = {}
    for folder, report in reports:
        for benchmark, result in report["benchmarks"].items():
            known = runs.setdefault(benchmark, {})
            left_out.setdefault(benchmark, {}).update(result["left_out"])
            dense = read_answers(folder / benchmark / DENSE / "answers.jsonl")
            if DENSE in known and _texts(dense) != _texts(known[DENSE]["answers"]):
                raise UserError(f"{folder}: its dense answers to {benchmark} are not those of the folder before it")
            for name, run in result["runs"].items():
                path = folder / benchmark / name / "answers.jsonl"
                known.setdefault(name, {**run, "answers": read_answers(path), "path": path})
    common = [name for name in next(iter(runs.values())) if all(name in of for of in runs.values())]
    timed = read_json(times / "report.json")
    ((benchmark, clocks),) = timed["benchmarks"].items()
    return {
        "times": {
            **{key: timed["about"].get(key) for key in (*ABOUT, "first_token_compared_by")},
            "benchmark": benchmark,
            "questions": clocks["runs"][DENSE]["questions"],
            "first_token_over_dense": {
                name: round(run["first_token_over_dense"], 2) for name, run in clocks["runs"].items() if name in common
            },
        },
        "about": [{key: report["about"].get(key) for key in ABOUT} for _, report in reports],
        "questions": {benchmark: of[DENSE]["questions"] for benchmark, of in runs.items()},
        "left_out": left_out,
        "runs": {name: _figures({benchmark: of[name] for benchmark, of in runs.items()}, runs) for name in common},
    }


def _texts(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    return [answer["text"] for answer in answers]


def _figures(run: Mapping[str, dict[str, Any]], runs: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    scores, differences, same = {}, {}, []
    for benchmark, own in run.items():
        files, rules = BENCHMARKS[benchmark].files(), BENCHMARKS[benchmark]
        verdicts, dense = rules.judge(files, own["path"]), rules.judge(files, runs[benchmark][DENSE]["path"])
        scores[benchmark] = round(verdicts.total(), 1)
        interval = difference_interval(verdicts, dense)
        differences[benchmark] = [round(value, 1) for value in (verdicts.total() - dense.total(), *interval)]
        pairs = zip(_texts(own["answers"]), _texts(runs[benchmark][DENSE]["answers"]), strict=True)
        same += [one == other for one, other in pairs]
    counts = [own["questions"] for own in run.values()]

    def mean(values: Sequence[float], digits: int) -> float:
        return round(statistics.fmean(values, counts), digits)

    first = next(iter(run.values()))
    configs = {"configs": {benchmark: own["config"] for benchmark, own in run.items()}}
    return {
        "scores": scores,
        "differences": differences,
        "asked": first["tokens_a_layer"]["asked"],
        **({"config": first["config"]} if all(own["config"] == first["config"] for own in run.values()) else configs),
        "questions": sum(counts),
        "agreement": round(100 * sum(same) / len(same), 1),
        "interval": [round(100 * bound, 1) for bound in interval_of(same)],
        "tokens": mean([own["tokens_a_layer"]["measured"] for own in run.values()], 1),
        "mflop": mean([own["prefill_flops"]["executed"] / 1e6 for own in run.values()], 0),
        "saved": mean([100 * own["flops_saved"]["executed"] for own in run.values()], 1),
        "kv_kib": mean([own["kv_bytes_after_prefill"] / 1024 for own in run.values()], 0),
    }


def table(data: Mapping[str, Any]) -> str:
    """The runs as Markdown: dense, then by budget, the most agreement first."""
    titles = {benchmark: BENCHMARKS[benchmark].title for benchmark in data["questions"]}
    head = ["method", "tokens asked", "measured", *titles.values(), "as dense, %", "executed MFLOP", "saved, %"]
    head += ["first token / dense", "KV, KiB"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    runs = sorted(data["runs"].items(), key=lambda item: (-(item[1]["asked"] or 10**9), -item[1]["agreement"]))
    for name, run in runs:
        scores = []
        for benchmark in titles:
            _, low, high = run["differences"][benchmark]
            chance = "" if name == DENSE else f" ({low:+.1f} to {high:+.1f})"
            scores.append(f"{run['scores'][benchmark]:.1f}{chance}")
        low, high = run["interval"]
        cells = [name.removesuffix(f"-{run['asked']}"), run["asked"] or "–", run["tokens"], *scores]
        cells += [f"{run['agreement']:.1f} ({low:.1f} to {high:.1f})", f"{run['mflop']:.0f}", run["saved"]]
        first_token = data["times"]["first_token_over_dense"].get(name)
        cells += ["–" if first_token is None else f"{first_token:.2f}", f"{run['kv_kib']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of llava.eval.compare")
    parser.add_argument("--times", required=True, type=Path, help="folder of the comparison whose times are shown")
    args = parser.parse_args(argv)
    data = collect(args.folders, args.times)
    write_whole(DATA, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    made, count = re.subn(r"\| method \| tokens asked \|(.*\n)+?(?=\n)", lambda _: table(data) + "\n", page, count=1)
    if not count:
        raise UserError(f"{PAGE} holds no table that begins with '| method | tokens asked |'")
    write_whole(PAGE, made)


if __name__ == "__main__":
    run_main(main)
