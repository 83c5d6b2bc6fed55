"""The small benchmarks of `playground/data/mini` as lmms-eval tasks, scored by lmms-eval's own functions.

Run lmms-eval in the repository's root, with `--include_path playground/lmms_eval`. A document is a line of LLaVA's
question file; the answer comes from the benchmark's annotation beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from PIL import Image

from llava.eval.eval_mme import judge, read_truth

__all__ = ["mme_aggregate_results", "mme_process_results", "textvqa_process_results"]

MINI = Path(__file__).parents[1] / "data" / "mini"
MME = MINI / "MME" / "MME_Benchmark_release_version"

Document = dict[str, Any]


def question(doc: Document, kwargs: Any = None) -> str:
    """The prompt as LLaVA's question files have it, instruction included."""
    return doc["text"]


def gqa_docs(docs: Any) -> Any:
    """Each question's answer added."""
    questions = json.loads((MINI / "gqa" / "data" / "testdev_balanced_questions.json").read_text("utf-8"))
    return docs.map(lambda doc: {"answer": questions[doc["question_id"]]["answer"]})


def gqa_pictures(doc: Document) -> list[Image.Image]:
    return _picture("gqa", "data", "images", doc["image"])


def mme_docs(docs: Any) -> Any:
    """Each question's "Yes" or "No" added."""
    truth = read_truth(MME)

    def answer(doc: Document) -> Document:
        (judged,) = judge([{"question_id": doc["question_id"], "prompt": doc["text"], "text": ""}], truth)
        return {"answer": judged.truth}

    return docs.map(answer)


def mme_pictures(doc: Document) -> list[Image.Image]:
    return _picture("MME", "MME_Benchmark_release_version", doc["image"])


def textvqa_docs(docs: Any) -> Any:
    """Ten people's answers added, and the commonest of them."""
    entries = json.loads((MINI / "textvqa" / "TextVQA_0.5.1_val.json").read_text("utf-8"))["data"]
    answers = {entry["image_id"]: entry["answers"] for entry in entries}  # a question a picture

    def added(doc: Document) -> Document:
        given = answers[doc["question_id"]]
        return {"answers": given, "answer": max(given, key=given.count)}

    return docs.map(added)


def textvqa_pictures(doc: Document) -> list[Image.Image]:
    return _picture("textvqa", "train_images", doc["image"])


def _picture(*parts: str) -> list[Image.Image]:
    with Image.open(MINI.joinpath(*parts)) as image:
        return [image.convert("RGB")]
