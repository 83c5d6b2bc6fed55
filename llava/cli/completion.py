"""What shells know of the commands' options: written by shtab from the programs' own parsers."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

import shtab

from llava.cli.commands import COMMANDS, Command


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """A completion script for bash or zsh. Imports every program, which takes seconds.

    Args:
        parser: of `visipruner` itself; gets the commands.
        shell: its name.
    """
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = parser_of(command)
        parents = [own] if own else []
        commands.add_parser(name, help=command.what, add_help=False, conflict_handler="resolve", parents=parents)
    written: str = shtab.complete(parser, shell)
    return written


class _Found(BaseException):
    """Past every handler of errors."""


def parser_of(command: Command) -> argparse.ArgumentParser | None:
    """The parser that a command reads its options with; None where an extra that it needs is missing."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        found.append(parser)
        raise _Found

    before = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign,assignment]
    try:
        with suppress(_Found, ImportError, SystemExit):
            command.program()([])
    finally:
        argparse.ArgumentParser.parse_known_args = before  # type: ignore[method-assign]
    return found[0] if found else None
