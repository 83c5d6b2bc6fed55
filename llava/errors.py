"""What goes wrong in a program, said in one line: every program of the package ends through `run_main`."""

from __future__ import annotations

import json
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from llava.extras import install_command, missing_extra_of

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Marks that turn the direction of text around: harmless in a sentence, a way to fake one in a terminal.
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(ValueError):
    """Bad input from the person at the keyboard: one clear line that names the value and the remedy.

    Command-line programs print it as ``error: …`` and exit with code 2.
    """


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's ``main`` on the command line and end the process with its exit code; see `exit_code_of`."""
    sys.exit(exit_code_of(main, sys.argv[1:]))


def exit_code_of(main: Callable[[], int | None], argv: Sequence[str]) -> int:
    """Call a program's ``main``; what goes wrong becomes one line on stderr and an exit code.

    0; 1 it failed, or who read its output has gone; 2 bad input; 130 interrupted. With ``--json`` on the command line
    an error is a JSON object on stdout, too; with ``--debug`` its traceback comes first.

    Args:
        main: returns an exit code, or None for 0; raises what goes wrong.
        argv: the command line that it reads, without the program's name.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()  # so that a closed pipe is met here
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # let the interpreter's last flush go nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED, "--json" in argv)
    except Exception as error:
        return tell(error, as_json="--json" in argv, debug="--debug" in argv)


def tell(error: Exception, *, as_json: bool = False, debug: bool = False) -> int:
    """Print an error as one line on stderr; returns the exit code for it.

    Args:
        error: what was raised.
        as_json: print it as a JSON object on stdout, too.
        debug: print its traceback before.
    """
    if debug:
        traceback.print_exception(error)
    message, code = _explained(error)
    if code == EXIT_FAILED and not debug:
        message += " (--debug shows where)"
    return _say(message, code, as_json)


def _say(message: str, code: int, as_json: bool) -> int:
    message = " ".join(clean_text(message).split())
    if as_json:
        kind = {EXIT_BAD_INPUT: "bad_input", EXIT_INTERRUPTED: "interrupted"}.get(code, "failed")
        print(to_json({"error": {"message": message, "kind": kind, "exit_code": code}}), end="", flush=True)
    print(f"error: {message}", file=sys.stderr)
    return code


def _explained(error: Exception) -> tuple[str, int]:
    """An error in words, and its exit code."""
    if isinstance(error, UserError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, UnicodeError):
        return "text that was given is not UTF-8; convert it, as iconv does", EXIT_BAD_INPUT
    if isinstance(error, ImportError) and (extra := missing_extra_of(error)):
        return f"{error.name} is not installed: {install_command(extra)}", EXIT_BAD_INPUT
    named = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    if named and getattr(error, "filename", None) is not None:
        return f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT  # type: ignore[attr-defined]
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported to find out
        remedy = "try a shorter conversation, --load-4bit, a smaller model or --device cpu"
        return f"not enough GPU memory; {remedy}", EXIT_FAILED
    return f"{type(error).__name__}: {error}", EXIT_FAILED


def missing_extra(extra: str, what: str, error: ImportError | None = None) -> UserError:
    """The error of something that needs packages of an extra: what needs them, and the command that installs them.

    Args:
        extra: its name in pyproject.toml.
        what: needs it.
        error: what importing raised; absent: the package is there and not usable.
    """
    name = f" ({error.name} is missing)" if error is not None and error.name else ""
    return UserError(f"{what} needs the extra {extra!r}{name}: {install_command(extra)}")


def clean_text(text: str) -> str:
    """``text`` without what a terminal would obey: control characters (but newline and tab) and bidi controls."""
    return "".join(
        char for char in text if char in "\n\t" or not (unicodedata.category(char) == "Cc" or char in _BIDI_CONTROLS)
    )


def to_json(value: Any) -> str:
    """Indented JSON with a final newline, in characters as they are; a list of plain values stays on one line."""
    return _written(value, "\n") + "\n"


def _written(value: Any, newline: str) -> str:
    deeper = newline + "  "
    if isinstance(value, dict) and value:
        # json.dumps knows what may be a key, and how it is written.
        entries = [json.dumps({key: 0}, ensure_ascii=False)[1:-2] + _written(value[key], deeper) for key in value]
        return "{" + deeper + f",{deeper}".join(entries) + newline + "}"
    if isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
        return "[" + deeper + f",{deeper}".join(_written(entry, deeper) for entry in value) + newline + "]"
    return json.dumps(value, ensure_ascii=False)
