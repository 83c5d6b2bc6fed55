"""Line editing of the chat: a history that outlives it, and completion of commands and paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY_LINES = 1000


def history_file() -> Path:
    """Where what was typed is kept, for its user's eyes alone."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "visipruner" / "history"


@contextmanager
def line_editor(complete: Callable[[str], list[str]]) -> Iterator[None]:
    """A block in which `input` edits lines; without a keyboard, or where Python has no readline, it changes nothing.

    Args:
        complete: what the last word of a line may become, given the line up to the cursor.
    """
    try:
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    found: list[str] = []

    def completer(text: str, state: int) -> str | None:
        nonlocal found
        if state == 0:
            found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(completer)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    file = history_file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_CREAT, 0o600))
        file.chmod(0o600)
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        readline.set_completer(None)
        with suppress(OSError):
            readline.write_history_file(file)
            file.chmod(0o600)


def path_completions(begun: str) -> list[str]:
    """Paths that begin so, folders with a slash at their end; ``~`` stays as it was typed."""
    folder, slash, name = begun.rpartition("/")
    place = Path(os.path.expanduser(folder + slash) or ".")
    with suppress(OSError):
        entries = sorted(entry for entry in place.iterdir() if entry.name.startswith(name))
        shown = [entry for entry in entries if name.startswith(".") or not entry.name.startswith(".")]
        return [folder + slash + entry.name + ("/" if entry.is_dir() else "") for entry in shown]
    return []
