"""The notebooks run from a fresh clone, hold what they promise, and stay small."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parent.parent / "visualization"
NAMES = (
    "L1_norms_of_value_matrix",
    "attention_visualization",
    "project_hidden_states_to_semantic_space",
    "project_vo_to_semantic_space",
    "write_your_own_policy",
)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_all_notebooks_are_known_and_in_the_index():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    index = (FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"({name}.ipynb)" in index


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_small_and_was_run(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400 * 1024
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output.output_type == "error" for output in outputs)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    for word in ("MODEL", "PICTURE", "QUESTION", "CONFIG"):
        assert f"{word} = " in parameters[0].source


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name):
    notebook = read(name)
    shown = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises at the first cell that fails
    again = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in again) == shown
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in again), "no warnings"
