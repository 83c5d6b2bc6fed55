"""Find a pruning config for a model, some pictures and a budget, and show why.

``python -m llava.calibrate --model-path M --images DIR --questions FILE --save-flops 0.4 -o calibration``

Half of the pictures choose, the other half says whether the choice holds. No labels are read: what counts is how far
pruned answers are from the dense ones.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava.calibrate.goal import Goal
from llava.eval.files import move_aside, read_json, to_json
from llava.options import Parser, add_model_options, from_arguments
from llava.utils import UserError, processor_name, run_main, write_whole

WORK = ".calibration"
RESULTS = ("pruning_config.json", "calibration.json", "calibration.csv", "calibration.svg", "calibration.html")
_EDGE = 1 << 20  # bytes of each weight file that are hashed from its start and from its end


def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's small files, and over name, size, first and last MiB of its weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".model"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as stream:
                digest.update(stream.read(_EDGE))
                stream.seek(max(0, size - _EDGE))
                digest.update(stream.read(_EDGE))
    return digest.hexdigest()


def work_folder(out: Path, settings: dict[str, Any]) -> Path:
    """Where measures are kept until the end; what a killed run left is taken over if it had the same settings."""
    work = out / WORK
    file = work / "settings.json"
    if file.is_file():
        kept = read_json(file)
        differ = [name for name in settings if not isinstance(kept, dict) or kept.get(name) != settings[name]]
        if differ:
            raise UserError(
                f"{out} holds an unfinished calibration with another {', '.join(differ)}; finish it with the same "
                f"settings, give another -o, or delete {work}"
            )
        return work
    write_whole(file, to_json(settings))
    return work


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    add_model_options(parser)
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder with pictures")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="LLaVA's JSON, or one {image, text} a line (.jsonl); absent, general questions are asked, and the result "
        "depends on them",
    )
    goal = parser.add_argument_group("budget (one of them)")
    goal.add_argument("--save-flops", type=float, metavar="SHARE", help="executed prefill FLOPs to save, like 0.4")
    goal.add_argument("--max-ms", metavar="MS", help="time to the first token: milliseconds, or 0.6x the dense time")
    goal.add_argument("--min-agreement", type=float, metavar="SHARE", help="answers as dense, like 0.98")
    parser.add_argument("--method", default="visipruner", metavar="NAME,NAME", help="or all (default: visipruner)")
    parser.add_argument("--pictures", type=int, default=64, metavar="N", help="at most, drawn by seed (default: 64)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder for config and report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0: a config was found; 1: none meets the budget; 130: interrupted."""
    args = parser().parse_args(argv)
    goal = Goal.parse(args.save_flops, args.max_ms, args.min_agreement)
    for flag, least in {"pictures": 2, "max_new_tokens": 1, "batch_size": 1}.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least {least}")
    try:
        return run(args, goal, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, goal: Goal, argv: Sequence[str]) -> int:
    """One calibration; the exit status."""

    from llava.calibrate.samples import BUILT_IN, halves, hash_of, read_samples
    from llava.calibrate.search import check_methods
    from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint

    methods = check_methods(args.method)
    samples = read_samples(args.images, args.questions, args.seed, args.pictures)
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    prompts, asked, skipped = [], [], []
    for sample in samples:
        try:
            pictures = [checkpoint.read_picture(path) for path in sample.pictures]
            prompts.append(checkpoint.encode([Turn(sample.question, pictures)]))
            asked.append(sample)
        except UserError as error:
            skipped.append(str(error))
    for why in skipped:
        print(f"skipped: {why}", file=sys.stderr)
    if len({sample.group for sample in asked}) < 2:
        raise UserError(
            f"{len(asked)} of {len(samples)} questions can be asked, about fewer than 2 pictures; "
            f"the first that cannot: {skipped[0] if skipped else '-'}"
        )
    choosing, held_out = halves(asked)
    settings = {
        "model": str(args.model_path),
        "model_base": args.model_base,
        "conv_mode": args.conv_mode,
        "fingerprint": fingerprint(checkpoint.folder),
        "data": hash_of(asked),
        "goal": goal.to_dict(),
        "methods": methods,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        **{name: getattr(args, name) for name in ("device", "dtype", "load_8bit", "load_4bit", "attn_implementation")},
    }
    versions = {name: version(name) for name in ("llava-visipruner", "torch", "transformers")}
    versions["python"] = platform.python_version()
    work = work_folder(args.output, settings)

    from llava.calibrate.report import write_results
    from llava.calibrate.runs import Runs
    from llava.calibrate.search import calibrate

    start = time.perf_counter()
    loaded = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(sample.group for sample in asked))}
    runs = Runs(
        loaded,
        prompts,
        [numbers[sample.group] for sample in asked],
        GenerationOptions(args.max_new_tokens),
        args.batch_size,
        args.seed,
        work / "runs.jsonl",
    )
    found = calibrate(goal, methods, runs, choosing, held_out, work)
    about = {
        **settings,
        "data": {
            "images": str(args.images),
            "questions": str(args.questions) if args.questions else list(BUILT_IN),
            "sha256": settings["data"],
            "pictures": len(numbers),
            "asked": len(asked),
            "skipped": skipped,
            "to_choose_on": len(choosing),
            "held_out": len(held_out),
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.perf_counter() - start, 1),
        "placement": loaded.placement,
        "hardware": processor_name(),
        **versions,
        "command": ["python", "-m", "llava.calibrate", *argv],
    }
    for name in RESULTS:
        if moved := move_aside(args.output / name):
            print(f"Moved aside: {moved}")
    write_results(found, about, args.output)
    shutil.rmtree(work)
    return 0 if found.best is not None else 1


if __name__ == "__main__":
    run_main(main)
