"""`docs/methods.md` speaks of every method, its examples can be used, and its scores are those of the data file."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from golden_runs import CASES, METHOD_CASES

from llava.pruning import METHODS, Method

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import table_of_methods

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n### ")[1:]}
PUBLISHED = json.loads((DOCS / "data" / "published_scores.json").read_text(encoding="utf-8"))
BENCHMARKS = ("GQA", "MME", "MME-P", "POPE", "TextVQA", "relative mean")


def examples(text: str) -> list[dict]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("config", examples(PAGE), ids=json.dumps)
def test_every_example_can_be_used(config) -> None:
    method = Method.from_any(config)
    assert Method.from_any(method.to_dict()) == method


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row_and_a_section_with_its_knobs_and_an_example(name) -> None:
    (row,) = re.findall(rf"^\| \[`{name}`\]\(#{name}\) \|.*", PAGE, re.MULTILINE)
    section = SECTIONS[name].split("\n## ")[0]
    assert name in {Method.from_any(config).name for config in examples(section)}
    for knob in fields(METHODS[name]):
        assert f"`{knob.name}`" in section, knob.name
        if isinstance(knob.default, int | float) and not isinstance(knob.default, bool):
            assert re.search(rf"`{knob.name}`\s\({knob.default:g}(\.0)?\b", section), (knob.name, knob.default)
        elif isinstance(knob.default, tuple):
            assert f"`{knob.name}` ({', '.join(map(str, knob.default))}" in section.replace("\n", " "), knob.name
    recorded = CASES if name == "visipruner" else [case for case in METHOD_CASES if case.startswith(f"{name}__")]
    assert row.rstrip(" |").rpartition("| ")[2].startswith(f"{len(recorded)}" if recorded else "nothing published")


def published_table() -> str:
    lines = [f"| method | tokens | {' | '.join(BENCHMARKS)} | source |", f"|---|---|{'---|' * len(BENCHMARKS)}---|"]
    for row in PUBLISHED["scores"]:
        name = f"{row['method']} ({row['variant']})" if "variant" in row else row["method"]
        scores = " | ".join(str(row["scores"].get(benchmark, "")) for benchmark in BENCHMARKS)
        mark = " ²" if row["second_hand"] else ""
        lines.append(f"| {name} | {row['tokens']} | {scores} | {row['source']}{mark} |")
    return "\n".join(lines)


def test_published_scores_name_their_source_and_doubt_and_stand_in_the_page() -> None:
    for row in PUBLISHED["scores"]:
        assert row["source"] and row["doubt"] and isinstance(row["second_hand"], bool)
        assert row["method"] in {*METHODS, "dense"} and row["tokens"] in (576, 192, 128, 64)
        assert row["scores"] and set(row["scores"]) <= set(BENCHMARKS)
    assert published_table() in PAGE


def test_the_table_of_the_shipped_model_is_that_of_the_data_file() -> None:
    data = json.loads((DOCS / "data" / "shipped_methods.json").read_text(encoding="utf-8"))
    assert sum(data["questions"].values()) >= 1000
    assert table_of_methods.table(data) in PAGE
    for run in data["runs"].values():
        for config in [run["config"]] if "config" in run else run["configs"].values():
            Method.from_any(config)
        for value, low, high in run["differences"].values():
            assert low <= value <= high
