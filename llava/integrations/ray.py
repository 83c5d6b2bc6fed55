"""Ray, where one machine ends (extra ``ray``): a benchmark's questions over many actors, the HTTP API over many replicas.

``python -m llava.integrations.ray answer …`` is `llava.eval.model_vqa_loader` with Ray Data doing the work, and
``python -m llava.integrations.ray serve …`` is `llava.serve.api` behind Ray Serve; both take all options of theirs.
Without ``--ray-address`` a Ray of this machine alone is started, which ends with the program.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from llava.eval import model_vqa_loader
from llava.eval.model_vqa_loader import AnsweredBatch, Asker, Asking, Run
from llava.eval.questions import Question
from llava.inference import LoadedModel, LoadOptions, open_checkpoint
from llava.inference.processes import join_processes
from llava.model.builder import check_device, default_device
from llava.options import from_arguments
from llava.serve import api
from llava.utils import UserError, run_main

# Questions of a Ray task, in batches: pictures are read ahead within it, and an actor that dies loses no more.
_BATCHES_A_TASK = 4
# Tries of a task whose actor dies: a question that kills every actor must not be asked for ever.
_TRIES = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m llava.integrations.ray", description="VisiPruner on Ray.", epilog="serve --help, answer --help"
    )
    parser.add_argument("program", choices=("answer", "serve"), help="a question file, or requests over HTTP")
    program = parser.parse_args(argv[:1]).program
    return (answer if program == "answer" else serve)(argv[1:])


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, running. A Ray of our own listens on this machine alone, has no dashboard, and ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # What Ray itself does on Windows and macOS: its processes meet on the loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as missing:
        raise UserError(f"Ray needs {missing.name}; install the extra: pip install 'llava-visipruner[ray]'") from missing
    quiet: dict[str, Any] = {"logging_level": logging.WARNING}
    if address is None:
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address or "local", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray at {address or 'this machine'}: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _add_ray_options(parser: argparse.ArgumentParser, what: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--ray-address", help="of a running cluster, or auto; model and files must be there on all machines "
        "under the same paths (default: a Ray of this machine alone)"
    )  # fmt: skip
    group.add_argument(f"--cpus-per-{what}", dest="cpus", type=float, default=1.0, help="default: 1")
    group.add_argument(
        f"--gpus-per-{what}", dest="gpus", type=float, help="may be a fraction (default: 1 where this machine has CUDA)"
    )
    return group


def _device(args: argparse.Namespace) -> str:
    """The device in every actor; settles `args.gpus`. Ray gives each its own GPUs, which it sees as the first."""
    asked = torch.device(check_device(args.device)) if args.device and not args.gpus else None
    if asked is None and args.gpus is None:
        asked = default_device()
    if asked is not None and asked.type == "cuda" and asked.index is not None:
        raise UserError(f"--device {args.device}: Ray chooses the GPUs; give --device cuda")
    if args.gpus is None:
        args.gpus = 1.0 if asked is not None and asked.type == "cuda" else 0.0
    if args.gpus < 0 or args.cpus <= 0:
        raise UserError("an actor or replica needs more than 0 CPUs, and 0 or more GPUs")
    if args.gpus:
        if args.device not in (None, "cuda"):
            raise UserError(f"--device {args.device} and GPUs for each exclude each other")
        return "cuda"
    return str(asked or "cpu")


def _check_room(ray: Any, args: argparse.Namespace, count: int) -> None:
    """What a Ray of our own does not have, it would wait for for ever. A cluster may grow."""
    there = ray.cluster_resources()
    for name, each in (("CPU", args.cpus), ("GPU", args.gpus)):
        if args.ray_address is None and count * each > there.get(name, 0):
            raise UserError(
                f"{count} × {each:g} {name}s were asked for and Ray has {there.get(name, 0):g} here; ask for fewer, "
                "for a fraction each, or give --ray-address"
            )


# --- a question file ------------------------------------------------------------------------------------------------


def answer(argv: Sequence[str]) -> int:
    """`llava.eval.model_vqa_loader` with its questions spread over Ray's actors."""
    parser = model_vqa_loader.build_parser()
    parser.prog = "python -m llava.integrations.ray answer"
    group = _add_ray_options(parser, "actor")
    group.add_argument("--actors", type=int, default=1, help="each loads the model (default: 1)")
    args = parser.parse_args(argv)
    if args.actors < 1:
        raise UserError(f"--actors is {args.actors}; it must be at least 1")
    processes = join_processes()
    if processes.num_processes > 1:
        raise UserError("start this program once, without torchrun: Ray starts the actors")
    command = [sys.executable, "-m", "llava.integrations.ray", "answer", *argv]
    return model_vqa_loader.finish(_RayRun(args, processes), command)


class _RayRun(Run):
    """A run whose answers come from actors. This process alone writes files, so a line is never there twice."""

    def _device(self) -> str:
        return _device(self.args)

    def _answer(self, mine: list[Question], *files_and_stop: Any) -> int:
        with _ray(self.args.ray_address) as self._ray:  # before signals are handled: Ray handles them too
            _check_room(self._ray, self.args, self.args.actors)
            return super()._answer(mine, *files_and_stop)

    def _ask(self, questions: list[Question], stop: Any) -> Iterator[AnsweredBatch]:
        import ray.data

        args, how = self.args, self._asking()
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        tasks = -(-len(questions) // (_BATCHES_A_TASK * args.batch_size))
        answered = ray.data.from_items(questions, override_num_blocks=tasks).map_batches(
            _Actor,
            fn_constructor_args=((args.model_path, args.model_base, args.conv_mode), how),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=args.cpus,
            num_gpus=args.gpus,
            max_task_retries=_TRIES - 1,
        )
        try:
            for row in answered.iter_rows():
                yield row["answered"]
                if stop.asked:
                    return
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise UserError(
                f"an actor died {_TRIES} times over the same questions ({str(error).splitlines()[0]}). The answers so "
                "far are safe; the same command goes on with the others"
            ) from error


class _Actor:
    """A model of its own, which Ray starts anew should it die."""

    def __init__(self, checkpoint: tuple[str, str | None, str | None], how: Asking) -> None:
        self.asker = Asker(open_checkpoint(*checkpoint), how)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batches = list(self.asker.ask(list(block["item"])))
        answered = np.empty(len(batches), dtype=object)
        answered[:] = batches
        return {"answered": answered}


def serve(argv):
    raise NotImplementedError


if __name__ == "__main__":
    from llava.integrations.ray import main  # actors must find the classes by this name, not in __main__

    run_main(main)
