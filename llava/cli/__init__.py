"""The command `visipruner`: every program of the package under one name. Nothing slow is imported before it is needed.

`commands` lists them, `completion` tells shells about their options; `models` and `methods` are programs of its own.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from llava import __version__
from llava.cli.commands import COMMANDS
from llava.errors import UserError, exit_code_of
from llava.options import Parser


def run() -> None:
    """The entry point: run the command line and end the process."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (0; 1 failed; 2 bad input; 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code_of(lambda: _run(argv), argv)


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        return _without_command(argv)
    name, *rest = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"there is no command {name!r}; {meant}visipruner --help lists them")
    command = COMMANDS[name]
    # Programs name themselves after how they were started, and some note their command line.
    before, sys.argv = sys.argv, [f"visipruner {name}", *rest]
    try:
        return command.program()(rest) or 0
    finally:
        sys.argv = before
        if {"-h", "--help"} & set(rest):
            print("\nexamples:", *command.examples, sep="\n  ")


def _without_command(argv: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.print_completion:
        from llava.cli.completion import script

        print(script(parser, args.print_completion))
    else:
        parser.print_help()
    return 0


def build_parser() -> Parser:
    """What `visipruner` itself understands; the commands read their own options."""
    width = max(map(len, COMMANDS)) + 2
    parts = {
        "commands": [f"{name:<{width}}{command.what}" for name, command in COMMANDS.items()],
        "examples": [command.examples[0] for command in COMMANDS.values()],
    }
    parser = Parser(
        prog="visipruner",
        usage="visipruner COMMAND …",
        description="Vision-language models with visual tokens pruned (VisiPruner).",
        epilog="\n\n".join("\n  ".join([f"{title}:", *lines]) for title, lines in parts.items())
        + "\n\nvisipruner COMMAND --help lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"visipruner {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh"),
        help='for a shell; in bash: eval "$(visipruner --print-completion bash)"',
    )
    return parser
