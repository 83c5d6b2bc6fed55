"""Command-line options that several programs share. No slow import: --help does not wait for torch."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TypeVar

from llava.constants import SHIPPED_MODEL_PATH

_Dataclass = TypeVar("_Dataclass")


def from_arguments(kind: type[_Dataclass], args: argparse.Namespace) -> _Dataclass:
    """A dataclass from a command line's options of its fields' names; fields without an option stay as they are."""
    names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def add_model_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Which model, where and how; all but the first three are the fields of `llava.inference.LoadOptions`.

    Args:
        parser: gets the options.
        required: whether the model must be named; else it is the one that ships.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-path",
        default=None if required else SHIPPED_MODEL_PATH,
        required=required,
        help="folder or hub id: a LLaVA checkpoint, or a transformers model of any supported family; or smollm2, the "
        "LLaVA on SmolLM2 (docs/smollm2.md)" + ("" if required else " (default: the model that ships)"),
    )
    model.add_argument("--model-base", help="base model of a LoRA or projector-only checkpoint")
    model.add_argument("--conv-mode", help="prompt template, such as vicuna_v1 (default: the checkpoint's)")
    model.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the first of cuda, mps, cpu that is there)")
    model.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float32 on cpu, float16 elsewhere)")
    model.add_argument("--load-8bit", action="store_true", help="quantise to 8 bit (extra 'quant')")
    model.add_argument("--load-4bit", action="store_true", help="quantise to 4 bit (extra 'quant')")
    model.add_argument("--attn-implementation", help="sdpa (default), eager or flash_attention_2")


def add_pruning_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--pruning-config``."""
    parser.add_argument(
        "--pruning-config",
        metavar="JSON|@FILE",
        help="default: pruning_config.json beside the weights, else the published one "
        "(scaled to the depth of another family's model)",
    )


def add_generation_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, max_new_tokens: int) -> None:
    """How answers are drawn: the fields of `llava.inference.GenerationOptions`. `max_new_tokens`: the default."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy; above, sampled")
    parser.add_argument("--top_p", "--top-p", type=float, help="nucleus of the sampling")
    parser.add_argument(
        "--num_beams", "--num-beams", type=int, default=1, help="beam search; its text comes at the end"
    )
    parser.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help=f"longest answer in tokens (default: {max_new_tokens})",
    )
