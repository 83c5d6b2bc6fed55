"""What a report says, as plain values: the page is drawn from them, and ``--json-output`` writes them down."""

from __future__ import annotations

import base64
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from llava import __version__
from llava.eval.compare import kv_bytes
from llava.inference import Answer, GenerationOptions, LoadedModel, Picture, Prompt, Turn
from llava.pruning import METHODS, Method, VisiPruner
from llava.pruning.families import adapter_for
from llava.pruning.flops import flops, vision_attention_saved

from .lenses import (
    TopTokens,
    attention_shares,
    attention_to_image,
    logit_lens,
    smallest_cosines,
    value_norms,
    value_output_lens,
)
from .observe import Observation, observe
from .record import Recording, RowRecord

DENSE, PRUNED = "dense", "pruned"
FORMAT = "llava-visipruner report, 1"
TOP = 5
TIMED_RUNS, TIMED_SECONDS = 3, 2.0

Rows = Literal["last", "text", "all"]
"""Whose attention is recorded: the prompt's last row and the answer's, text behind the first visual row too, or all."""


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        question_id: of the question file; None without one.
        text: what is asked.
        picture: what about.
        expected: the answer that the question file names; None where it names none.
    """

    question_id: str | int | None
    text: str
    picture: Picture
    expected: str | None = None


def findings(chat: LoadedModel, config: Method, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole document. `questions`: of `question_findings`."""
    first = questions[0]
    document = {
        "format": FORMAT,
        "facts": _facts(chat),
        "config": config.to_dict(),
        "method": {"name": config.name, "about": _about(config)},
        "num_layers": chat.checkpoint.num_layers,
        "runs": list(first["runs"]),
        "overview": overview(questions),
        "questions": list(questions),
    }
    return _finite(document)


