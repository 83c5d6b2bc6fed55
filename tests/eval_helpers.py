"""A tiny benchmark and a tiny random model on disk, for the tests of the evaluation programs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_checkpoints import VISION, VOCAB, tiny_config, tiny_model, write_original
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Fires on this model for some questions and not for others, which keep different numbers of tokens.
PRUNING = {"mode": ["middle"], "shallow_mid_layer": 1, "layer_threshold": 0.995, "tokens_threshold": 0.3}
WORDS = [f"w{index}" for index in range(VOCAB - 4)]


def write_model(folder: Path, seed: int = 4, layers: int = 4, patches_per_side: int = 2) -> Path:
    """A random LLaVA in the original layout whose every token is a word."""
    vision = {**VISION, "image_size": patches_per_side * VISION["patch_size"]}
    model = tiny_model(tiny_config(num_hidden_layers=layers, vision_config=vision), seed=seed)
    write_original(folder, model, num_hidden_layers=layers, vision_config=vision)
    vocab = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_benchmark(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """``questions.jsonl`` and ``images/``: repeated ids, one line twice, one question without an image."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    for index in range(4):
        size = (rng.randint(10, 60), rng.randint(10, 60))
        pixels = bytes(rng.randrange(256) for _ in range(size[0] * size[1] * 3))
        Image.frombytes("RGB", size, pixels).save(folder / "images" / f"{index}.png")
    questions: list[dict[str, Any]] = []
    for index in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        questions.append({"question_id": f"id{index // 2}", "image": f"{index % 4}.png", "text": text})
    if count > 5:
        questions[5] = dict(questions[4])
        del questions[3]["image"]
    write_lines(folder / "questions.jsonl", questions)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_ids(path: Path) -> list[dict[str, Any]]:
    """Answers as they must be equal between runs."""
    return [{key: value for key, value in answer.items() if key != "answer_id"} for answer in read_lines(path)]


def arguments(model: Path, bench: Path, answers: Path, *more: Any) -> list[str]:
    """Command line of the runner."""
    flags = {
        "--model-path": model,
        "--image-folder": bench / "images",
        "--question-file": bench / "questions.jsonl",
        "--answers-file": answers,
        "--pruning-config": json.dumps(PRUNING),
        "--max_new_tokens": 8,
        "--device": "cpu",
        "--num-workers": 0,
    }
    return [str(part) for flag in flags.items() for part in flag] + [str(part) for part in more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def program(*argv: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    """A command that runs ``llava.eval.model_vqa_loader``."""
    return [sys.executable, "-m", *launcher, "llava.eval.model_vqa_loader", *map(str, argv)]


def torchrun(processes: int) -> tuple[str, ...]:
    return ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")


def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, **kwargs)
