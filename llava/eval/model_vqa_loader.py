"""Ask a LLaVA model a benchmark's questions; nothing that was answered is ever asked twice or lost.

``python -m llava.eval.model_vqa_loader --model-path … --question-file … --image-folder … --answers-file …``

Answers are on disk as soon as their batch is done. The same command goes on where a killed run stopped. Started by
``torchrun`` or ``accelerate launch``, every process takes its share of what is left, one GPU each.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from llava.eval.files import move_aside, sha256_of
from llava.eval.prompts import prompt_batches
from llava.eval.questions import Question, chunk, read_questions
from llava.eval.run_files import (
    ShardedFile,
    answer_record,
    check_answers,
    check_identity,
    line_of_answer,
    line_of_trace,
    model_fingerprint,
    run_file_of,
    write_identity,
)
from llava.eval.traces import trace_record
from llava.inference import (
    Answer,
    Checkpoint,
    GenerationOptions,
    LoadedModel,
    LoadOptions,
    Responder,
    open_checkpoint,
)
from llava.inference.processes import device_of, join_processes
from llava.model import checkpoint as checkpoints
from llava.model.builder import check_device, default_device, parse_dtype
from llava.options import Parser, add_generation_options, add_model_options, from_arguments
from llava.pruning import Method
from llava.utils import UserError, run_main

EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 130


def build_parser() -> Parser:
    """The options of a run."""
    parser = Parser(description="Answer a benchmark's question file with a LLaVA model, pruned or dense.")
    add_model_options(parser, required=True)
    parser.add_argument("--image-folder", required=True, help="folder that the question file's images are in")
    parser.add_argument("--question-file", required=True, help="questions (jsonl)")
    parser.add_argument("--answers-file", required=True, help="answers (jsonl) to write or to go on with")
    parser.add_argument("--num-chunks", type=int, default=1, help="split the questions by hand into this many parts")
    parser.add_argument("--chunk-idx", type=int, default=0, help="and answer this one, from 0")
    add_generation_options(parser, max_new_tokens=128)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--pruning-config", help="JSON or @file; without it the model runs dense")
    parser.add_argument("--batch-size", type=int, default=1, help="questions asked at once by each process")
    parser.add_argument("--num-workers", type=int, help="threads that read pictures ahead, in each process")
    parser.add_argument("--limit", type=int, help="answer only the first so many questions")
    parser.add_argument("--no-resume", action="store_true", help="move existing answers to *.bak-<time> and begin anew")
    parser.add_argument("--trace-file", help="also write what was pruned, one line a question (jsonl)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a question that cannot be asked (unreadable image …) is listed at the end, after all others are "
        "answered; the run then ends with code 1 (stop, default) or 0 (skip)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    processes = join_processes()
    program = [sys.executable, "-m", "llava.eval.model_vqa_loader"]
    if processes.num_processes > 1:
        program = ["torchrun", f"--nproc-per-node={processes.num_processes}", *program[1:]]
    return finish(Run(args, processes), [*program, *argv])


def finish(run: Run, command: Sequence[str]) -> int:
    """Run to the end, or until a signal; returns the exit status. `command` is what to type to go on."""
    try:
        status = run.run(_StopRequest())
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    if status == EXIT_INTERRUPTED:
        if run.processes.is_main_process:
            again = shlex.join(argument for argument in command if argument != "--no-resume")
            print(f"Interrupted. To go on:\n{again}", file=sys.stderr)
        return status
    run.processes.destroy_process_group()
    return status


class _StopRequest:
    """While active, the first SIGINT or SIGTERM only asks to stop after this batch; the second one insists."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("Stopping after this batch …", file=sys.stderr)


