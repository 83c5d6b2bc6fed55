"""Chat about pictures in the browser, with visual tokens pruned (extra ``web``).

``python -m llava.serve.gradio_pruning`` listens on this machine alone. With ``--server URL`` it loads no model and asks
the server's, as others do. What users type and what the model says is shown as text, never as HTML; pictures are
uploaded or chosen from a folder, never fetched from a URL. The page itself is in `llava.serve.web`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava.constants import API_KEY_VARIABLE
from llava.errors import missing_extra
from llava.examples import Example, examples
from llava.options import Parser, add_model_options, add_pruning_option, from_arguments
from llava.utils import UserError, run_main

MOST_EXAMPLES = 4


def example_pictures() -> dict[str, tuple[Path, str]]:
    """Pictures that ship, by the example's name, each with the first question that is known for it."""
    first: dict[Path, Example] = {}
    for example in examples():
        first.setdefault(example.image, example)
    return {each.name: (each.image, each.question) for each in list(first.values())[:MOST_EXAMPLES]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Raises `UserError` on bad input, before weights are read where possible."""
    parser = Parser(description="Chat about pictures in the browser, with visual tokens pruned.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--share", action="store_true", help="publish the page through gradio's servers")
    parser.add_argument(
        "--server", metavar="URL", help="ask the model of a server, such as visipruner serve, and load none"
    )
    parser.add_argument("--api-key", help=f"the server's (default: ${API_KEY_VARIABLE}, which `ps` does not show)")
    add_pruning_option(parser)
    add_model_options(parser)
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port}; it must be from 1 to 65535")

    if find_spec("gradio") is None:
        raise missing_extra("web", "the web chat")
    say = _Log()
    if sys.stderr.isatty():  # somebody waits; elsewhere bad input is one line and nothing else
        say("reading the model's settings")
    # Here, so that --help and a wrong port need not wait for them.
    from llava.inference import LoadOptions, open_checkpoint
    from llava.pruning.method import read_config
    from llava.serve.remote import RemoteModel
    from llava.serve.web.late import LateModel

    model: Any
    if args.server is not None:
        for name in ("model_path", "model_base", "conv_mode", *(each.name for each in fields(LoadOptions))):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--server and --{name.replace('_', '-')} exclude each other: the server has the model")
        model = RemoteModel(args.server, args.api_key or os.environ.get(API_KEY_VARIABLE))
        given = (args.pruning_config or "").strip()
        config = model.checkpoint.pruning_config(read_config(given) if given else None)
    else:
        checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
        config = checkpoint.pruning_config(args.pruning_config)
        model = LateModel(checkpoint, from_arguments(LoadOptions, args))
    say("starting; the libraries take a few seconds")
    from llava.serve.web.page import launch
    from llava.serve.web.state import WebChat

    page = launch(WebChat(model, example_pictures(), config), args.host, args.port, share=args.share)
    say(f"the page is open at {page.share_url or page.local_url}")
    try:
        if isinstance(model, LateModel):
            say(f"reading the weights of {args.model_path}")
            model.load()
        say(f"ready ({model.placement}); Ctrl-C ends it")
        page.block_thread()
    finally:
        page.close(verbose=False)
    return 0


class _Log:
    """Lines on stderr about how far the start is, each with the seconds since it began."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.1f} s] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
