"""Writes the notebooks of `visualization/` from their sources in `visualization/src`, runs them, keeps their figures.

``python scripts/build_notebooks.py [NAME …]``, or ``make notebooks``; needs the extra `dev`. A source is Python with
cells marked by ``# %%`` (jupytext's percent format); what the cells call is in `llava/visualize`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "visualization"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
LIMIT = 400 * 1024  # bytes of one notebook


def build(source: Path) -> nbformat.NotebookNode:
    """The notebook, not yet run. Nothing in it depends on when and where it is built."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.nbformat_minor = 5  # the first with ids
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem[:20].lower().replace('_', '-')}-{number}"
    return notebook


def run(notebook: nbformat.NotebookNode) -> None:
    """Fill in the outputs; raises at the first cell that fails."""
    # No limit in seconds: a model of the user's choice takes as long as it takes.
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would differ in every run


def main(names: list[str]) -> None:
    for source in SOURCES:
        if names and source.stem not in names:
            continue
        notebook = build(source)
        run(notebook)
        path = FOLDER / f"{source.stem}.ipynb"
        nbformat.write(notebook, path)
        size = path.stat().st_size
        if size > LIMIT:
            raise SystemExit(f"{path} has {size:,} bytes; the limit is {LIMIT:,}")
        print(f"wrote {path.name} ({size // 1024} KiB)")


if __name__ == "__main__":
    main(sys.argv[1:])
