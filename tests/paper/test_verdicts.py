"""Student's t, changes with their intervals, Holm's correction, the rules, the command that checks."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from statistics import mean, variance

import pytest
from drawn_rows import write_row

from files.errors import UserError
from paper import report, verdicts
from paper.verdicts import contrast, holm, t_quantile, t_tail, verdict

ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- Student's t


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.303, 60.0])
def test_the_tail_is_the_closed_form_for_one_two_and_four_degrees_of_freedom(t):
    assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
    assert t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    x = t / math.sqrt(4 + t * t)
    assert t_tail(t, 4) == pytest.approx(1 - x * (3 - x * x) / 2, abs=1e-6)


@pytest.mark.parametrize("t", [0.5, 1.96, 3.5])
def test_with_many_degrees_of_freedom_it_is_the_normal_distribution(t):
    assert t_tail(t, 1e6) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-5)
    assert t_tail(-t, 37) == t_tail(t, 37)


@pytest.mark.parametrize(
    ("tail", "df", "expected"),
    [
        (0.05, 1, 12.706),
        (0.05, 2, 4.303),
        (0.05, 5, 2.571),
        (0.05, 30, 2.042),
        (0.05, 1e6, 1.960),
        (0.1, 2, 2.920),
        (0.1, 10, 1.812),
        (0.01, 3, 5.841),
        (0.001, 2, 31.599),
    ],
)
def test_quantiles_are_those_of_the_printed_tables(tail, df, expected):
    assert t_quantile(tail, df) == pytest.approx(expected, abs=6e-4)


def test_quantiles_lie_between_those_of_the_whole_degrees_of_freedom_around_them():
    values = [t_quantile(0.05, df) for df in (2, 2.3, 2.9, 3)]
    assert all(a > b for a, b in pairwise(values))


# ---------------------------------------------------------------- changes and their intervals


def test_a_change_is_paired_and_its_error_has_a_part_for_scenes_and_one_for_seeds():
    after = [[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]
    before = [[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]]
    found = contrast(after, before)
    changes = [[100 * (a - b) for a, b in zip(*pair)] for pair in zip(after, before)]
    by_scene, by_seed = [mean(column) for column in zip(*changes)], [mean(row) for row in changes]
    parts = variance(by_scene) / 4, variance(by_seed) / 3
    df = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    assert found["seeds"] == pytest.approx(by_seed) and found["change"] == pytest.approx(mean(by_seed))
    assert found["error"] == pytest.approx(math.sqrt(sum(parts))) and found["df"] == pytest.approx(df)
    half = t_quantile(0.05, df) * found["error"]
    assert found["95"] == pytest.approx([found["change"] - half, found["change"] + half])
    assert found["90"][0] > found["95"][0] and found["90"][1] < found["95"][1]
    assert found["n"] == 4 and found["p"] == pytest.approx(t_tail(found["change"] / found["error"], df))


def test_one_seed_has_the_interval_of_a_paired_t_test():
    found = contrast([[1.0, 1.0, 0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0, 0.0, 1.0]])
    assert found["df"] == pytest.approx(4) and found["error"] == pytest.approx(math.sqrt(3000 / 5))
    assert found["95"][1] - found["change"] == pytest.approx(2.776 * math.sqrt(600), abs=0.02)


def test_without_a_comparison_it_is_the_share_itself():
    found = contrast([[1.0, 0.0, 1.0, 1.0]])
    assert found["change"] == 75 and found["error"] == pytest.approx(100 * math.sqrt(0.25 / 4))


@pytest.mark.parametrize(("gain", "p"), [(0.0, 1.0), (1.0, 0.0)])
def test_equal_changes_everywhere_have_a_point_as_their_interval(gain, p):
    found = contrast([[gain] * 4] * 3, [[0.0] * 4] * 3)
    assert found["95"] == [100 * gain] * 2 and found["p"] == p


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Scenes and seeds both vary: 95 % of the intervals hold a true change of 0."""
    rng, hits = random.Random(0), 0
    for _ in range(300):
        scenes, seeds = [rng.gauss(0, 0.5) for _ in range(40)], [rng.gauss(0, 0.1) for _ in range(3)]
        after = [[scene + seed + rng.gauss(0, 0.2) for scene in scenes] for seed in seeds]
        low, high = contrast(after)["95"]
        hits += low <= 0 <= high
    assert 0.91 <= hits / 300 <= 0.99


# ---------------------------------------------------------------- verdicts


def test_holm_multiplies_the_smallest_p_value_by_their_number():
    assert holm([0.04, 0.001, 0.02, 0.5]) == pytest.approx([0.08, 0.004, 0.06, 0.5])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.03]) == [0.03]


def entry(low: float, high: float) -> dict:
    return {"change": (low + high) / 2, "90": [low, high]}


@pytest.mark.parametrize(
    ("intervals", "p", "expected"),
    [
        ([(1, 3), (2, 9)], 0.04, "holds"),
        ([(-9, -1), (-3, -1)], 0.04, "opposite"),
        ([(1, 2), (1, 2.5)], 0.04, "holds"),
        ([(1, 2), (1, 2.5)], 0.06, "no difference"),
        ([(-2.9, 2.9), (-1, 1)], 0.5, "no difference"),
        ([(-1, 1), (-1, 3.1)], 0.5, "undecided"),
        ([(-3.1, 1), (-1, 1)], 0.5, "undecided"),
        ([(1, 5), (2, 9)], 0.05, "undecided"),
    ],
)
def test_the_rules(intervals, p, expected):
    assert verdict([entry(*interval) for interval in intervals], p, margin=3) == expected


