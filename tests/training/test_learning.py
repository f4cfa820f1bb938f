"""completions.jsonl, curve.png and learning.gif: of a real run, of a stopped one, and at their largest."""

import os
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageColor
from programs import new_folder, start_early

import eval as eval_module
import locus_mini
from data import Cue, CueConfig, scene_cues
from files.disk import read_lines
from prompts import BoxFrame
from reward import iou, reward
from training import learning
from training.learning import draw_curve, draw_learning, log_group, shorten
from training.pictures import BLUE

SMALL = ["--steps", 5, "--prompts", 2, "--num-generations", 4, "--max-new-tokens", 24, "--eval-cues", 2]
SMALL = [str(word) for word in (*SMALL, "--save-every", 2, "--eval-every", 2, "--show-every", 2)]
DRAWN = ("completions.jsonl", "curve.png", "learning.gif")


def train(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
        locus_mini.main()


EARLY = {}


def start_early_programs() -> None:
    EARLY["folder"] = new_folder() / "run"
    EARLY["run"] = start_early("--out", EARLY["folder"], *SMALL, "--log-entropy")


@pytest.fixture(scope="module")
def run() -> Path:
    """A run of five steps with an evaluation and a group every two."""
    EARLY["run"].result()
    return EARLY["folder"]


def content(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in DRAWN]


def report(folder: Path, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", "report", str(folder)])
    eval_module.main()
    return (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- a real run


def test_a_run_keeps_a_group_every_few_steps(run):
    lines, cues = read_lines(run / "completions.jsonl"), scene_cues(CueConfig(), "train", 0)
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        rows, box = line["completions"], cues[line["cue"]].box
        assert line["cue"] // 2 == line["step"] and len(rows) == 4
        assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-3)
        for row in rows:
            assert row["total"] == pytest.approx(0.9 * row["iou"] + 0.1 * row["format"])
            # The box is in pixels of the image, so the cue that is drawn again gives the same IoU.
            found = iou(row["box"], box) if row["box"] else 0.0
            assert found == pytest.approx(row["iou"], abs=1e-6)


def test_the_drawings_are_rebuilt_to_the_same_bytes(run, monkeypatch):
    before = content(run)
    for name in DRAWN[1:]:
        (run / name).unlink()
    report(run, monkeypatch)
    assert content(run) == before
    with Image.open(run / "learning.gif") as gif:
        assert gif.n_frames == len(read_lines(run / "evaluations.jsonl")) == 2
    with Image.open(run / "curve.png") as curve:
        assert curve.size[0] == 3 * 420 and curve.size[1] > 500, "six panels with entropy and eval/iou"


def test_a_stopped_run_ends_with_the_same_drawings(run, tmp_path, monkeypatch):
    """Stopped in step 3, whose checkpoint is deleted: step 2 and its group come again."""
    folder, original = tmp_path / "run", locus_mini.train_step

    def train_step_with_signal(policy, optimizer, cues, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(policy, optimizer, cues, step, *rest)

    monkeypatch.setattr(locus_mini, "train_step", train_step_with_signal)
    with pytest.raises(SystemExit) as stopped:
        train("--out", folder, *SMALL, "--log-entropy")
    monkeypatch.undo()
    assert stopped.value.code == 130
    page = report(folder, monkeypatch)
    # A report of a run that is stopped.
    assert "4 of 5 steps" in page and "There is no adapter/README.md" in page
    for checkpoint in sorted(folder.glob("checkpoints/*"))[1:]:
        checkpoint.rename(folder / checkpoint.name)
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "cue"')  # torn by a kill
    train("--resume", folder)
    assert content(folder) == content(run)


# ---------------------------------------------------------------- sizes


def group_of(texts: list[str]) -> SimpleNamespace:
    frame = BoxFrame(1000, 1000, 1000, 1000)
    example = SimpleNamespace(index=0, prompt=SimpleNamespace(frame=frame))
    rewards = [reward(text, (1, 2, 3, 4)) for text in texts]
    return SimpleNamespace(
        example=example, completions=texts, rewards=rewards, advantages=[1 / 3] * len(texts)
    )


@pytest.mark.parametrize(
    "text", ["\x00" * 9000, "\U0001f600" * 9000, "<answer>[1, 2, 3, 4]</answer>" + "x" * 60000]
)
@pytest.mark.parametrize("num_completions", [1, 8, 120])
def test_no_group_takes_more_than_its_share_of_five_megabytes(text, num_completions, tmp_path):
    log_group(tmp_path, 0, group_of([text] * num_completions), SimpleNamespace(show_every=1, steps=10**6))
    (line,) = read_lines(tmp_path / "completions.jsonl")
    assert (tmp_path / "completions.jsonl").stat().st_size <= 50_000
    assert len(line["completions"]) == min(100, num_completions)
    kept = line["completions"][0]["text"]
    assert kept.endswith("…") and text.startswith(kept[:-1]) and len(kept) > 3


@pytest.mark.parametrize(
    ("steps", "show_every", "expected"),
    [(300, 30, 10), (150, 1, 75), (5, 0, 0), (3, 30, 1)],
)
def test_a_run_keeps_at_most_a_hundred_groups_evenly_spread(steps, show_every, expected, tmp_path):
    cfg, group = SimpleNamespace(show_every=show_every, steps=steps), group_of(["a"])
    for step in range(steps):
        log_group(tmp_path, step, group, cfg)
    kept = [line["step"] for line in read_lines(tmp_path / "completions.jsonl")]
    assert len(kept) == expected
    assert len({b - a for a, b in pairwise(kept)}) <= 1


def test_a_text_that_fits_is_not_cut():
    assert shorten("l" * 18, 20) == "l" * 18 and shorten("l" * 19, 20) == "l" * 9 + "…"


def evaluations(num_evaluations: int, rng: random.Random) -> list[dict]:
    def box() -> list[int]:
        x, y = rng.randrange(120), rng.randrange(120)
        return [x, y, x + rng.randrange(100, 200), y + rng.randrange(100, 200)]

    return [
        {"step": step, "boxes": [box() for _ in range(50)], "ious": [0.5 for _ in range(50)]}
        for step in range(num_evaluations)
    ]


def test_images_of_noise_and_large_boxes_stay_below_the_limit(tmp_path):
    rng = random.Random(0)
    images = [Image.frombytes("RGB", (320, 320), rng.randbytes(320 * 320 * 3)) for _ in range(8)]
    cues = [Cue(image, (100, 100, 220, 220), "large") for image in images]
    draw_learning(cues, evaluations(300, rng), tmp_path / "noise.gif")
    assert (tmp_path / "noise.gif").stat().st_size < 1_500_000
    with Image.open(tmp_path / "noise.gif") as gif:
        assert gif.n_frames == 24


# ---------------------------------------------------------------- what they show


def test_the_caption_counts_what_is_closer_at_the_end_than_at_first(tmp_path, monkeypatch):
    """Three of the eight cues close in; a cue without a reply has none, and the mean leaves it out."""
    first, last = evaluations(2, random.Random(0))
    last["step"] = 19
    last["ious"][:5], last["boxes"][3] = [0.6, 0.6, 0.51, None, 0.4], None
    last["ious"][8:] = [0.9] * 42  # beyond the eight cues: part of the mean alone
    texts, original = [], learning.text_block
    monkeypatch.setattr(
        learning, "text_block", lambda text, *rest: texts.append(text) or original(text, *rest)
    )
    draw_learning(scene_cues(CueConfig(), "heldout", 0), [first, last], tmp_path / "learning.gif")
    assert all(text.startswith("Held-out cues 0 to 7: 3 of the eight") for text in texts if "cues 0" in text)
    mean = (0.6 + 0.6 + 0.51 + 0.4 + 3 * 0.5 + 42 * 0.9) / 49
    assert f"After 20 steps: mean IoU {mean:.3f} over 50 cues" in texts
    with Image.open(tmp_path / "learning.gif") as gif:
        frames = [frame.convert("RGB") for frame in (gif.copy(), (gif.seek(1), gif.copy())[1])]
        assert gif.info["duration"] == 3000
    assert frames[0].tobytes() != frames[1].tobytes()


def test_values_that_are_not_finite_or_absent_leave_gaps(tmp_path):
    history = [{"step": i, "reward": 0.1 * i, "iou": 0.0, "format": 1.0, "kl": 0.0} for i in range(5)]
    draw_curve(history, tmp_path / "plain.png")
    history[2] |= {"reward": float("nan"), "kl": float("inf"), "entropy": 0.0}
    draw_curve(history, tmp_path / "gaps.png")
    draw_curve([history[2]], tmp_path / "single.png")
    draw_curve([], tmp_path / "none.png")
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes["gaps"] == sizes["plain"] == (3 * 420, sizes["plain"][1]), "an entropy of 0 is none"
    assert sizes["single"] == (2 * 420, sizes["single"][1]) and "none" not in sizes


def test_a_higher_value_is_drawn_higher_and_a_later_step_further_right(tmp_path):
    history = [{"step": i, "reward": 0.0 if i < 20 else 1.0} for i in range(40)]
    draw_curve(history, tmp_path / "curve.png")
    curve = Image.open(tmp_path / "curve.png").convert("RGB")
    blue, pixels = ImageColor.getrgb(BLUE), curve.load()
    spots = [(x, y) for x in range(curve.width) for y in range(curve.height) if pixels[x, y] == blue]
    left, right = [y for x, y in spots if x < 160], [y for x, y in spots if x > 370]
    assert min(left) > max(right) + 150
