"""Small helpers that every program of the package shares."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Bad input from the person at the keyboard: one clear line that names the value and the remedy.

    Command-line programs print it as ``error: …`` and exit with code 2.
    """


def disable_torch_init() -> None:
    """Does nothing, for LLaVA scripts that call it before they load.

    There it replaced ``reset_parameters`` of torch's layers for the whole process, to save time. Here
    :func:`llava.model.builder.load_pretrained_model` builds on the meta device, so that nothing is initialised twice.
    """


def run_main(main: Callable[[], int | None]) -> None:
    """Run a program's ``main`` and end the process with its exit status.

    A ``UserError`` becomes one line, ``error: …``, and status 2; a closed output pipe ends quietly.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def processor_name() -> str:
    """The CPU's name, as far as this system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
