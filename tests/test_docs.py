"""The documents: their links, files and flags exist, their figures are current, their words are plain."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
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
from prompts import Family
from training import merge, settings
from training.dry_run import CARDS, CONTEXT, empty_model, predict, predict_hours

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "scale" / "README.md", *PAGES]
WINGS = ("files", "training", "evaluation", "tiny", "paper", "scale")
MODULES = [*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))]
FAMILIES = ROOT / "tests" / "families"
MARKED = re.compile("measured|predicted")
NAMES = (
    r"`[^`]*`|\b(?:Qwen|MiMo)[\w.-]*|\b(?:RTX \d+|T4|H100|NF4|TF32|bf16|float32|\d+ bits?|\dB)\b|not measured"
)
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
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_files_in_backticks_exist(path):
    for file in re.findall(r"`(?:python )?([\w./-]+\.py)\b[^`]*`", path.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file() or (path.parent / file).is_file(), file


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_modules_that_are_run_exist(path):
    for module in re.findall(
        r"python3? -m ((?:training|tiny|paper|scale)[\w.]*)", path.read_text(encoding="utf-8")
    ):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


class Parsing(Exception):
    """Raised in place of parsing the command line; holds the program's parser."""


PROGRAMS: dict[str, Callable] = {
    "locus_mini.py": lambda: settings.read_flags(""),
    "eval.py": evaluation.read_flags,
    "data.py": data.main,
    "-m training.merge": merge.main,
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


@pytest.mark.parametrize("command", ["upload", "auth login"])
def test_flags_of_the_hub_are_those_of_its_program(command):
    """`hf` is part of the requirements. It needs a network, but not to say which flags it has."""
    lines = [line for path in DOCUMENTS for line in commands(path) if line.startswith(f"hf {command}")]
    run = [sys.executable, "-m", "huggingface_hub.cli.hf", *command.split(), "--help"]
    text = subprocess.run(run, capture_output=True, text=True, timeout=100, check=True).stdout
    assert lines and f"hf {command} [OPTIONS]" in text
    for line in lines:
        assert all(re.search(rf"{flag}\b", text) for flag in re.findall(r" (--[\w-]+)", line)), line


def test_everything_that_contributing_names_exists():
    """Each name in backticks is one of the code; each kind of change takes five lines and has a test."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in (*MODULES, *(ROOT / "tests").rglob("*.py"))
    ]
    values = (value for tree in trees for node in ast.walk(tree) for _, value in ast.iter_fields(node))
    existing = {value for value in values if isinstance(value, str)}
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        if re.fullmatch(r"[\w./]+/[\w./]*|[\w./]+\.py", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"\w+", span):
            assert span in existing, span
    sections = re.findall(r"^## An? (\w.*?)\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == ["model family", "cue source", "reward", "loss", "benchmark"]
    for _, lines in sections:
        assert [line[:3] for line in lines.splitlines()] == ["1. ", "2. ", "3. ", "4. ", "5. "]
        assert re.search(r"^5\. Test.*`tests/", lines, re.MULTILINE)


# ---------------------------------------------------------------- figures and keys


@cache
def published_model(folder: str) -> tuple[torch.nn.Module, Family]:
    config, family = read_family(folder)
    return empty_model(config), family


def prediction_inputs(typed: str) -> tuple[torch.nn.Module, settings.Config, Family]:
    """The empty model, settings and family of 400 steps with flags as they are typed; published settings."""
    flags = settings.read_flags("", shlex.split(re.sub(r"--model \S+/", f"--model {FAMILIES}/", typed)))
    model, family = published_model(flags["model"])
    return model, settings.resolve({"steps": 400} | flags, family)[0], family


def predicted_gigabytes(typed: str) -> list[float]:
    """The predicted peak of each phase for flags as they are typed."""
    return [sum(parts.values()) / 1e9 for parts in predict(*prediction_inputs(typed)).values()]


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


def test_predicted_hours_are_those_of_the_formula():
    """Of both tables of docs/gpu.md: by flags on a card of that size, and by card."""
    text, time_of_a_run = page("gpu.md"), page("gpu.md").partition("## Time of a run")[2]
    row = r"^\| (\d+) GB \| `(--model .*?)` \|[^|]*\| ([\d.]+) h on an? ([\w ]+), predicted \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 7
    for gigabytes, typed, hours, card in rows:
        assert CARDS[card][0] == int(gigabytes)
        assert float(hours) == pytest.approx(predict_hours(*prediction_inputs(typed)[:2], card)[0], abs=0.051)
    row = r"^\| ([\w ]+?) \| (\d+), (\d+), (\d+) \| (.*), predicted \| (.*), predicted \|$"
    table = re.findall(row, time_of_a_run, re.MULTILINE)
    assert {name: tuple(map(int, sheet)) for name, *sheet, _, _ in table} == CARDS
    for card, gigabytes, _, _, *cells in table:
        for size, cell in zip(("3B", "7B"), cells, strict=True):
            typed = f"--model Qwen/Qwen2.5-VL-{size}-Instruct --image-pixels 307200"
            too_large = max(predicted_gigabytes(typed)) + CONTEXT > int(gigabytes)
            assert (cell == "too large") == too_large, (card, size)
            if not too_large:
                hours = predict_hours(*prediction_inputs(typed)[:2], card)[0]
                assert float(cell.removesuffix(" h")) == pytest.approx(hours, abs=0.051), (card, size)


def unmarked_figures(text: str) -> list[str]:
    """Cells of tables with a figure, of which neither they nor the row's title say measured or predicted.

    No figures: code, names of models, cards and number formats, the header, columns of cards and data sheets.

    >>> rows = "| T4 | 3 h |\\n| T4 | 2 h, predicted |\\n| `--lr 1` | not measured |"
    >>> unmarked_figures("| card | time |\\n|---|---|\\n" + rows)
    ['3 h']
    """
    unmarked = []
    for table in re.findall(r"^\|.*\n\|[-|]+\|\n(?:\|.*(?:\n|$))+", text, re.MULTILINE):
        table = re.sub(NAMES, "", table)
        header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
        for title, *cells in (row[1:-1] for row in rows):
            columns = zip(header[1:], [title, *cells])
            figures = [cell for name, cell in columns if not re.match("card|data sheet", name)]
            unmarked += [c for c in figures if re.search(r"\d", c) and not MARKED.search(f"{title} {c}")]
    return unmarked


def test_every_figure_about_gpus_is_marked_as_measured_or_predicted():
    assert unmarked_figures(page("gpu.md")) == []
    for word_of in (r"packed: one row a group", r"\| 5\.3", r"h on a T4"):
        spoiled = re.sub(f"({word_of}), (?:measured|predicted)", r"\1", page("gpu.md"), count=1)
        assert len(unmarked_figures(spoiled)) > 0, "a word that is missing is found"


def test_every_measured_figure_about_gpus_names_machine_version_and_command():
    for section in page("gpu.md").split("\n## ")[1:]:
        tables = "".join(re.findall(r"^\|.*$", section, re.MULTILINE))
        if re.search(r"(?<!not )measured", tables):
            assert re.search(r"torch \d", section) and re.search(r"python\s+\S+\.py", section), section[:40]
            assert re.search(r"CPU\s+only|RTX|T4|H100|H200|A100", section), section[:40]


def test_every_metric_is_documented():
    policy = add_lora(load_policy("tiny", load_in_4bit=False), 2)
    flags = {"steps": 1, "prompts": 2, "num_generations": 2, "max_new_tokens": 4, "log_entropy": True}
    cfg, _ = settings.resolve(flags, policy.processor.family)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    metrics, _ = train_step(policy, optimizer, open_cues("scenes", "train", 0, CueConfig()), 0, cfg)
    table = page("metrics.md").partition("### What a healthy run shows")[0]
    documented = set(re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE))
    assert documented == set(metrics) | {"eval/iou", "eval/format", "eval/accuracy"}


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
