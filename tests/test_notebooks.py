"""The notebooks are what their sources say, run from a fresh clone, hold what they promise, and stay small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("jupytext")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from build_notebooks import FOLDER, LIMIT, SOURCES, build, run  # noqa: E402

NAMES = [source.stem for source in SOURCES]
QUICK = "project_vo_to_semantic_space"


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def shown(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs), outputs


def test_all_notebooks_are_known_and_in_the_index():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES) and len(NAMES) == 6
    index = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"({name}.ipynb)" in index


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_stored_notebook_is_its_source_with_outputs(source):
    built, stored = build(source), read(source.stem)
    for notebook in (built, stored):
        for cell in notebook.cells:
            cell.pop("outputs", None)
            cell.pop("execution_count", None)
    stored.metadata.pop("language_info")  # the Python that ran it
    assert stored == built, "make notebooks builds them anew"


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_small_and_was_run(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < LIMIT
    assert str(ROOT) not in path.read_text()
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    figures, outputs = shown(notebook)
    assert figures >= 2
    assert not any(output.output_type == "error" for output in outputs)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    for word in ("MODEL", "PICTURE", "QUESTION", "CONFIG"):
        assert f"{word} = " in parameters[0].source


# One of them in `make test`: the way from a source to a notebook that ran.
@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_notebook_runs(name):
    notebook = read(name)
    before, _ = shown(notebook)
    run(notebook)  # raises at the first cell that fails
    after, outputs = shown(notebook)
    assert after == before
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs), "no warnings"
