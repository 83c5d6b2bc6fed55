"""Small helpers that every program of the package shares."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


class UserError(ValueError):
    """Bad input from the person at the keyboard: one clear line that names the value and the remedy.

    Command-line programs print it as ``error: …`` and exit with code 2.
    """


def disable_torch_init() -> None:
    """Make ``nn.Linear`` and ``nn.LayerNorm`` skip their random initialisation, which loading overwrites anyway.

    :func:`llava.model.builder.load_pretrained_model` does not need it (it builds on the meta device); LLaVA
    scripts call it before they load.
    """
    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None  # type: ignore[assignment, method-assign]


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
