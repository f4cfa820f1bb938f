"""The rows, the rule for verdicts, and that RESULTS.md is written from RESULTS.json."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from data import CueConfig, scene_cues
from files.errors import UserError
from paper import report, reproduce
from paper.claims import CLAIMS, POINTLESS, bands_apart, contrast, template_iou, verdict

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results() -> dict:
    return json.loads((ROOT / "paper/RESULTS.json").read_text(encoding="utf-8"))


def test_a_contrast_is_paired_and_its_interval_is_the_closed_form():
    after, before = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]
    found = contrast(after, before)
    changes = [50.0, 50.0, 0.0, -50.0]  # of each sample, over the seeds
    error = math.sqrt(sum((c - 12.5) ** 2 for c in changes) / 3 / 4)
    assert found["change"] == 12.5 and found["seeds"] == [25.0, 0.0] and found["n"] == 4
    assert found["low"] == pytest.approx(12.5 - 1.96 * error, abs=0.01)
    assert found["high"] == pytest.approx(12.5 + 1.96 * error, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "seeds", "expected"),
    [
        (0.1, 3.0, [1.0, 2.0, 1.5], "same direction"),
        (0.1, 3.0, [1.0, -0.1, 3.5], "no difference"),
        (-0.1, 3.0, [1.0, 2.0, 1.5], "no difference"),
        (-3.0, -0.1, [-1.0, -2.0, -1.5], "opposite direction"),
        (-3.0, -0.1, [-1.0, 0.0, -3.5], "no difference"),
    ],
)
def test_the_rule(low, high, seeds, expected):
    assert verdict({"low": low, "high": high, "seeds": seeds}) == expected


def test_bands_are_compared_as_two_separate_groups():
    found = bands_apart({"IoU ≥ 0.5": [1.0, 1.0, 1.0, 0.0], "IoU 0": [0.0, 1.0, 0.0, 0.0]})
    assert found["change"] == 50.0 and found["n"] == 8
    assert found["high"] - found["change"] == pytest.approx(196 * math.sqrt(2 * 0.75 * 0.25 / 4), abs=0.02)


@pytest.mark.parametrize("source", ["object", "random", "large"])
def test_every_kind_of_crop_can_be_found_in_its_scene(source):
    cues = scene_cues(CueConfig(source), "train", 1)
    assert sum(template_iou(cues[i].image, cues[i].box) for i in range(40)) / 40 >= 0.9


def test_a_template_matcher_cannot_find_a_window_of_plain_background():
    from PIL import Image

    assert template_iou(Image.new("RGB", (40, 30), "gray"), (3, 4, 9, 11)) < 0.2


def test_results_md_is_written_from_results_json_and_nothing_else(results):
    assert report.markdown(results) == (ROOT / "paper/RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_report_says_first_of_all_that_it_means_nothing(quick, results, tmp_path, monkeypatch):
    """Everything that reproduce.py does after its rows, in a folder of its own."""

    def run_rows(out, steps, n, jobs, rows):
        results["settings"].update(steps=steps, n=n)
        out.mkdir(parents=True)

    monkeypatch.setattr(sys, "argv", ["reproduce.py", *["--quick"] * quick])
    monkeypatch.setattr(reproduce, "run_rows", run_rows)
    monkeypatch.setattr(reproduce, "collect", lambda folders: results)
    monkeypatch.setattr(report, "HERE", tmp_path / "paper")
    (tmp_path / "paper").mkdir()
    shutil.copy(ROOT / "paper/report_template.md", tmp_path / "paper")
    reproduce.main()
    folder = tmp_path / ("runs/quick" if quick else "paper")
    first, second, title, *_ = (folder / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    if quick:
        assert first.startswith("**This run is too short to mean anything") and first.endswith("**")
        assert (second, title) == ("", "# LOCUS in miniature")
    else:
        assert first == "# LOCUS in miniature"


@pytest.mark.parametrize("module", [report, reproduce])
def test_help_writes_nothing(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    monkeypatch.setattr(report, "write", None)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and "python -m paper." in capsys.readouterr().out


def test_no_jobs_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--jobs", "0"])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert stopped.value.code == 2 and "--jobs 0" in capsys.readouterr().err


def test_every_row_is_in_a_table(results):
    template = (ROOT / "paper/report_template.md").read_text(encoding="utf-8")
    assert all(f"{{scores[{name}]}}" in template for name in results["rows"])


def test_no_row_claim_or_figure_is_missing(results):
    assert set(results["rows"]) == set(reproduce.FLAGS)
    for name in reproduce.ROWS_OF_EVERY_SEED:
        assert results["rows"][name]["seeds"] == list(reproduce.SEEDS)
    assert [c["title"] for c in results["claims"]] == [c.title for c in CLAIMS]
    for claim in results["claims"]:
        assert claim["verdict"] == verdict(claim)
    assert set(POINTLESS) <= set(results["rows"])
    for name in re.findall(
        r"\]\((figures/\w+\.png)\)", (ROOT / "paper/RESULTS.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / "paper" / name).is_file(), name


def test_the_change_of_a_claim_is_that_of_its_rows(results):
    rows = results["rows"]
    for claim in results["claims"]:
        column = {"questions": "questions", "questions_place": "places"}.get(claim["metric"])
        if column:
            after, before = (rows[name][column] for name in (claim["row"], claim["other"]))
            change = sum(after) / len(after) - sum(before) / len(before)
            assert claim["change"] == pytest.approx(change, abs=0.02)


def test_the_documentation_has_the_figures_of_results_json(results):
    """Each line of its table: row, what it gets, then figures as report.figure writes them."""
    page = (ROOT / "docs/embedded_model.md").read_text(encoding="utf-8")
    part = page.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if " ± " in line or "| base" in line]
    assert len(lines) >= 8
    for name, _, *figures in lines:
        row = results["rows"][name.strip("* ")]
        columns = ("questions", "places", "attributes", "cue search")
        assert figures == [report.figure(row[column]) for column in columns], name


def test_rows_run_once_and_other_settings_are_refused(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # run_rows sets these, and monkeypatch restores them
    rows = [("SFT", 11), ("more pretraining", 11)]
    folders = {row: reproduce.folder_of(tmp_path, *row) for row in rows}
    reproduce.run_rows(tmp_path, 1, 4, 1, rows)
    contents = [json.loads((folder / "row.json").read_text()) for folder in folders.values()]
    assert all(len(row["samples"]["questions"]) == 8 for row in contents)
    assert all(len(row["samples"]["cue"]) == 2 for row in contents)
    times = [(folder / "row.json").stat().st_mtime_ns for folder in folders.values()]
    reproduce.run_rows(tmp_path, 1, 4, 1, rows)
    assert times == [(folder / "row.json").stat().st_mtime_ns for folder in folders.values()]
    with pytest.raises(UserError, match="steps 1, not 2"):
        reproduce.run_rows(tmp_path, 2, 4, 1, rows)
