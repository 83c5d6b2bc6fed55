"""Ray, where one machine ends (extra ``ray``): a question file over many actors, the HTTP API over many replicas.

``python -m llava.integrations.ray answer …`` is `llava.eval.model_vqa_loader` with Ray Data doing the work, and
``python -m llava.integrations.ray serve …`` is `llava.serve.api` behind Ray Serve; both take all options of theirs.
Without ``--ray-address`` a Ray of this machine alone is started, which ends with the program.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llava.errors import missing_extra
from llava.eval import model_vqa_loader
from llava.eval.model_vqa_loader import AnsweredBatch, Asker, Asking, Run
from llava.eval.questions import Question
from llava.inference import LoadedModel, LoadOptions, open_checkpoint
from llava.inference.processes import join_processes
from llava.model.builder import check_device, default_device
from llava.options import Parser, from_arguments
from llava.serve import api
from llava.utils import UserError, run_main

# Questions of a Ray task, in batches: pictures are read ahead within it, and an actor that dies loses no more.
_BATCHES_A_TASK = 4
# Tries of a task whose actor dies: a question that kills every actor must not be asked for ever.
_TRIES = 4
_NAME = "visipruner"  # of the Serve application
_SPARE_REQUESTS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
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
        raise missing_extra("ray", "Ray", missing) from missing
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
        rows = [{"question": pickle.dumps(question)} for question in questions]
        # Ray is about to rename how retries are asked for.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
        answered = ray.data.from_items(rows, override_num_blocks=tasks).map_batches(
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
                yield pickle.loads(row["answered"])
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
        questions = [pickle.loads(question) for question in block["question"]]
        return {"answered": np.array([pickle.dumps(batch) for batch in self.asker.ask(questions)], dtype=object)}


# --- requests over HTTP ---------------------------------------------------------------------------------------------


def serve(argv: Sequence[str]) -> int:
    """`llava.serve.api` with replicas of the model behind one address, until a signal ends it."""
    args = _serve_arguments(argv)
    keys = api._keys(args.api_key_file)
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = None if args.dense else checkpoint.pruning_config(args.pruning_config)
    place = replace(from_arguments(LoadOptions, args), device=_device(args))
    limits, settings = api._limits(args), api._settings(args, keys, config)
    if args.ray_address is None:
        _check_port(args.host, args.port)
    with _ray(args.ray_address) as ray, _Signals() as told_to_stop:
        _check_room(ray, args, args.replicas)
        from ray import serve as ray_serve
        from ray.serve.config import HTTPOptions

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(
            proxy_location="HeadOnly" if args.ray_address is None else "EveryNode",
            http_options=HTTPOptions(host=args.host, port=args.port),
            logging_config=quiet,
        )
        try:
            model = (args.model_path, args.model_base, args.conv_mode)
            ray_serve.run(_application(args, model, place, limits, settings), name=_NAME, logging_config=quiet)
            name = settings.model_name or checkpoint.name
            print(f"{name} on http://{args.host}:{args.port}/v1", file=sys.stderr, flush=True)
            if not keys and not api._is_loopback(args.host):
                print("warning: everybody who reaches this address may use it; give --api-key-file", file=sys.stderr)
            told_to_stop.wait()
        except RuntimeError as error:
            raise UserError(f"Ray Serve could not start the replicas: {error}") from error
        finally:
            ray_serve.delete(_NAME)
            if args.ray_address is None:
                ray_serve.shutdown()
    return 0


def _serve_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llava.integrations.ray serve",
        description="Serve a vision-language model to OpenAI's clients from several replicas.",
        epilog="All options of python -m llava.serve.api are taken too; its limits are those of one replica.",
        allow_abbrev=False,
    )
    group = _add_ray_options(parser, "replica")
    group.add_argument("--replicas", type=int, default=1, help="each loads the model (default: 1)")
    group.add_argument("--max-replicas", type=int, help="Ray starts and ends replicas between --replicas and this")
    group.add_argument(
        "--target-requests",
        type=float,
        help="requests of one replica, on average, before there are more replicas (default: --max-running)",
    )
    ours, rest = parser.parse_known_args(argv)
    args = argparse.Namespace(**vars(api._arguments(rest)), **vars(ours))
    if args.max_replicas is None:
        args.max_replicas = args.replicas
    if not 1 <= args.replicas <= args.max_replicas:
        raise UserError(
            f"--replicas {args.replicas} --max-replicas {args.max_replicas}: 1 <= replicas <= max is needed"
        )
    if args.target_requests is None:
        args.target_requests = args.max_running
    if args.target_requests <= 0:
        raise UserError(f"--target-requests is {args.target_requests:g}; it must be greater than 0")
    return args


def _application(
    args: argparse.Namespace, model: tuple[str, str | None, str | None], place: LoadOptions, limits: Any, settings: Any
) -> Any:
    """The Ray Serve application: the API of `llava.serving.app`, built anew in every replica."""
    from ray import serve as ray_serve

    is_local = args.ray_address is None

    def build() -> Any:
        from llava.serving import Scheduler
        from llava.serving.app import build_app

        if is_local:
            _stay_on_loopback()
        scheduler = Scheduler(LoadedModel(open_checkpoint(*model), place), limits)
        app = build_app(scheduler, settings)
        app.state.scheduler = scheduler
        return app

    class Replica:
        app: Any  # what `build` built

        def check_health(self) -> None:
            """Ray asks now and then, and replaces a replica that raises."""
            if not self.app.state.scheduler.load.is_alive:
                raise RuntimeError("the model is not running any more")

        def __del__(self) -> None:
            self.app.state.scheduler.close(timeout=0)  # Ray has waited for running answers

    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas > args.replicas:
        bounds = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": args.target_requests}}
    deployment = ray_serve.deployment(
        ray_serve.ingress(build)(Replica),
        name=_NAME,
        # Above what a replica takes, so that the one too many gets the API's own 429 and does not wait unseen.
        max_ongoing_requests=limits.max_running + limits.max_waiting + _SPARE_REQUESTS,
        graceful_shutdown_timeout_s=args.shutdown_timeout,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        **scaling,
    )
    return deployment.bind()


def _stay_on_loopback() -> None:
    """In a replica, before it listens: Ray Serve has no setting for the address where replicas talk to one another.

    Left alone that port is open on all addresses, and it takes pickles from whoever reaches it.
    """
    from grpc.aio._server import Server

    bind = Server.add_insecure_port
    Server.add_insecure_port = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error


class _Signals:
    """While active, SIGINT and SIGTERM set the event that it gives."""

    def __enter__(self) -> threading.Event:
        told_to_stop = threading.Event()
        self._before = {
            number: signal.signal(number, lambda *_: told_to_stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return told_to_stop

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from llava.integrations.ray import main  # actors must find the classes by this name, not in __main__

    run_main(main)
