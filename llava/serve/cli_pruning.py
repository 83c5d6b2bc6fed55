"""Chat about pictures in the terminal, with visual tokens pruned.

``python -m llava.serve.cli_pruning --image-file photo.jpg`` talks; with ``--question`` or a question on standard input
it answers once. `llava.serve.cli` is the same program without pruning; `llava.serve.terminal` does the work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from llava.options import add_generation_options, add_model_options, add_pruning_option
from llava.utils import clean_text


def main(argv: Sequence[str] | None = None, *, can_prune: bool = True) -> int:
    """Run the program; returns its exit code (0; 1 failed; 2 bad input; 130 interrupted)."""
    args = _arguments(argv, can_prune)
    try:
        # Here, because torch and transformers take seconds to import, and --help or a wrong option should not.
        from llava.serve import terminal

        return terminal.run(args, can_prune)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {clean_text(message)} (--help lists the options)\n")


def _arguments(argv: Sequence[str] | None, can_prune: bool) -> argparse.Namespace:
    parser = _Parser(
        prog=f"python -m llava.serve.{'cli_pruning' if can_prune else 'cli'}",
        description="Chat with a vision-language model about pictures"
        + (", with visual tokens pruned (VisiPruner)." if can_prune else "."),
        epilog="Without --question and with a keyboard it is a chat; /help there lists its commands.",
    )
    add_model_options(parser)

    ask = parser.add_argument_group("what to ask")
    ask.add_argument(
        "--image-file", action="append", default=[], metavar="PATH|URL", help="a picture; may be given several times"
    )
    ask.add_argument("--question", metavar="TEXT", help="ask once and leave; else a question is read from a pipe")
    ask.add_argument("--json", action="store_true", help="print one JSON object (with --question or a pipe)")

    if can_prune:
        prune = parser.add_argument_group("pruning")
        add_pruning_option(prune)
        prune.add_argument("--dense", action="store_true", help="do not prune")
        prune.add_argument("--compare", action="store_true", help="answer dense and pruned, side by side")

    answer = parser.add_argument_group("answers")
    add_generation_options(answer, max_new_tokens=512)
    parser.add_argument("--debug", action="store_true", help="tracebacks of errors, and the trace after every answer")
    args = parser.parse_args(argv)
    if not can_prune:
        args.pruning_config, args.dense, args.compare = None, True, False
    elif args.dense and args.pruning_config is not None:
        parser.error("--dense and --pruning-config exclude each other")
    elif args.dense and args.compare:
        parser.error("--dense and --compare exclude each other: --compare answers both ways")
    return args


if __name__ == "__main__":
    sys.exit(main())
