"""The notebooks: executed from top to bottom, in order, with their outputs, on the modules' own functions."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from training.settings import Config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALONE = "This notebook needs the rest of its project: set URL to the address of a copy."
WINGS = ("files", "training", "evaluation", "tiny", "paper", "scale")
MODULES = [*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))]


def cells(path: Path, cell_type: str = "code") -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == cell_type]


def source(cell: dict) -> str:
    """A cell's text without IPython's own commands, which Python cannot parse."""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def defined(code: str) -> set[str]:
    body = ast.parse(code).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def names_in(code: str) -> set[str]:
    """Every name of a piece of code, and every string."""
    values = (value for node in ast.walk(ast.parse(code)) for _, value in ast.iter_fields(node))
    return {value for value in values if isinstance(value, str)}


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    assert path.stat().st_size < 0.7e6
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    code_cells = cells(path)
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    for folder in ("/work/", "/tmp/", "/root/", "/home/"):
        assert folder not in json.dumps(outputs), f"an output names {folder}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_that_a_module_has(path):
    in_modules = set().union(*(defined(module.read_text(encoding="utf-8")) for module in MODULES))
    in_notebook = set().union(*(defined(source(cell)) for cell in cells(path)))
    assert not in_notebook & in_modules


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_text_names_what_exists(path):
    """A name, a flag or a Python file in `backticks` is one of the modules or of the notebook itself."""
    codes = [module.read_text(encoding="utf-8") for module in MODULES] + [source(c) for c in cells(path)]
    existing_names = set().union(*map(names_in, codes)) | {module.stem for module in MODULES} | {"None"}
    flags = {f"--{field.name.replace('_', '-')}" for field in fields(Config)} | {"--dry-run", "--resume"}
    for span in re.findall(r"(?<!`)`([^`\n]+)`", "\n".join(source(c) for c in cells(path, "markdown"))):
        if span.startswith("--"):
            assert span.split()[0] in flags, span
        elif re.fullmatch(r"[\w/]+\.py", span):
            assert (ROOT / span).is_file(), span
        elif not span.endswith((".json", ".txt")) and re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span):
            assert set(span.partition("(")[0].split(".")) <= existing_names, span


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_title_has_the_number_and_the_solution_is_folded(path):
    assert source(cells(path, "markdown")[0]).startswith(f"# {path.name[0]} · ")
    solutions = [cell["metadata"] for cell in cells(path) if "solution" in cell["metadata"].get("tags", [])]
    assert solutions and all(metadata["jupyter"]["source_hidden"] for metadata in solutions)
    assert any(source(c).startswith("<details><summary>Solution</summary>") for c in cells(path, "markdown"))


def first_cell() -> str:
    """notebooks/first_cell.py below its docstring."""
    return (ROOT / "notebooks" / "first_cell.py").read_text(encoding="utf-8").partition("\n\n")[2].rstrip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_start_with_the_same_cell(path):
    """It names no address: the reader sets one, and is told so."""
    assert source(cells(path)[0]) == first_cell() and '\nURL = ""\n' in first_cell()
    assert "github" not in path.read_text(encoding="utf-8")


def run_first_cell(folder: Path, url: str) -> subprocess.CompletedProcess:
    """Runs the first cell in a folder with this URL, then what the notebooks' other cells import."""
    code = first_cell().replace('URL = ""', f"URL = {url!r}")
    code += "\nimport locus_mini, tiny.scenes; print(locus_mini.__file__)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_notebook_that_is_alone_asks_for_an_address(tmp_path):
    done = run_first_cell(tmp_path, "")
    assert done.returncode == 1 and done.stderr == f"{ALONE}\n" and not list(tmp_path.iterdir())


@pytest.mark.notebooks
@pytest.mark.parametrize("kind", ["zip", "clone"])
def test_a_notebook_that_is_alone_gets_the_project(kind, tmp_path):
    """From a zip of the files that git has, in one folder as hosts pack them, and from a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy is no clone itself")
    url, packed = str(ROOT), tmp_path / "packed.zip"
    if kind == "zip":
        archive = ["git", "-C", ROOT, "archive", "--prefix=project-main/", "-o", packed, "HEAD"]
        subprocess.run(archive, check=True)
        url = packed.as_uri()
    (alone := tmp_path / "alone").mkdir()
    done = run_first_cell(alone, url)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(alone.resolve())


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kwargs = dict(timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    nbclient.NotebookClient(notebook, **kwargs).execute()
