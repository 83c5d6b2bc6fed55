"""An OpenAI-compatible server for one model, with visual tokens pruned (extra ``serve``).

``python -m llava.serve.api`` listens on this machine alone. `llava.serving` does the work.
"""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import missing_extra
from llava.options import Parser, add_model_options, add_pruning_option, from_arguments
from llava.utils import UserError, run_main

if TYPE_CHECKING:
    from llava.pruning import Method


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; returns its exit code."""
    args = _arguments(argv)
    try:
        import uvicorn

        from llava.serving.app import build_app
    except ImportError as missing:
        raise missing_extra("serve", "the server", missing) from missing
    # Here, because torch and transformers take seconds to import, and --help or a wrong option should not.
    from llava.inference import LoadedModel, LoadOptions, open_checkpoint
    from llava.serving import Scheduler

    keys = _keys(args.api_key_file)
    checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
    config = None if args.dense else checkpoint.pruning_config(args.pruning_config)
    limits, settings = _limits(args), _settings(args, keys, config)
    model = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    with Scheduler(model, limits) as scheduler:
        app = build_app(scheduler, settings)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                """Running answers end, waiting ones are told; a second signal ends at once."""
                scheduler.drain()
                if self.should_exit and sig == signal.SIGINT:
                    self.force_exit = True
                self.should_exit = True

        name = settings.model_name or checkpoint.name
        print(f"{name} ({model.placement}) on http://{args.host}:{args.port}/v1", file=sys.stderr, flush=True)
        if not keys and not _is_loopback(args.host):
            print("warning: everybody who reaches this address may use it; give --api-key-file", file=sys.stderr)
        server = Server(
            uvicorn.Config(
                app,
                host=args.host,
                port=args.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=args.shutdown_timeout,
                timeout_keep_alive=5,
            )
        )
        server.run()
        scheduler.close(timeout=0 if server.force_exit else args.shutdown_timeout)
    return 0 if server.started else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Serve a vision-language model to OpenAI's clients, with visual tokens pruned.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser)
    pruning = parser.add_argument_group("pruning of requests that say nothing about it")
    add_pruning_option(pruning)
    pruning.add_argument("--dense", action="store_true", help="do not prune them")

    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    where.add_argument("--port", type=int, default=8000)
    where.add_argument("--served-model-name", help="what clients call the model (default: the checkpoint's name)")
    where.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="API keys, one a line; one of them is asked for"
    )

    how = parser.add_argument_group("how much at once")
    how.add_argument("--max-running", type=int, default=32, help="answers that are written together")
    how.add_argument("--max-waiting", type=int, default=128, help="requests that may wait; the next gets status 429")
    how.add_argument(
        "--max-held-pixels",
        type=int,
        default=1_000_000_000,
        help="of the pictures of all requests on the way, three bytes each; more get status 429",
    )
    how.add_argument("--prefill-rows", type=int, default=2048, help="rows of prompts that are prefilled together")
    how.add_argument(
        "--kv-memory", type=float, metavar="GIB", help="for keys and values (default: 80%% of what is free)"
    )

    limits = parser.add_argument_group("limits of one request")
    limits.add_argument("--max-tokens", type=int, default=512, help="of answers to requests that name no limit")
    limits.add_argument("--temperature", type=float, default=0.0, help="of requests that name none; 0: greedy")
    limits.add_argument("--max-body-mb", type=float, default=20, help="MiB of a request, pictures included")
    limits.add_argument("--max-pictures", type=int, default=16)
    limits.add_argument("--max-pixels", type=int, default=50_000_000, help="of all pictures of a request together")
    limits.add_argument(
        "--picture-urls",
        choices=("public", "any", "off"),
        default="public",
        help="whether pictures are downloaded: from public addresses alone, from any, not at all",
    )
    limits.add_argument("--timeout", type=float, default=600, help="seconds, the time in the queue included")
    limits.add_argument("--shutdown-timeout", type=int, default=60, help="seconds that running answers get to end")
    args = parser.parse_args(argv)
    if args.dense and args.pruning_config is not None:
        parser.error("--dense and --pruning-config exclude each other")
    return args


def _limits(args: argparse.Namespace) -> Any:
    from llava.serving import Limits

    kv_bytes = None if args.kv_memory is None else int(args.kv_memory * 2**30)
    return Limits(args.max_running, args.max_waiting, args.prefill_rows, kv_bytes)


def _settings(args: argparse.Namespace, keys: Sequence[str], config: Method | None) -> Any:
    from llava.inference import GenerationOptions
    from llava.serving.app import ServerSettings
    from llava.serving.protocol import Defaults

    options = GenerationOptions(args.max_tokens, args.temperature)  # checks them
    for name in ("max_pictures", "max_pixels", "timeout", "shutdown_timeout", "port"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be greater than 0")
    return ServerSettings(
        args.served_model_name,
        keys,
        int(args.max_body_mb * 2**20),
        max_held_pixels=args.max_held_pixels,
        defaults=Defaults(
            config,
            options.max_new_tokens,
            options.temperature,
            args.max_pictures,
            args.max_pixels,
            args.picture_urls,
            args.timeout,
        ),
    )


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not keys:
        raise UserError(f"--api-key-file {file} holds no key; write one a line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_main(main)
