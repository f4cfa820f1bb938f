"""The house rules of the project that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {
    "reward.py": 120,
    "tiny/scenes.py": 180,
    "data.py": 300,
    "policy.py": 300,
    "eval.py": 330,
    "locus_mini.py": 360,
    "tiny/build.py": 260,
    "evaluation/benchmarks.py": 300,
    # Small files beside the design's list, so that none of those has to be packed:
    "prompts.py": 160,
    "models.py": 150,
    "training/memory.py": 230,
    "evaluation/heldout.py": 330,
    "evaluation/attention.py": 180,
    "evaluation/journal.py": 120,
    "tiny/card.py": 60,
    "evaluation/replies.py": 80,
    "files/pictures.py": 210,
    "files/fetch.py": 180,
    "paper/variants.py": 120,
    "training/settings.py": 145,
    "training/run_folder.py": 270,
    "training/checks.py": 120,
    "training/pictures.py": 100,
    "tiny/architecture.py": 80,
    "paper/reproduce.py": 202,
    "paper/claims.py": 210,
    "paper/report.py": 330,
}
# Imports point one way: a file may import what stands before it.
ORDER = [
    "reward",
    "tiny.scenes",
    "prompts",
    "files.pictures",
    "files.fetch",
    "data",
    "training.pictures",
    "policy",
    "models",
    "evaluation.heldout",
    "evaluation.replies",
    "evaluation.attention",
    "evaluation.benchmarks",
    "evaluation.journal",
    "tiny.card",
    "eval",
    "training.checks",
    "paper.variants",
    "training.settings",
    "training.memory",
    "training.run_folder",
    "locus_mini",
    "tiny.architecture",
    "tiny.build",
    "paper.claims",
    "paper.report",
    "paper.reproduce",
]


@pytest.mark.parametrize("name", BUDGETS)
def test_modules_keep_their_budget(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= BUDGETS[name]
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("name", BUDGETS)
def test_functions_are_short_and_public_ones_documented(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(name)])
    assert name != "reward" or not imported & {"torch", "PIL", "transformers"}, "reward.py needs Python alone"


def test_the_runtime_is_seven_packages_pinned_exactly():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"torch", "transformers", "bitsandbytes", "peft", "pillow", "tqdm", "pytest"}
    assert all(re.fullmatch(r"[a-z]+==\d+(\.\d+)+", line) for line in lines)


def test_no_trainer_framework_and_no_remote_code():
    for name in BUDGETS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "import trl" not in text
        assert set(re.findall(r"trust_remote_code=(\w+)", text)) <= {"False"}


def test_the_readme_names_files_and_flags_that_exist():
    from dataclasses import fields

    from training.settings import Config

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([a-z_]+\.py|[a-z]+/[a-z_]+\.py)`", readme):
        assert (ROOT / path).is_file(), path
    flags = {f"--{f.name.replace('_', '-')}" for f in fields(Config)}
    flags |= {"--no-load-in-4bit", "--resume", "--dry-run"}
    for line in readme.splitlines():
        if line.strip().startswith("python locus_mini.py"):
            assert set(re.findall(r"--[a-z0-9-]+", line)) <= flags | {
                "--no-load-in-4bit",
                "--resume",
                "--dry-run",
            }, line


def test_every_setting_is_read_somewhere():
    from dataclasses import fields

    from training.settings import Config

    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in BUDGETS)
    for setting in fields(Config):
        read = rf"(cfg\.{setting.name}\b|\"{setting.name}\")"
        assert re.search(read, code), f"nothing reads {setting.name}"
