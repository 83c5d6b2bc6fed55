"""What was pruned: the lines of a trace file, and means and histograms over a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava.eval.questions import Question
from llava.eval.scoring import mean
from llava.inference import Answer
from llava.pruning.flops import CONVENTIONS


def trace_record(question: Question, answer: Answer) -> dict[str, Any]:
    """A line of a trace file: what was pruned for one question, and the fraction of FLOPs that this saved."""
    assert answer.trace is not None
    return {
        "line": question.line,
        "question_id": question.question_id,
        "visual_tokens": answer.visual_tokens,
        "kept": answer.kept,
        "flops_saved": answer.flops_saved,
        **answer.trace.to_dict(),
    }


@dataclass(frozen=True)
class PruningSummary:
    """Means over the questions of a run; questions without an image, which have nothing to prune, are left out.

    Attributes:
        questions: how many went in.
        kept: mean visual tokens left after selection.
        visual: mean visual tokens of the prompts.
        select_layer, exit_layer: mean over the questions where it happened; None where it never did.
        select_histogram, exit_histogram: layer (as a string; ``none`` where it did not happen) → questions.
        flops_saved: mean fraction of the dense prefill's FLOPs that was saved, by convention.
    """

    questions: int
    kept: float | None
    visual: float | None
    select_layer: float | None
    exit_layer: float | None
    select_histogram: dict[str, int]
    exit_histogram: dict[str, int]
    flops_saved: dict[str, float | None]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> PruningSummary:
        """Summarise the lines of a trace file (``kept``, ``visual_tokens``, ``select_layer`` …)."""
        records = [record for record in records if record["visual_tokens"]]
        return cls(
            questions=len(records),
            kept=mean(record["kept"] for record in records),
            visual=mean(record["visual_tokens"] for record in records),
            select_layer=_mean_layer(records, "select_layer"),
            exit_layer=_mean_layer(records, "exit_layer"),
            select_histogram=_histogram(records, "select_layer"),
            exit_histogram=_histogram(records, "exit_layer"),
            flops_saved={name: mean(record["flops_saved"][name] for record in records) for name in CONVENTIONS},
        )


def _mean_layer(records: list[Mapping[str, Any]], key: str) -> float | None:
    return mean(record[key] for record in records if record[key] is not None)


def _histogram(records: list[Mapping[str, Any]], key: str) -> dict[str, int]:
    counts = Counter(record[key] for record in records)
    layers = sorted(layer for layer in counts if layer is not None)
    return {str(layer): counts[layer] for layer in layers} | ({"none": counts[None]} if counts[None] else {})
