"""Every benchmark that the documentation has figures for, one after the other, with one command."""

from __future__ import annotations

import gc
import sys

import torch

from . import decode, layers, memory, methods, prefill, probe, throughput
from .report import parser

IMAGES = (576, 1152, 2928)  # one image, two, one of anyres


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (--batch is not read)"
    )
    arguments.add_argument("--tokens", type=int, default=128, help="new tokens in `decode`")
    parsed, given = arguments.parse_args(argv), list(sys.argv[1:] if argv is None else argv)
    shared = _without(given, "--batches", "--tokens", "--batch", "--visual")
    plan: list[tuple] = [(prefill, ["--batch", str(batch)]) for batch in parsed.batches]
    plan += [(prefill, ["--visual", str(visual), "--no-tower"]) for visual in IMAGES[1:]]
    plan += [(decode, ["--batch", str(batch), "--tokens", str(parsed.tokens)]) for batch in parsed.batches]
    plan += [(throughput, ["--batch", str(batch)]) for batch in parsed.batches]
    plan += [(memory, ["--visual", str(visual)]) for visual in (*IMAGES, 2304)]
    plan += [(methods, []), (probe, []), (layers, [])]
    failed = []
    for benchmark, own in plan:
        try:
            benchmark.main([*shared, *own])
        except torch.OutOfMemoryError as error:
            # The other figures are worth having on a small device.
            failed.append(f"{benchmark.__name__} {' '.join(own)}: {error}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        raise SystemExit("error: out of memory in\n" + "\n".join(failed))


def _without(given: list[str], *options: str) -> list[str]:
    """`given` without these options and their values."""
    kept, dropping = [], False
    for word in given:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in options
        if not dropping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
