"""The documents: their links, files and flags exist, their figures are current, their words are plain."""

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
from data import CueConfig, open_cues
from evaluation.heldout import build_heldout_set, evaluate
from files.errors import FlagParser
from locus_mini import train_step
from models import add_lora, load_policy, read_family
from training import settings
from training.dry_run import empty_model, predict

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "scale" / "README.md", *PAGES]
WINGS = ("files", "training", "evaluation", "tiny", "paper", "scale")
MODULES = [*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))]
FAMILIES = ROOT / "tests" / "families"
STILTED = ("as ever", "begun with", "goes on", "in company")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def page(file: str) -> str:
    return (ROOT / "docs" / file).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    """The lines of a document's code blocks, without comments; a line that ends in a backslash is joined."""
    lines = "".join(code_blocks(path.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if not line.startswith("#")]


# ---------------------------------------------------------------- links, files, flags


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_and_images_exist(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_files_in_backticks_exist(path):
    for file in re.findall(r"`(?:python )?([\w./-]+\.py)\b[^`]*`", path.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file() or (path.parent / file).is_file(), file


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_modules_that_are_run_exist(path):
    for module in re.findall(r"python3? -m ((?:tiny|paper|scale)[\w.]*)", path.read_text(encoding="utf-8")):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


class Parsing(Exception):
    """Raised in place of parsing the command line; holds the program's parser."""


PROGRAMS: dict[str, Callable] = {
    "locus_mini.py": lambda: settings.read_flags(""),
    "eval.py": evaluation.read_flags,
    "data.py": data.main,
}


def parser_of(program: str) -> FlagParser:
    def stop(parser: FlagParser, *_: object) -> None:
        raise Parsing(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsing) as parsing:
        patch.setattr(FlagParser, "parse_args", stop)
        PROGRAMS[program]()
    return parsing.value.args[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_is_accepted_by_its_program(program, capsys):
    """Flags, choices and types; words beside flags are ignored, because a line can end in an explanation."""
    parser = parser_of(program)
    lines = [line for path in DOCUMENTS for line in commands(path) if f"python {program} " in f"{line} "]
    assert lines
    for line in lines:
        arguments = line.partition(program)[2].split()
        try:
            _, unknown = parser.parse_known_args(arguments)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")
        assert not [word for word in unknown if word.startswith("--")], line


# ---------------------------------------------------------------- figures and keys


def predicted_gigabytes(typed: str) -> list[float]:
    """The predicted peak of each phase for flags as they are typed, from the published settings."""
    flags = settings.read_flags("", shlex.split(re.sub(r"--model \S+/", f"--model {FAMILIES}/", typed)))
    config, family = read_family(flags["model"])
    phases = predict(empty_model(config), settings.resolve(flags, family)[0], family)
    return [sum(parts.values()) / 1e9 for parts in phases.values()]


def test_predicted_memory_is_that_of_the_dry_run():
    """Every predicted figure of docs/gpu.md, computed again."""
    cards = re.findall(r"^\| \d+ GB \| `(--model .*?)` \| ([\d.]+), pred", page("gpu.md"), re.MULTILINE)
    tables = page("gpu.md").partition("## Memory by phase")[2].partition("## Which flag lowers which phase")
    shown = r"^\| (.+?) \|((?: \**[\d.]+\**, predicted \|){4})$"
    models, flags = (re.findall(shown, table, re.MULTILINE) for table in (tables[0], tables[2]))
    assert len(cards) == len(models) == 7 and len(flags) == 11
    for (typed, peak), (_, phases) in zip(cards, models, strict=True):
        expected = predicted_gigabytes(typed)
        assert float(peak) == pytest.approx(max(expected), abs=0.051), typed
        assert list(map(float, re.findall(r"[\d.]+", phases))) == pytest.approx(expected, abs=0.006), typed
    base = "--model Qwen/Qwen2.5-VL-7B-Instruct --image-pixels 307200"
    for changed, phases in flags:
        typed = " ".join([base, *re.findall(r"`(--.*?)`", changed)])
        expected = predicted_gigabytes(typed)
        assert list(map(float, re.findall(r"[\d.]+", phases))) == pytest.approx(expected, abs=0.006), typed


def test_every_metric_is_documented():
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 2)
    flags = {"steps": 1, "prompts": 2, "num_generations": 2, "max_new_tokens": 4}
    cfg, _ = settings.resolve(flags, policy.processor.family)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    metrics, _ = train_step(policy, optimizer, open_cues("scenes", "train", 0, CueConfig()), 0, cfg)
    table = page("metrics.md").partition("### What a healthy run shows")[0]
    assert set(re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)) == set(metrics)


def test_every_score_is_documented():
    policy = load_policy("tiny", load_in_4bit=False)
    held = build_heldout_set(policy, open_cues("scenes", "heldout", 0, CueConfig()), 2)
    summary = evaluate(policy, held, 4).summary
    keys = set(summary) | {key for part in summary.values() for key in part} - {"tiny", "small"}
    documented = set(re.findall(r"`(\w+)`", page("metrics.md")))
    assert keys <= documented, keys - documented


# ---------------------------------------------------------------- layout and language


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_says_what_it_answers_and_leads_back(path):
    title, _, opening = path.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ") and opening.endswith("?")
    assert "(../README.md)" in path.read_text(encoding="utf-8")
    lines = "".join(code_blocks(path.read_text(encoding="utf-8"))).splitlines()
    assert max(map(len, lines), default=0) < 100


def stilted_words(text: str) -> list[str]:
    plain = " ".join(text.lower().split())
    return [words for words in STILTED if re.search(rf"\b{words}\b", plain)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_use_plain_words(path):
    assert stilted_words(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_docstrings_and_messages_use_plain_words(path):
    """Every string constant of the code: docstrings, messages, and the literal parts of f-strings."""
    strings = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert [(node.lineno, words) for node in strings for words in stilted_words(node.value)] == []