def test_a_claim_needs_one_direction_on_both_bases(folder):
    """LOCUS is far better than the base here; where it is far worse on base B, nothing is decided."""
    judged = {claim["title"]: claim for claim in verdicts.collect(folder)["claims"]}
    title = "RL raises places of tiny objects"
    assert judged[title]["verdict"] == "holds" and judged[title]["p"] < 0.05
    protocol = verdicts.read_json(folder / "protocol.json")
    for seed in protocol["seeds"]:
        path = verdicts.sample_file(folder, "B", "LOCUS", seed)
        row = verdicts.read_row(path, verdicts.sha256(folder / "protocol.json"))
        row["samples"]["questions_place_tiny"] = [0.0] * len(row["samples"]["questions_place_tiny"])
        write_row(path, row)
    judged = {claim["title"]: claim for claim in verdicts.collect(folder)["claims"]}
    assert judged[title]["verdict"] == "undecided" and judged[title]["p"] == 1


# ---------------------------------------------------------------- the protocol


@pytest.fixture
def protocol() -> dict:
    return verdicts.read_json(ROOT / "paper" / "protocol.json")


def test_the_protocol_has_the_runs_that_it_promises(protocol):
    runs = verdicts.plan(protocol)
    assert len(runs) == len(set(runs)) == 58 + 2  # the positive control of twins, on each base
    for base in protocol["bases"]:
        assert next(name for run_base, name, _ in runs if run_base == base) == "base"
    assert not {*protocol["seeds"]} & {*protocol["development"]["seeds"]}
    assert protocol["measured"]["held_out"] != protocol["development"]["measured"]["held_out"]


def test_every_claim_is_about_rows_with_every_seed_and_enough_samples(protocol):
    assert len(protocol["claims"]) >= 8
    for claim in protocol["claims"]:
        assert protocol["rows"][claim["row"]]["seeds"] in (1, 3)
        assert claim["row"] == "base" or protocol["rows"][claim["row"]]["seeds"] == 3
        assert claim["other"] == "base" or protocol["rows"][claim["other"]]["seeds"] == 3
    assert protocol["measured"]["n"] >= 1200 and protocol["measured"]["twins"] >= 1200
    titles = [claim["title"] for claim in protocol["claims"] + protocol["not_testable"]]
    assert len(titles) == len(set(titles))


# ---------------------------------------------------------------- python -m paper.verdicts


def run_check(folder: Path, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["verdicts.py", str(folder)])
    try:
        verdicts.main()
    except SystemExit as stopped:
        # Python itself prints what sys.exit gets, and exits with 1.
        return (stopped.code, capsys.readouterr().err) if isinstance(stopped.code, int) else (1, stopped.code)
    return 0, capsys.readouterr().out


def test_what_the_report_says_is_what_the_samples_give(folder, monkeypatch, capsys):
    report.write(folder)
    assert run_check(folder, monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize("name", ["questions_place_tiny", "cue_small", "find_tiny"])
def test_one_altered_sample_is_seen(name, folder, monkeypatch, capsys):
    report.write(folder)
    seed = verdicts.read_json(folder / "protocol.json")["seeds"][0]
    path = verdicts.sample_file(folder, "B", "LOCUS", seed)
    row = verdicts.read_row(path, verdicts.sha256(folder / "protocol.json"))
    row["samples"][name][3] = 1 - row["samples"][name][3]
    write_row(path, row)
    code, problem = run_check(folder, monkeypatch, capsys)
    assert code == 1 and problem.count("\n") == 0 and "than the samples give" in problem


@pytest.mark.parametrize(
    ("old", "new"), [("**holds**", "**no difference**"), ("| **not testable** |", "| **holds** |")]
)
def test_another_verdict_in_the_report_is_seen(old, new, folder, monkeypatch, capsys):
    report.write(folder)
    path = folder / "RESULTS.md"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if old in line and line.startswith("|"))
    lines[index] = lines[index].replace(old, new)
    path.write_text("".join(lines), encoding="utf-8")
    code, problem = run_check(folder, monkeypatch, capsys)
    assert code == 1 and lines[index].split(" | ")[0].strip("| ") in problem


def test_answers_of_another_protocol_are_refused(folder):
    protocol = verdicts.read_json(folder / "protocol.json") | {"margin": 5}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    with pytest.raises(UserError, match="another protocol"):
        verdicts.collect(folder)


def test_a_missing_row_is_one_sentence(folder, monkeypatch, capsys):
    seed = verdicts.read_json(folder / "protocol.json")["seeds"][0]
    verdicts.sample_file(folder, "A", "random crop", seed).unlink()
    code, problem = run_check(folder, monkeypatch, capsys)
    assert code == 2 and "random-crop-A" in problem and "paper.reproduce" in problem


PUBLISHED = ROOT / "paper"


PLAN = verdicts.plan(verdicts.read_json(PUBLISHED / "protocol.json"))
IS_COMPLETE = all(verdicts.sample_file(PUBLISHED, *run).is_file() for run in PLAN)


@pytest.mark.skipif(not IS_COMPLETE, reason="not every row of the protocol has been run")
def test_the_published_verdicts_are_those_of_the_published_samples():
    results = verdicts.read_json(PUBLISHED / "RESULTS.json")
    assert results["protocol_sha256"] == verdicts.sha256(PUBLISHED / "protocol.json")
    assert verdicts.check(PUBLISHED) == ""
    assert report.markdown(results, results["protocol"]["steps"]) == (PUBLISHED / "RESULTS.md").read_text()
    assert sum(path.stat().st_size for path in (PUBLISHED / "samples").iterdir()) < 10e6
