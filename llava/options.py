"""Command-line options that several programs share. No slow import: --help does not wait for torch."""

from __future__ import annotations

import argparse

from llava.constants import SHIPPED_MODEL_PATH


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where and how; all but the first three are the fields of `llava.inference.LoadOptions`."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-path",
        default=SHIPPED_MODEL_PATH,
        help="folder or hub id: a LLaVA checkpoint, or a transformers model of any supported family "
        "(default: the model that ships)",
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
