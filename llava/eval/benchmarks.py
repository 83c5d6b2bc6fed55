"""The benchmarks: where their files are, how they are scored, what was published; and what the scripts ask for.

``python -m llava.eval.benchmarks plan gqa`` says what a script is to run, ``… score gqa --answers …`` scores it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.constants import SHIPPED_MODEL_PATH
from llava.eval import eval_gqa, eval_mme, eval_pope, eval_textvqa
from llava.eval.files import read_jsonl, to_json
from llava.eval.scoring import Scores, show
from llava.eval.traces import PruningSummary
from llava.eval.verdicts import Verdicts
from llava.inference import open_checkpoint
from llava.mm_utils import get_model_name_from_path
from llava.model.recommended import PUBLISHED as PUBLISHED_CONFIG
from llava.options import Parser
from llava.pruning import Method, PruningConfig
from llava.utils import UserError, run_main, write_whole

DATA = Path(__file__).parents[2] / "playground" / "data"
#: What LLaVA users unpack its ``eval.zip`` into, and the small benchmarks that come with the project.
REAL, MINI = "eval", "mini"
DEFAULT_MODEL = "liuhaotian/llava-v1.5-7b"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's files, relative to the folder that LLaVA's ``eval.zip`` unpacks into.

    Attributes:
        name: as scripts call it; ``title``: as people do; ``unit``: of the headline score.
        truth: file or folder of the right answers.
        score_files, judge_files: the scorer's, for these files; print_scores: its table.
    """

    name: str
    title: str
    unit: str
    question_file: str
    image_folder: str
    truth: str
    score_files: Callable[[Files, Path, bool], Scores]
    print_scores: Callable[[Scores], None]
    judge_files: Callable[[Files, Path], Verdicts]

    def files(self, data: str | Path | None = None) -> Files:
        """Find the files: in ``data``, else among the user's, else among those that come with the project.

        Raises:
            UserError: they are nowhere, or only some of them; the message shows the layout.
        """
        if data is not None:
            root = Path(data)
        else:
            root = next(
                (DATA / kind for kind in (REAL, MINI) if (DATA / kind / self.question_file).is_file()), DATA / REAL
            )
        files = Files(
            root, root / self.question_file, root / self.image_folder, root / self.truth, (DATA / MINI).resolve()
        )
        for path in (files.questions, files.images, files.truth):
            if not path.exists():
                raise UserError(
                    f"{path} is missing. {self.title} needs, under {root}:\n"
                    f"  {self.question_file}   questions (from LLaVA's eval.zip)\n"
                    f"  {self.image_folder}/   images\n"
                    f"  {self.truth}   right answers"
                )
        return files

    def score(self, files: Files, answers: str | Path, *, allow_partial: bool = False) -> Scores:
        """Score an answers file by the benchmark's published rule."""
        return self.score_files(files, Path(answers), allow_partial)

    def judge(self, files: Files, answers: str | Path) -> Verdicts:
        """What each answer of a file gives to the score."""
        return self.judge_files(files, Path(answers))


@dataclass(frozen=True)
class Files:
    """Where one benchmark's files are."""

    root: Path
    questions: Path
    images: Path
    truth: Path
    mini_root: Path

    @property
    def kind(self) -> str:
        """``mini`` for what comes with the project, else ``eval``."""
        return MINI if self.root.resolve() == self.mini_root else REAL


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "gqa",
            "GQA",
            "accuracy, %",
            "gqa/llava_gqa_testdev_balanced.jsonl",
            "gqa/data/images",
            "gqa/data/testdev_balanced_questions.json",
            lambda files, answers, partial: eval_gqa.score_files(files.truth, answers, allow_partial=partial),
            eval_gqa.print_scores,
            lambda files, answers: eval_gqa.judge_files(files.truth, answers),
        ),
        Benchmark(
            "mme",
            "MME",
            "Perception, of 2000",
            "MME/llava_mme.jsonl",
            "MME/MME_Benchmark_release_version",
            "MME/MME_Benchmark_release_version",
            lambda files, answers, partial: eval_mme.score_files(
                files.truth, answers, allow_partial=partial, results_dir=answers.parent / "results"
            ),
            eval_mme.print_scores,
            lambda files, answers: eval_mme.judge_files(files.truth, answers),
        ),
        Benchmark(
            "textvqa",
            "TextVQA",
            "accuracy, %",
            "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            "textvqa/train_images",
            "textvqa/TextVQA_0.5.1_val.json",
            lambda files, answers, partial: eval_textvqa.score_files(files.truth, answers, allow_partial=partial),
            eval_textvqa.print_scores,
            lambda files, answers: eval_textvqa.judge_files(files.truth, answers),
        ),
        Benchmark(
            "pope",
            "POPE",
            "mean F1, %",
            "pope/llava_pope_test.jsonl",
            "pope/val2014",
            "pope/coco",
            lambda files, answers, partial: eval_pope.score_files(
                files.truth, files.questions, answers, allow_partial=partial
            ),
            eval_pope.print_scores,
            lambda files, answers: eval_pope.judge_files(files.truth, files.questions, answers),
        ),
    )
}

