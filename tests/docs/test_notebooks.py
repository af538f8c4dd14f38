"""The code cells of the notebooks run in order, as one program. `make notebooks` also runs them in Jupyter kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def test_both_notebooks_exist():
    assert [path.stem for path in NOTEBOOKS] == ["compare-methods", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    namespace = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        assert cell.keys() >= {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec", dont_inherit=True), namespace)
            # The committed outputs are those of the code above them, run in order and without an error.
            assert all(output["output_type"] != "error" for output in cell["outputs"])
