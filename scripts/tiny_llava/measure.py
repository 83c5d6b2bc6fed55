"""Accuracy of the exported checkpoint through the project's own loader, generation and pruning engine."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.pruning import Method, PruningTrace
from llava.pruning.flops import DecoderShape, savings
from llava.pruning.methods import FastV, Random
from llava.utils import write_whole

from .data import NEWLINE, SIDE_BY_SIDE, Encoder, easy_batches, held_out_batch, phrase
from .easyvqa import easy_by_image, easy_picture
from .evaluate import NORMAL_95, evaluate, interval
from .model import Learner
from .questions import NUMBERS, YES_NO, write_questions
from .renderer import COLORS, SHAPES, SIZES, make_scene, render

ANSWER_TOKENS = 6


@dataclass(frozen=True)
class Sample:
    """One question about one picture."""

    picture: Image.Image
    question: str
    answer: str
    task: str


def rendered_samples(split: str, pictures: int) -> list[Sample]:
    """Questions about the first pictures of a held-out split, the same as `data.held_out_batch` draws."""
    samples = []
    for index in range(pictures):
        rng = random.Random(f"{split}/{index}")
        scene = make_scene(rng)
        questions = write_questions(scene, rng, SIDE_BY_SIDE)
        picture = render(scene)
        samples += [Sample(picture, phrase(q, rng), q.answer, q.task) for q in questions]
    return samples


def easy_samples(pictures: int | None = None, split: str = "test") -> list[Sample]:
    """Every question of the first pictures of easy-VQA's test split, as written."""
    return [
        Sample(easy_picture(split, image), text, answer, "easy-VQA")
        for image, asked in easy_by_image(split)[:pictures]
        for text, answer in asked
    ]


class Shipped:
    """The checkpoint, loaded as any user loads it (float32 on CPU)."""

    def __init__(self, path: str | None = None) -> None:
        self.loaded = LoadedModel(open_checkpoint(path or SHIPPED_MODEL_PATH), LoadOptions("cpu", "float32"))
        self.model, self.processor = self.loaded.model, self.loaded.checkpoint.image_processor

    def answer(
        self,
        samples: Sequence[Sample],
        config: dict[str, Any] | Method | None = None,
        batch: int = 32,
    ) -> tuple[list[str], list[PruningTrace]]:
        """Greedy answers and traces, in the samples' order; dense without a config."""
        checkpoint = self.loaded.checkpoint
        # An empty mode is dense, and leaves a trace.
        checked = Method.from_any(config or {"mode": []})
        options = GenerationOptions(max_new_tokens=ANSWER_TOKENS)
        prompts = [
            checkpoint.encode([Turn(sample.question, [checkpoint.read_picture(sample.picture)])]) for sample in samples
        ]
        order = sorted(range(len(samples)), key=lambda k: prompts[k].num_rows)
        answers: list[str] = [""] * len(samples)
        traces: list[Any] = [None] * len(samples)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            answered = self.loaded.answer_batch([prompts[k] for k in chosen], checked, options)
            for k, answer in zip(chosen, answered, strict=True):
                answers[k], traces[k] = answer.text, answer.trace
        return answers, traces


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of every task."""
    counts: dict[str, list[int]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        right = counts.setdefault(sample.task, [0, 0])
        right[0] += answer == sample.answer
        right[1] += 1
    return {task: (right, count) for task, (right, count) in sorted(counts.items())}


def figure(right: int, count: int) -> dict[str, Any]:
    """One accuracy as every table of the project writes it."""
    low, high = interval(right, count)
    return {
        "accuracy": round(100 * right / count, 2),
        "interval95": [round(100 * low, 2), round(100 * high, 2)],
        "correct": right,
        "n": count,
    }


def figures(results: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Every task's accuracy, and over all questions."""
    total = sum(right for right, _ in results.values()), sum(count for _, count in results.values())
    return {"overall": figure(*total)} | {task: figure(*result) for task, result in results.items()}


def learner_of(path: str | Path) -> tuple[Learner, Encoder]:
    """The exported weights where training's packed forward pass can run them (many questions a picture at once)."""
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(path))
    learner = Learner(len(encoder.tokenizer)).eval()
    weights = load_file(Path(path) / "model.safetensors")
    learner.llava.load_state_dict({name: value.float() for name, value in weights.items()})
    return learner, encoder


def mean_savings(traces: Sequence[PruningTrace], model: Any) -> dict[str, float]:
    """Share of prefill FLOPs saved by every convention, mean over the prompts."""
    shape = DecoderShape.of(model)
    each = [savings(trace, shape) for trace in traces]
    return {name: round(sum(one[name] for one in each) / len(each), 4) for name in each[0]}


def pruned_figures(shipped: Shipped, samples: Sequence[Sample], **how: Any) -> dict[str, Any]:
    """Accuracy, mean savings, kept tokens and layers of one way to prune."""
    return _describe(shipped, samples, *shipped.answer(samples, **how))


