"""The house rules of the project that a machine can check: rooms, sizes, and imports that point one way."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from names import check_names, names_in

from training.settings import Config

ROOT = Path(__file__).parents[1]
SEVEN = ("reward", "data", "prompts", "models", "policy", "locus_mini", "eval")
# Imports point one way: a module may import its own wing and what stands before it.
ORDER = ("reward", "files", "tiny.scenes", "prompts", "data", "policy", "models", "evaluation", "training")
ORDER += ("locus_mini", "eval", "tiny", "paper", "scale")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in ROOT.glob("*.py")}
WINGS = ("files", "training", "evaluation", "tiny", "paper", "scale")
MODULES |= {name_of(path): path for wing in WINGS for path in (ROOT / wing).rglob("*.py")}
CODE = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


def code_lines(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    docstrings, lines = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def imported_names(name: str, nodes=None) -> set[str]:
    """Every dotted name that a module imports, in functions too, relative ones made absolute."""
    found, package = set(), name.rpartition(".")[0] if name not in WINGS else name
    for node in nodes or ast.walk(ast.parse(CODE[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def imported_modules(name: str, nodes=None) -> set[str]:
    return (imported_names(name, nodes) & MODULES.keys()) - set(WINGS) - {name}


def rank_of(name: str) -> int:
    """The place of a module in ORDER; tiny.scenes has one of its own."""
    return ORDER.index(name) if name in ORDER else ORDER.index(name.partition(".")[0])


def test_the_root_is_the_method():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SEVEN)
    assert sum(code_lines(CODE[name]) for name in SEVEN) <= 1230
    assert sum(CODE[name].count("\n") for name in SEVEN) <= 1766
    page = (ROOT / "training" / "report.html").read_text(encoding="utf-8")
    assert sum(map(code_lines, CODE.values())) + page.count("\n") <= 5250, "with the page, as it has a script"


@pytest.mark.parametrize("name", MODULES)
def test_lines_and_functions_are_short(name):
    assert max((len(line) for line in CODE[name].splitlines()), default=0) <= 110
    for node in ast.walk(ast.parse(CODE[name])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_names_in_the_root_files_are_whole_words():
    """The same check as `python tests/names.py`, which also prints the names."""
    assert check_names(set().union(*(names_in(CODE[name]) for name in SEVEN))) == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    for other in imported_modules(name):
        same_wing = "." in name and other.partition(".")[0] == name.partition(".")[0]
        assert rank_of(other) < rank_of(name) or (same_wing and rank_of(other) == rank_of(name)), other
        assert name not in SEVEN or not other.startswith(("paper", "scale")), "the method knows no variants"


def test_no_imports_in_a_circle():
    TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()


def test_benchmarks_are_known_to_eval_alone_and_inside_its_functions():
    users = {name for name in MODULES if "evaluation.benchmarks" in imported_names(name)}
    assert users == {"eval"}
    top = ast.parse(CODE["eval"]).body
    assert "evaluation.benchmarks" not in imported_names("eval", top)


def reached(name: str) -> set[str]:
    """Everything that an import of the module can import, ours and others', at whatever distance."""
    names, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        names |= (new := imported_names(module) - names)
        waiting += [other for other in new & MODULES.keys() if other not in WINGS]
    return {other.partition(".")[0] for other in names}


@pytest.mark.parametrize("name", ["reward", "training.settings", "evaluation.benchmarks", "files.errors"])
def test_what_the_command_line_needs_imports_no_torch(name):
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "numpy"}
    assert not reached(name) & heavy
    if name == "training.settings":
        assert imported_modules(name) == {"files.errors"} and not reached(name) - set(
            sys.stdlib_module_names
        ) - {"files"}
    if name in ("reward", "files.errors"):
        assert reached(name) <= set(sys.stdlib_module_names), "they need Python alone"


@pytest.mark.parametrize(
    ("command", "code", "names"),
    [
        ("locus_mini.py --help", 0, "--steps"),
        ("locus_mini.py --stpes 5", 2, "did you mean --steps?"),
        ("locus_mini.py --data coco --annotations none.json --images .", 2, "none.json: no such file"),
        ("eval.py --help", 0, "vstar"),
        ("eval.py ask none.png What?", 2, "none.png: no such file"),
    ],
)
def test_flags_answer_before_torch_is_imported(command, code, names, tmp_path):
    script, *flags = command.split()
    run = [sys.executable, "-X", "importtime", ROOT / script, *flags]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    imports = [
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    ]
    assert done.returncode == code and names in done.stdout + done.stderr
    assert imports and "torch" not in imports and list(tmp_path.iterdir()) == []


def test_sources_and_frames_are_spelled_alike():
    """training/settings.py repeats two lists of modules that it does not import."""
    import data
    from prompts import UNITS
    from training.settings import FRAMES, SOURCES

    assert SOURCES == data.SOURCES and set(FRAMES) == set(UNITS)


def test_the_runtime_is_seven_packages_pinned_exactly():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"torch", "transformers", "bitsandbytes", "peft", "pillow", "tqdm", "pytest"}
    assert all(re.fullmatch(r"[a-z]+==\d+(\.\d+)+", line) for line in lines)


def test_no_trainer_framework_and_no_remote_code():
    for name, text in CODE.items():
        assert "import trl" not in text
        assert name.startswith("scale") or "trl" not in {m.partition(".")[0] for m in imported_names(name)}
        assert set(re.findall(r"trust_remote_code=(\w+)", text)) <= {"False"}


def test_the_readme_names_files_and_flags_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([a-z_]+\.py|[a-z]+/[a-z_]+\.py)`", readme):
        assert (ROOT / path).is_file(), path
    flags = {f"--{f.name.replace('_', '-')}" for f in fields(Config)}
    flags |= {"--no-load-in-4bit", "--resume", "--dry-run"}
    for line in readme.splitlines():
        if line.strip().startswith("python locus_mini.py"):
            assert set(re.findall(r"--[a-z0-9-]+", line)) <= flags, line


def test_every_setting_is_read_somewhere():
    code = "".join(CODE.values())
    for setting in fields(Config):
        read = rf"(cfg\.{setting.name}\b|\"{setting.name}\")"
        assert re.search(read, code), f"nothing reads {setting.name}"
