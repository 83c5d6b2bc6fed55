"""The commands of `visipruner`: which program each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        where: module and function of its program, which takes a command line and returns an exit code or None.
        what: it does, in a few words.
        examples: command lines.
    """

    where: str
    what: str
    examples: tuple[str, ...]

    def program(self) -> Callable[[Sequence[str]], int | None]:
        """The program itself. Imports its module, which may take seconds."""
        module, _, function = self.where.partition(":")
        program: Callable[[Sequence[str]], int | None] = getattr(import_module(module), function)
        return program


COMMANDS = {
    "chat": Command(
        "llava.serve.cli_pruning:main",
        "talk about pictures in the terminal",
        (
            "visipruner chat --example sign",
            "visipruner chat --image-file photo.jpg",
            "visipruner chat --model-path liuhaotian/llava-v1.5-7b --image-file photo.jpg",
        ),
    ),
    "ask": Command(
        "llava.serve.cli_pruning:ask",
        "one question, one answer; without any: an example, and what was pruned",
        (
            "visipruner ask",
            "visipruner ask --examples",
            'visipruner ask --image-file photo.jpg --question "What is this?"',
            'visipruner ask --image-file photo.jpg --question "What is this?" --show',
            'visipruner ask --image-file photo.jpg --question "What is this?" --json',
            "visipruner ask --image-file photo.jpg < questions.txt",
        ),
    ),
    "web": Command(
        "llava.serve.gradio_pruning:main",
        "the same chat in the browser (extra web)",
        ("visipruner web", "visipruner web --server http://127.0.0.1:8000"),
    ),
    "report": Command(
        "llava.visualize.report:main",
        "one page that shows how a question was answered, layer by layer",
        ('visipruner report --image photo.jpg --question "What is this?" -o report.html',),
    ),
    "eval": Command(
        "llava.eval.model_vqa_loader:main",
        "answer a file of questions",
        (
            "visipruner eval --model-path liuhaotian/llava-v1.5-7b --question-file questions.jsonl "
            "--image-folder images --answers-file answers.jsonl",
        ),
    ),
    "compare": Command(
        "llava.eval.compare:main",
        "a model dense and under pruning configs: scores, agreement, FLOPs, time",
        (
            "visipruner compare --benchmark gqa -o compare",
            "visipruner compare --benchmark textvqa --method fastv,divprune --tokens 64 -o compare",
        ),
    ),
    "serve": Command(
        "llava.serve.api:main",
        "answer OpenAI's clients over HTTP (extra serve)",
        ("visipruner serve", "visipruner serve --port 8080 --api-key-file keys.txt"),
    ),
    "calibrate": Command(
        "llava.calibrate.__main__:main",
        "find a pruning config for a model and pictures",
        ("visipruner calibrate --images my_pictures --save-flops 0.35 -o calibration",),
    ),
    "train": Command(
        "llava.train.train:main",
        "train a projector, a LoRA adapter or a whole model on LLaVA's data (extra train)",
        (
            "visipruner train --model_name_or_path my_llava --data_path samples.json --image_folder images "
            "--lora_enable True --output_dir adapter",
        ),
    ),
    "models": Command(
        "llava.cli.models:main", "known models and families", ("visipruner models", "visipruner models --json")
    ),
    "methods": Command(
        "llava.cli.methods:main",
        "pruning methods and their knobs",
        ("visipruner methods", "visipruner methods fastv", "visipruner methods --json"),
    ),
}