#: Headline scores as published: LLaVA-1.5's own, and VisiPruner's tables at second hand (arXiv 2510.17205).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "llava-v1.5-7b": {
        "dense": {"gqa": 62.0, "textvqa": 58.2, "pope": 85.9, "mme": 1510.7},
        "VisiPruner": {"gqa": 60.3, "textvqa": 55.2, "pope": 84.4, "mme": 1428.3},
    },
    "llava-v1.5-13b": {"dense": {"gqa": 63.3, "textvqa": 61.3, "pope": 85.9, "mme": 1531.3}},
}


def published(model: str | Path, benchmark: str, kind: str) -> dict[str, float]:
    """Published scores, dense and pruned, where model and data are those they were measured with."""
    if kind != REAL:
        return {}
    name = get_model_name_from_path(str(model)).lower().removesuffix("-hf").replace("llava-1.5", "llava-v1.5")
    return {way: scores[benchmark] for way, scores in PUBLISHED.get(name, {}).items() if benchmark in scores}


# --- what the scripts ask for ---


def plan(args: argparse.Namespace) -> None:
    """Print what a script is to run, one value a line: model, questions, images, config, run folder, processes …"""
    benchmark = BENCHMARKS[args.benchmark]
    files = benchmark.files(args.data)
    model = args.model or (str(SHIPPED_MODEL_PATH) if files.kind == MINI else DEFAULT_MODEL)
    config: Method | None
    if Path(model).expanduser().is_dir():
        config = open_checkpoint(model).pruning_config(args.pruning_config or None)
    else:
        # A hub id is not looked up before the run: its weights bring no config of ours.
        config = PruningConfig.from_any(args.pruning_config or None) or PUBLISHED_CONFIG
    written = json.dumps(config.to_dict())
    name = f"{benchmark.name}/{files.kind}/{get_model_name_from_path(model)}"
    # CUDA_VISIBLE_DEVICES says how many processes; torch counts those of them that are there.
    processes = max(1, torch.cuda.device_count()) if os.environ.get("CUDA_VISIBLE_DEVICES") else 1
    pruned_folder = f"{name}/pruned-{hashlib.sha256(written.encode()).hexdigest()[:8]}"
    for value in (
        files.root,
        files.kind,
        model,
        files.questions,
        files.images,
        written,
        f"{name}/dense",
        pruned_folder,
        processes,
    ):
        print(value)


def score(args: argparse.Namespace) -> None:
    """Score answers, print them beside dense and published ones and what pruning saved, write ``scores.json``."""
    benchmark = BENCHMARKS[args.benchmark]
    files = benchmark.files(args.data)
    answers = Path(args.answers)
    scores = benchmark.score(files, answers, allow_partial=args.allow_partial)
    if scores["answered"] != scores["total"]:
        print(f"PARTIAL: {scores['answered']} of {scores['total']} questions answered")
    benchmark.print_scores(scores)
    way = "VisiPruner" if args.trace_file else "dense"
    rows: list[tuple[Any, ...]] = [(f"{way}, this run", scores["score"], f"{scores['answered']}/{scores['total']}")]
    result: dict[str, Any] = {"benchmark": benchmark.name, "data": files.kind, "model": args.model, "scores": scores}
    if args.dense_answers and Path(args.dense_answers).is_file():
        dense = benchmark.score(files, args.dense_answers, allow_partial=args.allow_partial)
        rows.append(("dense, this model", dense["score"], f"{dense['answered']}/{dense['total']}"))
        result["dense"] = dense
    for name, value in published(args.model, benchmark.name, files.kind).items():
        rows.append((f"{name}, published", value, None))
        result.setdefault("published", {})[name] = value
    show(f"{benchmark.title} ({files.kind} data)", ("", benchmark.unit, "answered"), rows)
    if args.trace_file:
        summary = PruningSummary.of(read_jsonl(args.trace_file))
        result["pruning"] = vars(summary)
        print_savings(summary)
    write_whole(answers.parent / "scores.json", to_json(result))


def print_savings(summary: PruningSummary) -> None:
    """What pruning kept and saved, as a table."""
    rows: list[tuple[Any, ...]] = [
        ("visual tokens kept", summary.kept),
        ("of", summary.visual),
        ("selecting layer", summary.select_layer),
        ("exit layer", summary.exit_layer),
    ]
    rows += [
        (f"prefill FLOPs saved, % ({name})", None if share is None else 100 * share)
        for name, share in summary.flops_saved.items()
    ]
    show(f"Pruning, mean over {summary.questions} questions with an image", ("", "mean"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description="What the scripts under scripts/v1_5 run and score.")
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan", help="print what to run, one value a line")
    scoring = commands.add_parser("score", help="score an answers file")
    for command in (planning, scoring):
        command.add_argument("benchmark", choices=BENCHMARKS)
        command.add_argument("--data", help="folder with the benchmark's files (default: the user's, else mini)")
        command.add_argument("--model", default="", help="folder or hub id of the checkpoint")
    planning.add_argument("--pruning-config", help="JSON or @file (default: the model's own, else the published)")
    scoring.add_argument("--answers", required=True, metavar="FILE")
    scoring.add_argument("--trace-file", metavar="FILE", help="traces of a pruned run")
    scoring.add_argument("--dense-answers", metavar="FILE", help="answers of a dense run, used if they are there")
    scoring.add_argument("--allow-partial", action="store_true")
    args = parser.parse_args(argv)
    {"plan": plan, "score": score}[args.command](args)


if __name__ == "__main__":
    run_main(main)