def question_findings(
    chat: LoadedModel,
    asked: Asked,
    config: Method,
    *,
    rows: Rows = "text",
    compare: bool = True,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Ask one question, dense and pruned, and say everything that can be seen of it.

    The clock is read in runs of their own, since recording takes time.

    Args:
        chat: the model.
        asked: question and picture.
        config: of the pruned run.
        rows: whose attention is recorded.
        compare: whether to run dense too.
        max_new_tokens: longest answer in tokens.
    """
    prompt = chat.checkpoint.encode([Turn(asked.text, [asked.picture])])
    configs = {DENSE: None} if config.is_dense else {DENSE: None, PRUNED: config} if compare else {PRUNED: config}
    chat.warm_up(prompt, config)
    watched = _positions(prompt, rows)
    runs, patches = {}, None
    for name, each in configs.items():
        answers = _timed(chat, prompt, each, GenerationOptions(max_new_tokens=max_new_tokens))
        seen = observe(chat, asked.picture, asked.text, each, rows=watched, max_new_tokens=max_new_tokens)
        runs[name] = _run(chat, seen, answers, watched)
        patches = _patches(seen)
    answers_given = [run["answer"] for run in runs.values()]
    return {
        "question_id": asked.question_id,
        "question": asked.text,
        "expected": asked.expected,
        "picture": {"source": Path(asked.picture.source).name, "size": list(asked.picture.image.size)},
        "patches": patches,
        "num_rows": prompt.num_rows,
        "num_visual": prompt.num_visual,
        "agree": len(set(answers_given)) == 1 if len(runs) > 1 else None,
        "runs": runs,
    }


def overview(questions: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How often both runs said the same, and means over the questions; None where there is one run."""
    if len(questions[0]["runs"]) < 2:
        return None
    pairs = [(each["runs"][DENSE], each["runs"][PRUNED]) for each in questions]
    agree = sum(bool(each["agree"]) for each in questions)

    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    expected = [each for each in questions if each["expected"] is not None]
    return {
        "questions": len(questions),
        "agree": agree,
        "agreement": agree / len(questions),
        "expected": len(expected),
        "right": {
            name: sum(_same(each["expected"], each["runs"][name]["answer"]) for each in expected)
            for name in (DENSE, PRUNED)
        },
        "kept": mean([pruned["num_kept"] for _, pruned in pairs]),
        "num_visual": mean([each["num_visual"] for each in questions]),
        "flops_saved": mean([pruned["flops_saved"]["executed"] for _, pruned in pairs]),
        "kv_saved": mean([1 - pruned["kv_bytes"] / dense["kv_bytes"] for dense, pruned in pairs]),
        "first_token_s": {
            name: mean([each["runs"][name]["time"]["first_token_s"] for each in questions]) for name in (DENSE, PRUNED)
        },
    }


def _same(expected: str, answer: str) -> bool:
    return expected.strip().strip(".").lower() == answer.strip().strip(".").lower()


def _positions(prompt: Prompt, rows: Rows) -> list[int]:
    """Rows of the prompt to record; those that stand before every picture read nothing of it."""
    visual = prompt.is_visual.numpy()
    first = int(np.flatnonzero(visual)[0])
    if rows == "last":
        return [prompt.num_rows - 1]
    return [row for row in range(first, prompt.num_rows) if rows == "all" or not visual[row]]


def _timed(chat: LoadedModel, prompt: Prompt, config: Method | None, options: GenerationOptions) -> list[Answer]:
    """A few runs of the same prompt, one where a run takes long."""
    begin, answers = time.perf_counter(), [chat.answer(prompt, config, options)]
    while len(answers) < TIMED_RUNS and time.perf_counter() - begin < TIMED_SECONDS:
        answers.append(chat.answer(prompt, config, options))
    return answers


def _run(chat: LoadedModel, run: Observation, answers: Sequence[Answer], watched: Sequence[int]) -> dict[str, Any]:
    trace, config, last = run.trace, run.config, run.last
    is_dense = config is None or config.is_dense
    thresholds = {}
    # The curve is the last row's.
    if isinstance(config, VisiPruner) and config.middle and config.probe_rows == "last":
        thresholds["layer_threshold"] = config.layer_threshold
        if config.deep:
            thresholds["exit_threshold"] = config.exit_threshold
    shares = attention_shares(run.recording, last)
    decoder = adapter_for(chat.model).decoder.config
    return {
        "answer": run.answer,
        "is_dense": is_dense,
        "num_kept": int(run.kept.sum()),
        "kept": np.flatnonzero(run.kept).tolist(),
        "select_layer": trace.select_layer,
        "exit_layer": trace.exit_layer,
        "time": _time(answers),
        "kv_bytes": kv_bytes(trace.rows_per_layer, decoder, chat.model.dtype),
        "flops": flops(trace, chat.shape),
        "flops_saved": run.savings,
        "vision_attention_saved": vision_attention_saved(trace),
        "rows_per_layer": trace.rows_per_layer,
        "shares": [
            {name: _short(value) for name, value in zip(shares._fields, layer, strict=True)}
            for layer in np.stack(shares, axis=1)
        ],
        "smallest_cosine": [float(value) for value in smallest_cosines(last)],
        "thresholds": thresholds,
        "logit_lens": _table(logit_lens(chat.model, chat.tokenizer, last, TOP)),
        "image_lens": _table(value_output_lens(chat.model, chat.tokenizer, last.image_output, TOP)),
        "sinks": _sinks(attention_to_image(run.recording, last), value_norms(run.recording)),
        **_present(run),
        "attention": _attention(run, watched),
        "trace": trace.to_dict(),
    }


def _time(answers: Sequence[Answer]) -> dict[str, Any]:
    """Medians, in seconds; per token: of the tokens behind the first, None where there are none."""
    speeds = [answer.clock.tokens_per_second for answer in answers]
    known = [1 / speed for speed in speeds if speed]
    return {
        "runs": len(answers),
        "first_token_s": statistics.median(answer.clock.first_token for answer in answers),
        "per_token_s": statistics.median(known) if known else None,
        "seconds": statistics.median(answer.clock.seconds for answer in answers),
    }


def _table(top: TopTokens) -> list[list[dict[str, Any]]]:
    return [
        [
            {"text": text, "probability": _short(probability)}
            for text, probability in zip(texts, probabilities, strict=True)
            if text
        ]
        for texts, probabilities in zip(top.texts, top.probabilities, strict=True)
    ]


def _sinks(attention: np.ndarray, norms: np.ndarray) -> list[dict[str, Any] | None]:
    """The visual row most attended to in every layer, and how long its values are beside the others'."""
    rows: list[dict[str, Any] | None] = []
    for weights, lengths in zip(attention, norms, strict=True):
        if np.isnan(lengths).all() or np.nansum(weights) <= 0:
            rows.append(None)
            continue
        row = int(np.argmax(np.nan_to_num(weights)))
        rows.append(
            {
                "patch": row,
                "attention": _short(weights[row]),
                "norm": _short(lengths[row]),
                "median": _short(np.nanmedian(lengths)),
            }
        )
    return rows


def _patches(run: Observation) -> dict[str, Any]:
    """Boxes as fractions of the picture, of the visual rows that show a part of it; `rows` numbers them."""
    shown = np.flatnonzero(run.patches.on_picture)
    boxes = run.patches.boxes[shown] / np.tile(run.picture.image.size, 2)
    return {
        "is_known": run.patches.is_known,
        "total": len(run.patches.boxes),
        "rows": shown.tolist(),
        "boxes": np.round(boxes, 5).tolist(),
        "is_tile": [str(view) == "tiles" for view in run.patches.views[shown]],
    }


def _present(run: Observation) -> dict[str, Any]:
    """Visual rows that each layer processed: a digit for each of the patches' `rows`, and how many in all."""
    there = run.recording.present[:, run.recording.visual_positions]
    shown = np.flatnonzero(run.patches.on_picture)
    return {
        "there": ["".join("01"[int(each)] for each in layer[shown]) for layer in there],
        "num_there": there.sum(axis=1).tolist(),
    }


def _attention(run: Observation, watched: Sequence[int]) -> list[dict[str, Any]]:
    """What each recorded row gives to the picture in every layer (L), mean over heads.

    `image` [L] is its attention on all visual rows together and `top` [L] the most that one of them gets, None where
    the row did not reach the layer; `steps` [L] are base64 of a byte for each of the patches' `rows`, in 255 steps of
    `top`.
    """
    shown = np.flatnonzero(run.patches.on_picture)
    first_answer = run.recording.num_rows
    answer_rows = range(first_answer, first_answer + len(run.answer_ids) - 1)
    rows = []
    for position in [*watched, *answer_rows]:
        record = run.recording.rows.get(position)
        if record is None:  # a visual row that left before the first layer
            continue
        image, top, steps = _steps(run.recording, record, shown)
        rows.append(
            {
                "row": position,
                "label": run.labels[position],
                "is_answer": position >= first_answer,
                "image": image,
                "top": top,
                "steps": steps,
            }
        )
    return rows


def _steps(recording: Recording, row: RowRecord, shown: np.ndarray) -> tuple[list, list, list[str]]:
    weights = attention_to_image(recording, row)
    reached = ~np.isnan(row.attention).all(axis=(1, 2))
    weights = np.nan_to_num(weights)
    # Where nothing can be drawn, the words beside the slider still name the largest of all.
    top = (weights[:, shown] if len(shown) else weights).max(axis=1, initial=0)
    steps = np.round(weights[:, shown] * (255 / np.where(top > 0, top, 1))[:, None]).astype(np.uint8)
    known = [_short(value) if there else None for value, there in zip(weights.sum(axis=1), reached, strict=True)]
    tops = [_short(value) if there else None for value, there in zip(top, reached, strict=True)]
    return known, tops, [base64.b64encode(layer.tobytes()).decode() for layer in steps]


def _about(config: Method) -> str:
    return (METHODS[config.name].__doc__ or "").strip().partition("\n\n")[0].replace("\n    ", " ").replace("`", "")


def _facts(chat: LoadedModel) -> dict[str, Any]:
    return {
        "model": chat.checkpoint.name,
        "parameters": sum(weights.numel() for weights in chat.model.parameters()),
        "layers": chat.checkpoint.num_layers,
        "device, dtype": chat.placement,
        "threads": torch.get_num_threads(),
        "prompt template": chat.checkpoint.conv_mode,
        "decoding": "greedy",
        "llava-visipruner": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _short(value: Any) -> float:
    """Four digits: more would only make files longer."""
    return float(f"{float(value):.4g}")


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
