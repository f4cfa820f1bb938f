"""RESULTS.md, its figure and RESULTS.json are written from the samples and nothing else."""

import json
import re
from pathlib import Path

import pytest

from paper import report, reproduce, verdicts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines(folder, monkeypatch) -> list[str]:
    """RESULTS.md of the drawn rows, and of one attempt."""
    figures = {
        name: {"before": 50.0, "change": 1.25, "error": 0.5, "n": 60} for name in ("cue_tiny", "find_tiny")
    }
    figures |= {f"questions_{kind}_tiny": figures["cue_tiny"] for kind in ("detail", "shape", "place")}
    line = {"note": "more twins", "commit": "abc", "base": "0123456789", "seeds": [0]}
    line |= {"variant": "locus", "settings": {"beta": 0.02}, "kl": 0.1, "seconds": 60, "figures": figures}
    (folder / "attempts.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(verdicts, "ATTEMPTS", folder / "attempts.jsonl")
    report.write(folder)
    return (folder / "RESULTS.md").read_text(encoding="utf-8").splitlines()


def test_the_first_paragraph_is_the_result_on_instances(folder, lines):
    first = next(line for line in lines if line and line[0] not in "#*<")
    twins = verdicts.read_json(folder / "RESULTS.json")["twins"]
    for base in ("A", "B"):
        for name in ("base", "LOCUS"):
            for test in ("forced", "swap"):
                share = twins[base][name][test][0]
                assert f"{share['change']:.1f} ({share['95'][0]:.1f} to {share['95'][1]:.1f})" in first
        # The positive control has one seed, whose shares are those of all seeds.
        cells = [verdicts.change_cell(part[0], "") for part in twins[base]["SFT, all right"].values()]
        assert len(cells) == 3 and f"| {base} | SFT, all right | 120 | {' | '.join(cells)} |" in lines
    titles = ["forced choice (95 %)", "told the detail (95 %)", "both crops found (95 %)"]
    assert f"| base | row, a line for each seed | pairs | {' | '.join(titles)} |" in lines
    # A line for each base, row and seed: one of a base, three of LOCUS.
    assert len([line for line in lines if re.match(r"\| [AB] \| (base|LOCUS) ", line)]) == 2 * (1 + 3)


def test_every_row_claim_rule_and_attempt_is_in_the_report(folder, lines):
    protocol, text = verdicts.read_json(folder / "protocol.json"), "\n".join(lines)
    for name in protocol["rows"]:
        assert (
            sum(line.startswith(f"| {name} | {protocol['rows'][name]['note']} |") for line in lines) == 2
        ), name
    for claim in protocol["claims"] + protocol["not_testable"]:
        assert sum(line.startswith(f"| {claim['title']} |") for line in lines) == 1
    assert all(part in text for part in (*protocol["rules"], verdicts.sha256(folder / "protocol.json")))
    assert "| more twins | 01234567 | locus, beta 0.02 | +1.2 ± 0.5 |" in text
    assert not re.search(r"\{\w", text), "a field of the template was left"


def test_a_control_that_was_trained_less_than_locus_is_marked(folder, lines):
    """The drawn rows have a KL of 0.4 (LOCUS), 0.39 (random crop) and 0.1 (all others)."""
    by_title = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert "0.400, 0.390;" in by_title["object crop over random crop, places"]
    assert "0.400, 0.100 !" in by_title["IoU rewards over random rewards, places"]
    assert "!" not in by_title["RL raises places of tiny objects"], "a base is not matched"


def test_a_short_run_says_first_of_all_that_it_means_nothing(lines):
    assert lines[0].startswith("**This run is too short to mean anything (2 steps") and lines[0].endswith(
        "**"
    )
    assert lines[2] == "# LOCUS in miniature"


def test_a_full_run_does_not_say_so(folder):
    results = verdicts.collect(folder)
    assert report.markdown(results, results["protocol"]["steps"]).startswith("# LOCUS in miniature")


def test_the_same_samples_give_the_same_files(folder, lines):
    before = [(folder / name).read_bytes() for name in ("RESULTS.json", "RESULTS.md")]
    report.write(folder)
    assert before == [(folder / name).read_bytes() for name in ("RESULTS.json", "RESULTS.md")]


def test_the_figure_is_drawn_or_the_package_named(folder, lines, capsys):
    report.write(folder)
    drawn = (folder / "figures" / "rows.png").is_file()
    assert drawn or "pip install -r notebooks/requirements.txt" in capsys.readouterr().out


@pytest.mark.parametrize("module", [report, reproduce, verdicts])
def test_help_writes_nothing(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    monkeypatch.setattr(report, "write", None)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and "python -m paper." in capsys.readouterr().out
