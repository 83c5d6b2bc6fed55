"""Chat about pictures in the terminal, without pruning: `llava.serve.cli_pruning` with pruning taken out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.serve import cli_pruning


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return cli_pruning.main(argv, can_prune=False)


if __name__ == "__main__":
    sys.exit(main())
