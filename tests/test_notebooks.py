"""The notebooks: run to the end, in order, with their outputs, on the modules and nothing of their own."""

import ast
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = [path for path in ROOT.glob("*.py")]


def cells(path: Path) -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def defined(code: str) -> set[str]:
    plain = "".join(line for line in code.splitlines(keepends=True) if not line.startswith("%"))
    body = ast.parse(plain).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    assert path.stat().st_size < 1.5e6
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    found = cells(path)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    for folder in ("/work/", "/tmp/", "/root/", "/home/"):
        assert folder not in json.dumps(outputs), f"an output names {folder}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_that_a_module_has(path):
    theirs = set().union(*(defined(module.read_text(encoding="utf-8")) for module in MODULES))
    mine = set().union(*(defined("".join(cell["source"])) for cell in cells(path)))
    assert not mine & theirs


def test_all_begin_alike_and_have_a_solution():
    begun = {"".join(cells(path)[0]["source"]) for path in NOTEBOOKS}
    assert len(begun) == 1 and "google.colab" in begun.pop()
    for path in NOTEBOOKS:
        tags = [cell["metadata"].get("tags", []) for cell in cells(path)]
        assert ["solution"] in tags, path.name


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ways = dict(timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    nbclient.NotebookClient(notebook, **ways).execute()
