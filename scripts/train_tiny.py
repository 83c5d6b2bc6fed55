"""Train the model that ships with the project, from nothing, and write it as a LLaVA checkpoint.

python scripts/train_tiny.py                                    # the whole curriculum, into runs/tiny; resumes
python scripts/train_tiny.py --export llava/assets/tiny_llava   # its last checkpoint as a LLaVA folder
python scripts/train_tiny.py --questions runs/questions         # pictures and questions to calibrate it on
python scripts/train_tiny.py --measure llava/assets/tiny_llava  # write its accuracy.json
python scripts/train_tiny.py --smoke --out /tmp/smoke
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import socket
from pathlib import Path

# Threads that spin while they wait cost most of the time on a machine that does other work too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tiny_llava.card import card
from tiny_llava.export import export, write_json
from tiny_llava.measure import accuracy_report, write_question_file
from tiny_llava.train import CURRICULA, Run, effort
from torch import distributed


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curriculum", choices=sorted(CURRICULA), default="full")
    parser.add_argument("--smoke", action="store_true", help="a run of a minute that learns a little of easy-VQA")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of checkpoint and log; resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread that share every batch")
    parser.add_argument("--joint-steps", type=int, help="another length of the last stage")
    parser.add_argument("--every", type=float, default=150.0, help="seconds between checkpoints")
    parser.add_argument("--export", type=Path, help="write the checkpoint in --out here as a LLaVA folder; no training")
    parser.add_argument("--questions", type=Path, help="write pictures and questions.jsonl here; no training")
    parser.add_argument("--split", default="validation", help="of --questions: a name, its pictures' seed")
    parser.add_argument("--pictures", type=int, default=64, help="of --questions")
    parser.add_argument("--measure", type=Path, help="write accuracy.json for the model in this folder; no training")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile (needs a C++ compiler)")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.curriculum, arguments.no_compile = "smoke", True
    if arguments.export:
        run = Run(arguments.out, CURRICULA[arguments.curriculum], arguments.seed)
        export(run.averaged.module, run.tokenizer, arguments.export)
        shutil.copy(arguments.out / "log.jsonl", arguments.export / "training_log.jsonl")
        return
    if arguments.questions:
        write_question_file(arguments.questions, arguments.split, arguments.pictures)
        return
    if arguments.measure:
        report = accuracy_report(arguments.measure)
        write_json(arguments.measure / "accuracy.json", report)
        pictures, minutes = effort(arguments.measure / "training_log.jsonl")
        (arguments.measure / "README.md").write_text(card(report, pictures, minutes))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if torch.cuda.is_available():
        arguments.workers = 1
    # A run that is told to stop takes its processes along: they would go on writing the same files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.multiprocessing.spawn(train, (arguments, port), nprocs=arguments.workers, daemon=True)


def train(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One of the processes that train together."""
    if arguments.workers > 1:
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=arguments.workers
        )
    stages = CURRICULA[arguments.curriculum]
    if arguments.joint_steps:
        stages = (*stages[:-1], dataclasses.replace(stages[-1], steps=arguments.joint_steps))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(arguments.out, stages, arguments.seed, device, fast=not arguments.no_compile)
    run.run(arguments.every)


if __name__ == "__main__":
    main()
