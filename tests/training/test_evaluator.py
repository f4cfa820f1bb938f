"""Evaluation while training: it changes nothing, its best adapter is kept, and a killed run repeats it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import Program, new_folder, start_early

import locus_mini
from data import CueConfig, open_cues
from evaluation.heldout import build_heldout_set, evaluate
from files.errors import UserError
from models import add_lora, load_adapter, load_policy
from reward import iou
from training import run_folder

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", 8, "--prompts", 4, "--num-generations", 4, "--max-new-tokens", 24, "--eval-cues", 4]
SMALL = [str(word) for word in (*SMALL, "--save-every", 3, "--show-every", 0)]
EVALUATED = [*SMALL, "--eval-every", "2", "--log-entropy"]


def run_program(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
        locus_mini.main()


EARLY = {}


def start_early_programs() -> None:
    EARLY["folder"] = folder = new_folder()
    EARLY["plain"] = start_early("--out", folder / "plain", *SMALL)
    EARLY["evaluated"] = start_early("--out", folder / "evaluated", *EVALUATED)
    arguments = ("--out", folder / "killed", *EVALUATED, "best")
    EARLY["killed"] = start_early(*arguments, code=KILLED, exit_code=9)


def folder_of(name: str) -> Path:
    """The folder of an early run, once it has ended."""
    EARLY[name].result()
    return EARLY["folder"] / name


@pytest.fixture(scope="module")
def plain() -> Path:
    """A run without evaluation on the way."""
    return folder_of("plain")


@pytest.fixture(scope="module")
def evaluated() -> Path:
    """The same run with an evaluation after every second step, and with the entropy."""
    return folder_of("evaluated")


def read_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file without the seconds, which differ in every run."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in line if not key.startswith("seconds")} for line in lines]


def assert_same_training(folder: Path, expected: Path) -> None:
    """Two runs end with the same bytes of the adapter and the same state of the optimizer."""
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (expected / name).read_bytes()
    states = [torch.load(path / "checkpoints/step-000008/optimizer.pt") for path in (folder, expected)]
    for moments in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_evaluation_and_entropy_change_nothing_in_the_training(plain, evaluated):
    assert_same_training(evaluated, plain)
    rows = read_lines(evaluated / "metrics.jsonl")
    kept = [{k: row[k] for k in row if k != "entropy" and not k.startswith("eval/")} for row in rows]
    assert kept == read_lines(plain / "metrics.jsonl")
    assert all(row["entropy"] > 0.01 for row in rows), "the embedded model is not sure of every token"
    assert not [path.name for path in plain.iterdir() if "eval" in path.name or "best" in path.name]


def test_an_evaluation_is_part_of_the_line_of_its_step(evaluated):
    rows = read_lines(evaluated / "metrics.jsonl")
    scored = {row["step"]: row for row in rows if "eval/iou" in row}
    assert list(scored) == [1, 3, 5, 7]
    for line in read_lines(evaluated / "evaluations.jsonl"):
        row = scored.pop(line["step"])
        assert len(line["replies"]) == len(line["boxes"]) == len(line["ious"]) == 50
        assert sum(line["ious"]) / 50 == pytest.approx(row["eval/iou"], abs=1e-12)
        assert 0 < row["eval/accuracy"] < 1 and row["eval/format"] > 0.5
        cues = open_cues("scenes", "heldout", 0, CueConfig())
        for i in (0, 7, 49):
            assert line["ious"][i] == pytest.approx(
                iou(line["boxes"][i], cues[i].box) if line["boxes"][i] else 0
            )
            assert line["replies"][i].startswith("<think>")
    assert not scored and (evaluated / "evaluation.png").stat().st_size > 0


def replies_of(adapter: Path) -> tuple[list[str], float, float]:
    """An adapter's replies to 50 held-out cues, their mean IoU, and its accuracy in 100 questions."""
    policy, replies = load_adapter(load_policy("tiny"), adapter), {}
    held = build_heldout_set(policy, open_cues("scenes", "heldout", 0, CueConfig()), 50)
    # Training asks the first 100 of its 153 questions, and none on black images.
    held = replace(held, suppressed_prompts=[])
    del held.scene_questions[100:], held.question_prompts[100:]
    summary = evaluate(policy, held, 24, cache=replies).summary
    texts = [value[0] for key, value in replies.items() if "cue search" in key]
    return texts, summary["cue"]["mean_iou"], summary["questions"]["accuracy"]


