"""One HTML file that shows how a model answered a question about a picture, to look at and to send around.

``python -m llava.visualize.report --image photo.jpg --question "What is this?" -o report.html``

The page needs no network and loads nothing. Every string in it (question, answers, tokens, file names) is escaped by
the template engine, data goes in as JSON in which ``<``, ``>`` and ``&`` are escaped, and the page's content security
policy runs its own script and no other.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import platform
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from llava.inference import LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.options import Parser, add_model_options, add_pruning_option, from_arguments
from llava.pruning import VisiPruner
from llava.pruning.flops import CONVENTIONS, vision_attention_saved
from llava.utils import UserError, run_main, write_whole

from .draw import overlay_kept
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
from .patches import kept_in_words

TOP = 5
PICTURE_SIDE = 768


def build_report(chat: LoadedModel, runs: dict[str, Observation]) -> str:
    """The page for one or more runs of the same question.

    Args:
        chat: the model that ran.
        runs: name → run; the first is shown first.

    Returns:
        HTML, self-contained.
    """
    first = next(iter(runs.values()))
    environment = Environment(
        loader=PackageLoader("llava.visualize", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    loader = environment.loader
    assert loader is not None
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        question=first.question,
        picture=_data_uri(first.picture.image),
        picture_size=first.picture.image.size,
        source=Path(first.picture.source).name,
        runs={name: _run_facts(chat, run) for name, run in runs.items()},
        data=_slider_data(runs),
        script=Markup(script),  # ours, from the package
        style=Markup(loader.get_source(environment, "report.css")[0]),
        script_hash=digest,
        conventions=CONVENTIONS,
        facts=_facts(chat),
        num_layers=first.recording.num_layers,
        is_known=first.patches.is_known,
    )


def _run_facts(chat: LoadedModel, run: Observation) -> dict[str, Any]:
    trace, config, last = run.trace, run.config, run.last
    shares = attention_shares(run.recording, last)
    curve = smallest_cosines(last)
    is_dense, is_known = config is None or config.is_dense, run.patches.is_known
    thresholds = {}
    # The curve is the last row's.
    if isinstance(config, VisiPruner) and config.middle and config.probe_rows == "last":
        thresholds["layer_threshold"] = config.layer_threshold
        if config.deep:
            thresholds["exit_threshold"] = config.exit_threshold
    norms, attention = value_norms(run.recording), attention_to_image(run.recording, last)
    return {
        "answer": run.answer or "(nothing)",
        "is_dense": is_dense,
        "config": config.to_dict() if config is not None else None,
        "trace": trace,
        "num_kept": int(run.kept.sum()),
        "num_visual": trace.num_visual,
        # A picture without marks would say that nothing was kept.
        "kept_picture": _data_uri(overlay_kept(run.picture.image, run.patches, run.kept)) if is_known else None,
        "kept_words": kept_in_words(run.kept),
        "savings": run.savings,
        "vision_attention_saved": vision_attention_saved(trace),
        "shares": [dict(zip(shares._fields, map(float, layer), strict=True)) for layer in np.stack(shares, axis=1)],
        "rows": trace.rows_per_layer,
        "num_text": trace.num_rows - trace.num_visual,
        "curve": [None if np.isnan(value) else float(value) for value in curve],
        "thresholds": thresholds,
        "logit_lens": _table(logit_lens(chat.model, chat.tokenizer, last, TOP)),
        "image_lens": _table(value_output_lens(chat.model, chat.tokenizer, last.image_output, TOP)),
        "sinks": _sinks(attention, norms),
    }


def _table(top: TopTokens) -> list[list[dict[str, Any]]]:
    return [
        [
            {"text": text, "probability": float(probability)}
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
                "attention": float(weights[row]),
                "norm": float(lengths[row]),
                "median": float(np.nanmedian(lengths)),
            }
        )
    return rows


def _slider_data(runs: dict[str, Observation]) -> dict[str, Any]:
    """What the slider draws: boxes, and attention of every layer in 256 steps of the layer's maximum."""
    first = next(iter(runs.values()))
    width, height = first.picture.image.size
    boxes = first.patches.boxes / np.tile((width, height), 2)
    shown = np.flatnonzero(first.patches.on_picture)
    data: dict[str, Any] = {
        "boxes": np.round(boxes[shown], 5).tolist(),
        "rows": shown.tolist(),
        "total": len(boxes),
        "runs": {},
    }
    for name, run in runs.items():
        attention = np.nan_to_num(attention_to_image(run.recording, run.last))
        there = run.recording.present[:, run.recording.visual_positions]
        # Where nothing can be drawn, the words beside the slider still name the largest of all.
        top = (attention[:, shown] if len(shown) else attention).max(axis=1, initial=0)
        steps = np.round(attention[:, shown] * (255 / np.where(top > 0, top, 1))[:, None]).astype(int)
        data["runs"][name] = {
            "attention": steps.tolist(),
            "max": [float(f"{value:.4g}") for value in top],
            "image": [float(f"{value:.4g}") for value in attention.sum(axis=1)],
            "there": ["".join("01"[int(each)] for each in layer[shown]) for layer in there],
            "count": there.sum(axis=1).tolist(),
        }
    return data


def _facts(chat: LoadedModel) -> dict[str, str]:
    return {
        "model": chat.checkpoint.name,
        "layers": str(chat.checkpoint.num_layers),
        "device, dtype": chat.placement,
        "prompt template": chat.checkpoint.conv_mode,
        "decoding": "greedy",
        "llava-visipruner": version("llava-visipruner"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffers = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffers[kind] = io.BytesIO()
        image.save(buffers[kind], kind, **options)  # type: ignore[arg-type]
    kind, buffer = min(buffers.items(), key=lambda entry: len(entry[1].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- the program -----------------------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Write one HTML file that shows how a question about a picture was answered.")
    parser.add_argument("--image", required=True, metavar="PATH|URL", help="the picture")
    parser.add_argument("--question", required=True, metavar="TEXT", help="what to ask about it")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the HTML file to write")
    add_pruning_option(parser)
    parser.add_argument("--compare", action="store_true", help="run without pruning too, and show both")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer in tokens (default: 32)")
    add_model_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Raises `UserError` on bad input, before weights are read where possible."""
    args = _arguments(argv)
    warnings.filterwarnings("ignore", module="transformers")
    output: Path = args.output.expanduser()
    if output.is_dir():
        raise UserError(f"--output {str(output)!r} is a folder; name the file to write")
    if not output.parent.is_dir():
        raise UserError(f"--output {str(output)!r}: folder {str(output.parent)!r} does not exist; make it first")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {str(output)!r}: folder {str(output.parent)!r} cannot be written to")
    if not args.question.strip():
        raise UserError("--question is empty; ask something about the picture")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = checkpoint.pruning_config(args.pruning_config)
    picture = checkpoint.read_picture(args.image)
    checkpoint.encode([Turn(args.question, [picture])])

    chat = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    runs = {"pruned": observe(chat, picture, args.question, config, max_new_tokens=args.max_new_tokens)}
    if args.compare:
        runs["dense"] = observe(chat, picture, args.question, max_new_tokens=args.max_new_tokens)
    write_whole(output, build_report(chat, runs))
    print(f"wrote {output} ({output.stat().st_size / 1024:,.0f} KiB)")
    return 0


if __name__ == "__main__":
    run_main(main)