def _describe(
    shipped: Shipped, samples: Sequence[Sample], answers: Sequence[str], traces: Sequence[PruningTrace]
) -> dict[str, Any]:
    selected = [trace for trace in traces if trace.select_layer is not None]
    exited = [trace for trace in traces if trace.exit_layer is not None]
    return {
        "accuracy": figures(score(samples, answers)),
        "saved": mean_savings(traces, shipped.model),
        "selected": len(selected) / len(traces),
        "mean_kept": _mean([trace.num_kept for trace in selected]),
        "mean_select_layer": _mean([trace.select_layer for trace in selected]),
        "mean_exit_layer": _mean([trace.exit_layer for trace in exited]),
    }


def paired_difference(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """Points of accuracy that `after` loses on the same questions, with the 95 % interval of a paired difference."""
    lost = sum(one == sample.answer != other for sample, one, other in zip(samples, before, after, strict=True))
    won = sum(one != sample.answer == other for sample, one, other in zip(samples, before, after, strict=True))
    n = len(samples)
    mean = (lost - won) / n
    half = NORMAL_95 * math.sqrt((lost + won) / n - mean**2) / math.sqrt(n)
    return {
        "points_lost": round(100 * mean, 2),
        "interval95": [round(100 * (mean - half), 2), round(100 * (mean + half), 2)],
        "lost": lost,
        "won": won,
        "n": n,
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def accuracy_report(path: Path, pictures: int = 640, pruned_pictures: int = 150) -> dict[str, Any]:
    """All that the model card states, from the held-out split `test` and easy-VQA's test split.

    Dense accuracy runs the exported weights through the packed forward pass (equal, as the tests show, to one
    question at a time); pruned accuracy, and the dense one it is held against, through `generate`.
    """
    learner, encoder = learner_of(path)
    before = torch.tensor(encoder.before)
    rendered = [held_out_batch(encoder, start, 32, "test") for start in range(0, pictures, 32)]
    real = list(easy_batches(encoder, "test", 32))
    everywhere = range(len(learner.llava.model.layers))

    def dense(blind: Container[int] = (), shift: int = 0) -> dict[str, tuple[int, int]]:
        shown = [[replace(one, pixels=one.pixels.roll(shift, 0)) for one in batches] for batches in (rendered, real)]
        return evaluate(learner, before, shown[0], blind) | evaluate(learner, before, shown[1], blind)

    shipped = Shipped(str(path))
    config = json.loads((path / "pruning_config.json").read_text())
    samples = rendered_samples("test", pruned_pictures) + easy_samples(pruned_pictures // 4)
    whole, short = shipped.answer(samples), shipped.answer(samples, config=config)
    pruned = _describe(shipped, samples, *short)
    report = {
        "dense": figures(dense()),
        "other_picture": figures(dense(shift=8)),  # an easy-VQA picture fills two rows of a batch at most
        "text_only": figures(dense(everywhere)),
        "majority": figures(_majority(rendered_samples("test", pictures) + easy_samples())),
        "same_questions": {"dense": _describe(shipped, samples, *whole), "pruned": pruned},
        "cost": paired_difference(samples, whole[0], short[0]),
        "pruning_config": config,
    }
    if pruned["mean_kept"]:
        layer, kept = round(pruned["mean_select_layer"]), round(pruned["mean_kept"])
        for way, method in (("random", Random(kept, layer + 1)), ("attention", FastV(layer + 1, kept))):
            report["same_questions"][f"{way}, {kept} kept after layer {layer}"] = pruned_figures(
                shipped, samples, config=method
            )
    return report


_NAMES = re.compile(rf"\b({'|'.join((*SIZES, *COLORS, *SHAPES, 'shape', *NUMBERS))})(es|s)?\b")


def _wording(sample: Sample) -> str:
    """A question without the things it names; easy-VQA's whole, because its answers lean on what is asked for."""
    if sample.task == "easy-VQA":
        return sample.question
    question = sample.question.split(NEWLINE)[0].replace(f" {YES_NO}", "")
    if sample.task == "spelling":
        return question.rsplit(" ", 1)[0]
    return _NAMES.sub("…", question)


def _majority(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """What a guesser scores who knows the most frequent answer to every wording."""
    answers: dict[tuple[str, str], Counter[str]] = {}
    for sample in samples:
        answers.setdefault((sample.task, _wording(sample)), Counter())[sample.answer] += 1
    right: dict[str, list[int]] = {}
    for (task, _), counts in answers.items():
        total = right.setdefault(task, [0, 0])
        total[0] += max(counts.values())
        total[1] += sum(counts.values())
    return {task: (correct, count) for task, (correct, count) in sorted(right.items())}


def write_question_file(folder: Path, split: str, pictures: int) -> None:
    """Pictures of a held-out split and `questions.jsonl` about them, in the form that `llava.eval` and
    `llava.calibrate` read; one picture in eight is of easy-VQA's training split."""
    folder.mkdir(parents=True, exist_ok=True)
    real = pictures // 8
    samples = rendered_samples(split, pictures - real) + easy_samples(real, "train")
    names: dict[int, str] = {}
    lines = []
    for number, sample in enumerate(samples):
        if id(sample.picture) not in names:
            names[id(sample.picture)] = f"{len(names):04d}.png"
            sample.picture.save(folder / names[id(sample.picture)])
        record = {"question_id": number, "image": names[id(sample.picture)], "text": sample.question}
        lines.append(json.dumps(record) + "\n")
    write_whole(folder / "questions.jsonl", "".join(lines))