@dataclass(frozen=True)
class AnsweredBatch:
    """Some questions: those that were answered, and why the others could not be asked."""

    answers: list[tuple[Question, Answer]] = field(default_factory=list)
    failures: list[tuple[Question, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Questions, failed ones included."""
        return len(self.answers) + len(self.failures)


@dataclass(frozen=True)
class Asking:
    """How questions are asked. Plain values, so that it can be sent to other processes.

    Attributes:
        place: where the model runs, and how.
        config: prune with it; None: dense.
        options: how answers are drawn.
        seed: a batch is drawn with this plus the line of its first question.
        batch_size: questions asked at once.
        num_workers: see `prompt_batches`.
    """

    place: LoadOptions
    config: Method | None
    options: GenerationOptions
    seed: int
    batch_size: int
    num_workers: int | None


class Asker:
    """A loaded model that answers a benchmark's questions in batches."""

    def __init__(self, checkpoint: Checkpoint, how: Asking) -> None:
        self.checkpoint, self.how = checkpoint, how
        model = LoadedModel(checkpoint, how.place)
        self.responder = Responder(model, how.config, how.options, how.batch_size)

    def ask(self, questions: Sequence[Question], stop: _StopRequest | None = None) -> Iterator[AnsweredBatch]:
        """Answers in order, batch by batch; once `stop` asks for it, no further batch."""
        for batch in prompt_batches(questions, self.checkpoint, self.how.batch_size, self.how.num_workers):
            if stop and stop.asked:
                return
            seeds = [self.how.seed + question.line for question in batch.questions]
            answers = self.responder.answer(batch.prompts, seeds)
            yield AnsweredBatch(list(zip(batch.questions, answers, strict=True)), batch.failures)
            if stop and stop.asked:
                return


class Run:
    """One run of the program in one process. Everything that can be wrong is found before weights are read."""

    def __init__(self, args: argparse.Namespace, processes: PartialState) -> None:
        self.args, self.processes = args, processes
        self.failures: list[tuple[Question, str]] = []
        self.options = from_arguments(GenerationOptions, args)
        for flag in ("batch_size", "limit"):
            value = getattr(args, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
        if args.num_workers is not None and args.num_workers < 0:
            raise UserError(f"--num-workers is {args.num_workers}; it must be 0 or more")
        self.device = self._device()
        dtype = parse_dtype(args.dtype or ("float32" if self.device == "cpu" else "float16"))
        self.dtype = str(dtype).removeprefix("torch.")
        self.questions = read_questions(args.question_file, args.image_folder)
        self.selected = chunk(self.questions, args.num_chunks, args.chunk_idx)[: args.limit]
        self.checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
        given = args.pruning_config
        self.config = None if given is None else self.checkpoint.pruning_config(given)
        self.answers_file = Path(args.answers_file)
        self.answers = ShardedFile(self.answers_file, line_of_answer)
        self.traces = ShardedFile(Path(args.trace_file), line_of_trace) if args.trace_file else None
        if self.traces and self.traces.path.resolve() == self.answers_file.resolve():
            raise UserError(f"--trace-file and --answers-file are both {self.answers_file}")

    # --- the run ---

    def run(self, stop: _StopRequest) -> int:
        """Answer what is not answered yet. Returns the exit status."""
        done = self._begin()
        pending = [question for question in self.selected if question.line not in done]
        mine = pending[self.processes.process_index :: self.processes.num_processes]
        self.processes.wait_for_everyone()  # every process has read what is done before one of them writes
        if not pending:
            self._end(asked=0, already=len(self.selected))
            return 0
        self._say(
            f"{len(pending)} of {len(self.selected)} questions to answer"
            + (f", {len(done)} are there already" if done else "")
        )
        rank = self.processes.process_index
        answers = self.answers.open_part(rank)
        traces = self.traces.open_part(rank) if self.traces else None
        try:
            status = self._answer(mine, answers, traces, stop)
        finally:
            answers.close()
            if traces:
                traces.close()
        if status == EXIT_INTERRUPTED:
            return status
        failures = gather_object(self.failures)
        self._end(asked=len(pending) - len(failures), already=len(self.selected) - len(pending))
        return self._report(failures)

    def _begin(self) -> set[int]:
        """Check or write the run file, and return the lines that are answered."""
        identity = self._identity()
        run_file = run_file_of(self.answers_file)
        if self.processes.is_main_process:
            if self.args.no_resume:
                self._move_aside([*self.answers.move_aside(), move_aside(run_file)])
            has_begun = check_identity(run_file, identity)
            if not has_begun and any(part.stat().st_size for part in self.answers.parts()):
                raise UserError(
                    f"{self.answers_file} exists and nothing beside it says what wrote it; give another "
                    "--answers-file, or --no-resume to move it aside"
                )
            if self.traces and (not has_begun or self.args.no_resume):
                self._move_aside(self.traces.move_aside())
            if not has_begun:
                write_identity(run_file, identity, self._about())
        self.processes.wait_for_everyone()
        if not self.processes.is_main_process and not check_identity(run_file, identity):
            raise UserError(f"{run_file} was written by process 0 and is not here: the processes need a shared folder")
        done = self.answers.read()
        check_answers(done, self.questions, self.answers_file)
        return set(done)

    def _identity(self) -> dict[str, Any]:
        args = self.args
        return {
            "question file": sha256_of(args.question_file),
            "chunk": [args.chunk_idx, args.num_chunks],
            "model": self._fingerprint(args.model_path),
            "model base": self._fingerprint(args.model_base) if args.model_base else None,
            "pruning config": self.config.to_dict() if self.config else None,
            "conversation template": self.checkpoint.conv_mode,
            "dtype": self.dtype,
            "quantised to": "8 bit" if args.load_8bit else "4 bit" if args.load_4bit else None,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "beams": args.num_beams,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed if args.temperature > 0 else None,
        }

    @staticmethod
    def _fingerprint(path: str) -> str:
        # A hub id names its weights; reading them here would fetch them before the questions are checked.
        folder = checkpoints.resolve_folder(path)
        return model_fingerprint(folder) if Path(path).expanduser().is_dir() else f"{path}@{folder.name}"

    def _about(self) -> dict[str, Any]:
        return {
            "model": str(self.args.model_path),
            "question file": str(self.args.question_file),
            "questions": len(self.questions),
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": self.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _device(self) -> str:
        return str(check_device(device_of(self.processes, self.args.device) or default_device()))

    def _answer(self, mine: list[Question], answers: Any, traces: Any, stop: _StopRequest) -> int:
        if not mine:
            return 0
        with stop, _Progress(len(mine), disable=not self.processes.is_main_process) as progress:
            for batch in self._ask(mine, stop):
                self.failures += batch.failures
                if traces:
                    traces.append(trace_record(*reply) for reply in batch.answers if reply[1].trace)
                answers.append(answer_record(asked, reply.text, self.checkpoint.name) for asked, reply in batch.answers)
                progress.update(batch.size, [answer for _, answer in batch.answers])
        return EXIT_INTERRUPTED if stop.asked else 0

    def _asking(self) -> Asking:
        args = self.args
        place = replace(from_arguments(LoadOptions, args), device=self.device, dtype=self.dtype)
        return Asking(place, self.config, self.options, args.seed, args.batch_size, args.num_workers)

    def _ask(self, questions: list[Question], stop: _StopRequest) -> Iterator[AnsweredBatch]:
        """Answers as they come, in any order."""
        asker = Asker(self.checkpoint, self._asking())
        yield from asker.ask(questions, stop)
        if asker.responder.batch_size < self.args.batch_size:
            print(
                f"Out of memory: process {self.processes.process_index} went on with batches of "
                f"{asker.responder.batch_size} instead of {self.args.batch_size}",
                file=sys.stderr,
            )

    def _end(self, asked: int, already: int) -> None:
        """Merge the parts, in one process, once all are done."""
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            parts = self.answers.parts()
            if asked or len(parts) != 1:
                # The answers last: their shards say that there is something to merge.
                if self.traces and self.traces.parts():
                    self.traces.merge()
                self.answers.merge()
                self._say(f"{asked + already} of {len(self.selected)} answers in {self.answers_file}")
            else:
                self._say(f"Nothing to do: all {already} answers are in {self.answers_file}")
        self.processes.wait_for_everyone()

    def _report(self, failures: list[tuple[Question, str]]) -> int:
        if not failures:
            return 0
        failures.sort(key=lambda failure: failure[0].line)
        if self.processes.is_main_process:
            print(f"{len(failures)} questions could not be asked and have no answer:", file=sys.stderr)
            for question, error in failures:
                print(f"  line {question.line + 1} ({question.question_id}): {error}", file=sys.stderr)
            print("Repair them and start again: only they will be asked.", file=sys.stderr)
        return 0 if self.args.on_error == "skip" else EXIT_INCOMPLETE

    def _move_aside(self, moved: Sequence[Path | None]) -> None:
        for path in moved:
            if path is not None:
                self._say(f"Moved aside: {path}")

    def _say(self, text: str) -> None:
        if self.processes.is_main_process:
            print(text, flush=True)


class _Progress:
    """Questions done, per second and left, with running means of what was kept and saved."""

    def __init__(self, total: int, disable: bool) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=total, unit="q", disable=disable, mininterval=interval, dynamic_ncols=True)
        self._count = 0
        self._kept = self._saved = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()

    def update(self, done: int, answers: Sequence[Answer]) -> None:
        """Count a batch."""
        for answer in answers:
            if answer.trace is not None:
                self._count += 1
                self._kept += answer.kept
                self._saved += answer.flops_saved["executed"]
        if self._count:
            kept, share = self._kept / self._count, self._saved / self._count
            self._bar.set_postfix_str(f"kept {kept:.1f} tokens, saved {share:.1%} FLOPs", refresh=False)
        self._bar.update(done)


if __name__ == "__main__":
    run_main(main)