def test_the_best_adapter_has_the_highest_score_and_an_evaluation_is_that_of_its_step(evaluated):
    """Loaded again, both adapters reply to the held-out prompts as they did in training."""
    lines = {line["step"]: line for line in read_lines(evaluated / "evaluations.jsonl")}
    scores = {row["step"]: row for row in read_lines(evaluated / "metrics.jsonl") if "eval/iou" in row}
    best = max(scores, key=lambda step: (scores[step]["eval/iou"], -step))
    for adapter, step in (("adapter-best", best), ("adapter", 7)):
        texts, mean_iou, accuracy = replies_of(evaluated / adapter)
        assert texts == lines[step]["replies"]
        assert (mean_iou, accuracy) == (scores[step]["eval/iou"], scores[step]["eval/accuracy"])
    assert best != 7 and lines[best]["replies"] != lines[7]["replies"], "or the test shows nothing"


def test_of_two_equal_scores_the_earlier_is_the_best():
    scores = (0.0, None, 0.3, 0.3, 0.2, 0.4)
    history = [{"eval/iou": score} if score is not None else {} for score in scores]
    found = [run_folder.has_best_score(history[: i + 1]) for i in range(6)]
    assert found == [True, False, True, False, False, True]


# ---------------------------------------------------------------- a kill at the worst moments

KILLED = """
import os, sys
import locus_mini
from training import run_folder

save_adapter, log_step = run_folder.save_adapter, run_folder.log_step

def killed_before_the_best_adapter(model, folder, *rest):
    if folder.name == "adapter-best":
        os._exit(9)
    save_adapter(model, folder, *rest)

def killed_before_the_metrics(log, bar, history, *rest):
    if history[-1]["step"] == 5:
        log.write('{"step": 5, "rew')
        os._exit(9)
    log_step(log, bar, history, *rest)

run_folder.save_adapter, run_folder.log_step = {
    "best": (killed_before_the_best_adapter, log_step),
    "metrics": (save_adapter, killed_before_the_metrics),
}[sys.argv.pop()]
locus_mini.main()
"""


def kill(moment: str, *arguments: object) -> None:
    """Starts or resumes a run in a process that ends by itself, without a word, at a moment of KILLED."""
    process = Program(*arguments, moment, code=KILLED)
    assert process.wait() == 9, process.stderr


@pytest.fixture(scope="module")
def killed() -> Path:
    """The evaluated run, killed between the checkpoint of its first evaluation and the best adapter."""
    folder = folder_of("killed")
    assert not (folder / "adapter-best").exists()
    assert [path.name for path in run_folder.checkpoints(folder)] == ["step-000002"]
    return folder


def test_a_run_killed_twice_ends_as_one_left_alone(killed, evaluated, tmp_path):
    """The second kill comes between a line of evaluations.jsonl and that of metrics.jsonl, which is torn."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    kill("metrics", "--resume", folder)
    lines = read_lines(folder / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 5] and (folder / "adapter-best").is_dir()
    assert run_folder.checkpoints(folder)[-1].name < "step-000006", "the last checkpoint knows no step 5"
    run_program("--resume", folder)
    assert_same_training(folder, evaluated)
    assert read_lines(folder / "metrics.jsonl") == read_lines(evaluated / "metrics.jsonl")
    for name in ("evaluations.jsonl", "evaluation.png", "adapter-best/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (evaluated / name).read_bytes(), name
    checkpoints = [[path.name for path in run_folder.checkpoints(run)] for run in (folder, evaluated)]
    assert checkpoints[0] == checkpoints[1]


def test_a_best_adapter_that_a_kill_has_prevented_is_written_when_the_run_resumes(killed, tmp_path):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    policy = add_lora(load_policy("tiny"), 16)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    assert run_folder.load_checkpoint(folder, policy.model, optimizer, {}) == 2
    name = "adapter_model.safetensors"
    paths = folder / "adapter-best" / name, folder / "checkpoints/step-000002" / name
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_damaged_file_of_evaluations_is_one_sentence(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 3}\n')
    log, lines = run_folder.open_lines(path, range(3, 7, 4))
    log.close()
    assert lines == [{"step": 3}]
    with pytest.raises(UserError, match=r"evaluations\.jsonl lacks some of the first 7 steps"):
        run_folder.open_lines(path, range(1, 7, 2))
