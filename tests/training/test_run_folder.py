"""A run that is stopped, killed or out of disk space resumes, and ends as if it had run without a break."""

import json
import os
import pickle
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import Program, new_folder, start_early
from random_models import noise
from torch import nn

import locus_mini
from evaluation import heldout, reply_cache
from files.errors import UserError
from policy import Rollout, rollout
from training import checks, run_folder

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", 20, "--prompts", 4, "--num-generations", 4, "--max-new-tokens", 16, "--eval-cues", 6]
SMALL = [str(word) for word in (*SMALL, "--save-every", 4, "--show-every", 0)]


def in_process(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """The main program's exit code and its stderr, without the seconds that a new process takes."""
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
    code = 0
    try:
        locus_mini.main()
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


EARLY = {}


def start_early_programs() -> None:
    EARLY["folder"] = new_folder() / "run"
    EARLY["uninterrupted"] = start_early("--out", EARLY["folder"], *SMALL)


@pytest.fixture(scope="module")
def uninterrupted() -> Path:
    """A run of twenty steps without a break."""
    EARLY["uninterrupted"].result()
    return EARLY["folder"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The same run, stopped by a SIGTERM in its tenth step."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    patch = pytest.MonkeyPatch()
    original = locus_mini.train_step

    def train_step_with_signal(policy, optimizer, cues, step, *rest):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(policy, optimizer, cues, step, *rest)

    patch.setattr(locus_mini, "train_step", train_step_with_signal)
    patch.setattr(sys, "argv", ["locus_mini.py", "--out", str(folder), *SMALL])
    with pytest.raises(SystemExit) as stopped:
        locus_mini.main()
    patch.undo()
    assert stopped.value.code == 130
    return folder


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    """A copy of the interrupted run, which a test may resume or damage."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the seconds, which differ in every run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if not key.startswith("seconds")} for line in lines]


def assert_same_end(folder: Path, uninterrupted: Path) -> None:
    """Metrics, adapter, card, scores, optimizer and checkpoints equal those of the uninterrupted run."""
    assert metrics(folder) == metrics(uninterrupted)
    assert [row["step"] for row in metrics(folder)] == list(range(20))
    for name in ("adapter_model.safetensors", "README.md", "before_after.png"):
        assert (folder / "adapter" / name).read_bytes() == (uninterrupted / "adapter" / name).read_bytes()
    results, expected = (json.loads((path / "results.json").read_text()) for path in (folder, uninterrupted))
    for key in ("before", "after", "change", "baselines"):
        assert results[key] == expected[key]
    states = [torch.load(path / "checkpoints/step-000020/optimizer.pt") for path in (folder, uninterrupted)]
    for moments in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert [path.name for path in run_folder.checkpoints(folder)] == ["step-000016", "step-000020"]


# ---------------------------------------------------------------- resume


def test_ten_and_ten_steps_are_twenty(run, uninterrupted):
    assert [row["step"] for row in metrics(run)] == list(range(10))
    assert [path.name for path in run_folder.checkpoints(run)] == ["step-000008", "step-000010"]
    assert not (run / "results.json").exists() and not (run / "adapter").exists(), "nothing is evaluated"
    process = Program("--resume", run)
    assert process.wait() == 0, process.stderr
    assert_same_end(run, uninterrupted)


def test_memory_flags_may_change_when_a_run_is_resumed(run, monkeypatch, capsys):
    """An out-of-memory error advises it. Any other setting must stay (see below)."""
    flags = ("--micro-batch", 1, "--gradient-checkpointing")
    code, stderr = in_process(monkeypatch, capsys, "--resume", run, *flags)
    assert code == 0, stderr
    assert len(metrics(run)) == 20 and (run / "results.json").exists()


def test_replies_of_the_base_model_are_not_generated_again(run, monkeypatch, capsys):
    batch_sizes, original = [], reply_cache.generate_replies

    def counting(policy, prompts, *rest):
        prompts = list(prompts)
        batch_sizes.append(len(prompts))
        return original(policy, prompts, *rest)

    monkeypatch.setattr(reply_cache, "generate_replies", counting)
    code, stderr = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 0, stderr
    assert sum(batch_sizes) == 6 + 6 + 18 + 18, (
        "cue search, finding, questions with and without the rest black"
    )
    code, _ = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 0 and sum(batch_sizes) == 48, "a complete run generates nothing"


def test_kills_at_three_moments_change_nothing(uninterrupted, tmp_path):
    """While the base model replies, between two checkpoints, and while a checkpoint is written."""
    folder = tmp_path / "run"
    log, replies = folder / "metrics.jsonl", folder / "answers.jsonl"
    moments = [
        lambda: replies.exists() and replies.stat().st_size > 2000,
        lambda: log.exists() and log.read_bytes().count(b"\n") >= 6,
        lambda: any(folder.glob("checkpoints/*.new/*")),
    ]
    for i, moment in enumerate(moments):
        process = Program(*(("--resume", folder) if i else ("--out", folder, *SMALL)))
        while not moment():
            assert process.wait(0) is None, process.stderr
            time.sleep(0.0005)
        process.kill()
    assert len(run_folder.checkpoints(folder)) >= 1
    process = Program("--resume", folder)
    assert process.wait() == 0, process.stderr
    assert_same_end(folder, uninterrupted)


def test_a_line_or_file_torn_by_a_kill_is_written_again(run, monkeypatch, capsys, uninterrupted):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "reward": 0.3}\n{"step": 11, "rew')
    with (run / "answers.jsonl").open("a") as file:
        file.write('["after/cue search/0", ["<think>')
    (run / "checkpoints" / "step-000012.new").mkdir()
    (run / "config.json.new").write_text("{")
    assert in_process(monkeypatch, capsys, "--resume", run)[0] == 0
    assert_same_end(run, uninterrupted)
    assert not list(run.glob("checkpoints/*.new"))


def flip(path: Path) -> None:
    """Flips one bit in the middle, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_without_a_checkpoint_resumes_at_step_0(run, monkeypatch, capsys, uninterrupted):
    shutil.rmtree(run / "checkpoints")
    assert in_process(monkeypatch, capsys, "--resume", run)[0] == 0
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize(
    ("change", "arguments", "names"),
    [
        (lambda run: None, ["--lr", "0.5"], ["lr", "0.001", "0.5"]),
        (lambda run: None, ["--steps", "30"], ["steps", "20", "30"]),
        (lambda run: edit(run / "config.json", beta=0.5), [], ["beta", "0.08", "0.5"]),
        (lambda run: edit(run / "config.json", weights="12345678"), [], ["weights", "12345678"]),
        (lambda run: edit(run / "config.json", task="sft"), [], ["task sft", "paper.variants sft --resume"]),
        (lambda run: (run / "config.json").unlink(), [], ["config.json"]),
        (lambda run: edit(run / "config.json", steps="twenty"), [], ["--steps", "twenty"]),
        (lambda run: edit(run / "config.json", preset="weekend"), [], ["--preset", "weekend"]),
        (lambda run: flip(run / "checkpoints/step-000010/adapter_model.safetensors"), [], ["not as it was"]),
        (lambda run: (run / "config.json").write_text("{}"), [], ["config.json"]),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n'), [], ["metrics.jsonl"]),
        (lambda run: (run / "checkpoints/step-000010/optimizer.pt").write_bytes(b"x"), [], ["step-000010"]),
        (lambda run: (run / "checkpoints/step-000010/state.json").unlink(), [], ["step-000010", "delete it"]),
    ],
)
def test_other_settings_and_damage_are_one_sentence(change, arguments, names, run, monkeypatch, capsys):
    change(run)
    files = sorted(path for path in run.rglob("*") if "answers" not in path.name)
    code, stderr = in_process(monkeypatch, capsys, "--resume", run, *arguments)
    last = stderr.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in stderr and all(name in last for name in names), stderr
    assert sorted(path for path in run.rglob("*") if "answers" not in path.name) == files


def test_a_checkpoint_of_other_settings_is_refused(run):
    with pytest.raises(UserError, match=r"step-000010 has beta 0\.08, not 0\.5"):
        run_folder.load_checkpoint(run, nn.Linear(1, 1), None, {"beta": "0.5"})


def test_a_damaged_checkpoint_leaves_the_one_before(run, monkeypatch, capsys, uninterrupted):
    (run / "checkpoints/step-000010/adapter_model.safetensors").write_bytes(b"\x10")
    assert in_process(monkeypatch, capsys, "--resume", run)[0] == 2
    shutil.rmtree(run / "checkpoints/step-000010")
    assert in_process(monkeypatch, capsys, "--resume", run)[0] == 0
    assert_same_end(run, uninterrupted)


CHANGES = {  # what happens to a folder of images, and the change that the message names
    "changed": (lambda folder: noise((320, 240), 99).save(folder / "7.png"), "7.png has changed"),
    "added": (lambda folder: noise((320, 240), 99).save(folder / "new.png"), "new.png was added"),
    "removed": (lambda folder: (folder / "7.png").unlink(), "7.png was removed"),
}


def stopped_run(images: Path, monkeypatch, capsys, *flags: object) -> Path:
    """A run on a folder of images that is interrupted before its first step."""

    def interrupted_train(*_, **__):
        raise KeyboardInterrupt

    images.mkdir()
    for i in range(30):
        noise((320, 240), i).save(images / f"{i}.png")
    with monkeypatch.context() as patch:
        patch.setattr(locus_mini, "train", interrupted_train)
        out = images.parent / "run"
        code, stderr = in_process(monkeypatch, capsys, "--out", out, *(flags or ("--data", images)), *SMALL)
    assert code == 130, stderr
    return out


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_images_are_refused_and_named(kind, tmp_path, monkeypatch, capsys):
    out = stopped_run(tmp_path / "images", monkeypatch, capsys)
    change, named = CHANGES[kind]
    change(tmp_path / "images")
    code, stderr = in_process(monkeypatch, capsys, "--resume", out)
    last = stderr.strip().splitlines()[-1]
    assert code == 2 and "as of" in last and named in last and len(last) - 2 * len(str(tmp_path)) < 200
    (out / "inputs.json").unlink()
    code, stderr = in_process(monkeypatch, capsys, "--resume", out)
    assert code == 2 and "inputs.json" in stderr and "Traceback" not in stderr


def test_a_damaged_list_of_inputs_is_one_sentence(tmp_path, monkeypatch, capsys):
    out = stopped_run(tmp_path / "images", monkeypatch, capsys)
    for content in ("[", "[1]", '{"%s": 3}' % (tmp_path / "images")):
        (out / "inputs.json").write_text(content)
        code, stderr = in_process(monkeypatch, capsys, "--resume", out)
        assert code == 2 and "inputs.json" in stderr and "Traceback" not in stderr


def test_files_of_the_system_do_not_end_a_run_and_neither_does_another_working_folder(
    tmp_path, monkeypatch, capsys
):
    """The run is given a relative --data, and is in the folder itself."""
    monkeypatch.chdir(tmp_path)
    out = stopped_run(Path("images"), monkeypatch, capsys).resolve()
    shutil.move(out, tmp_path / "images" / "run")
    (tmp_path / "images" / ".DS_Store").touch()
    monkeypatch.chdir("/")
    config = json.loads((tmp_path / "images/run/config.json").read_text())
    assert config["data"] == str(tmp_path / "images")
    monkeypatch.setattr(locus_mini, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, stderr = in_process(monkeypatch, capsys, "--resume", tmp_path / "images" / "run")
    assert code == 130, stderr


def test_two_processes_cannot_share_a_run(run, monkeypatch, capsys):
    with run_folder.lock_run_folder(run):
        code, stderr = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 2 and "at work" in stderr


def test_out_with_the_folder_of_a_run_names_resume(run, monkeypatch, capsys):
    code, stderr = in_process(monkeypatch, capsys, "--out", run, *SMALL)
    assert code == 2 and f"--resume {run}" in stderr


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(run, monkeypatch, capsys, uninterrupted):
    pytest.importorskip("resource", reason="Windows has no limit of file sizes")
    assert (run / "checkpoints/step-000010/optimizer.pt").stat().st_size > 300_000
    assert (run / "answers.jsonl").stat().st_size < 100_000
    process = Program("--resume", run, max_file_size=300_000)
    assert process.wait() == 2
    stderr = process.stderr
    assert "cannot be written" in stderr and "--resume" in stderr and "Traceback" not in stderr
    assert [path.name for path in run_folder.checkpoints(run)] == ["step-000008", "step-000010"]
    assert in_process(monkeypatch, capsys, "--resume", run)[0] == 0
    assert_same_end(run, uninterrupted)


# ---------------------------------------------------------------- interruption

SLOW = """
import os, signal, sys, time
import locus_mini
def slow(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
locus_mini.train_step = slow
locus_mini.main()
"""


def test_a_second_interrupt_stops_at_once(run):
    process = Program("--resume", run, code=SLOW)
    assert process.wait() == 130 and "Interrupt again to stop at once" in process.stderr
    assert [path.name for path in run_folder.checkpoints(run)] == ["step-000008", "step-000010"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_time_prints_the_command_that_resumes(number, tmp_path, monkeypatch, capsys):
    def interrupted_evaluate(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(heldout, "evaluate", interrupted_evaluate)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may ignore the signal
    code, stderr = in_process(monkeypatch, capsys, "--out", tmp_path / "run", *SMALL)
    signal.signal(signal.SIGINT, previous)
    assert code == 130
    assert f"Stopped. Resume with: python locus_mini.py --resume {tmp_path / 'run'}" in stderr


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing_and_five_end_the_run(broken, run, monkeypatch, capsys):
    original = locus_mini.grpo_loss

    def broken_loss(logps, *rest):
        loss, stats = original(logps, *rest)
        if broken == "loss":
            return loss + torch.inf, stats
        return loss + 0 * (logps - logps.detach()).abs().sqrt().sum(), stats  # √ at 0: its gradient is 0 · ∞

    monkeypatch.setattr(locus_mini, "grpo_loss", broken_loss)
    code, stderr = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 2 and "Five steps in a row were not finite" in stderr
    assert [row["skipped"] for row in metrics(run)] == [0] * 10 + [1] * 5
    assert run_folder.checkpoints(run)[-1].name == "step-000015"
    states = [path / "adapter_model.safetensors" for path in run_folder.checkpoints(run)]
    assert states[-1].read_bytes() == states[-2].read_bytes()
    assert stderr.count("was not finite") == 5


def test_a_model_that_is_damaged_while_it_trains_ends_the_run(run, monkeypatch, capsys):
    """In the steps from the tenth on, no group is finite."""

    def not_finite(*arguments) -> Rollout:
        rollouts = rollout(*arguments)
        return replace(rollouts, mask=rollouts.mask & False, finite=rollouts.finite & False)

    monkeypatch.setattr(locus_mini, "rollout", not_finite)
    code, stderr = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 2 and "not finite in torch.float32: its weights are damaged" in stderr
    assert [row["frac_groups_not_finite"] for row in metrics(run)] == [0] * 10 + [1] * 5
    assert [row["skipped"] for row in metrics(run)] == [0] * 10 + [1] * 5
    states = [path / "adapter_model.safetensors" for path in run_folder.checkpoints(run)]
    assert states[-1].read_bytes() == states[-2].read_bytes()


FINE = {"skipped": 0.0, "completions/clipped_ratio": 0.0, "kl": 0.1, "frac_reward_zero_std": 0.2}
FINE |= {"frac_groups_not_finite": 0.0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"skipped": 1.0}, "not finite"),
        ({"frac_groups_not_finite": 0.25}, "25% of the groups were not finite"),
        ({"completions/clipped_ratio": 0.5}, "--max-new-tokens"),
        ({"kl": 1.2}, "--kl-limit 1"),
    ],
)
def test_a_problem_warns_in_its_first_step(change, text):
    assert checks.step_warnings([FINE, FINE], 1.0) == []
    (warning,) = checks.step_warnings([FINE, FINE | change], 1.0)
    assert text in warning
    assert checks.step_warnings([FINE | change], 1.0) == [warning], "in the first step of a run too"
    if "skipped" not in change:
        assert checks.step_warnings([FINE | change, FINE | change], 1.0) == [], "not at every step"


def test_twenty_steps_of_equal_rewards_warn_with_the_likely_causes():
    idle = FINE | {"frac_reward_zero_std": 1.0}
    warnings = [len(checks.step_warnings([FINE] + [idle] * n, 1.0)) for n in range(41)]
    assert warnings == [n in (20, 40) for n in range(41)]
    (warning,) = checks.step_warnings([idle] * 20, 1.0)
    assert all(word in warning for word in ("--box-frame", "format", "--max-new-tokens"))


def test_an_entropy_that_collapses_warns_once():
    """The last five steps are below a tenth of the first five. Single steps do not count, nor do zeros."""

    def history(*entropies: float) -> list[dict]:
        return [FINE | {"entropy": entropy} for entropy in entropies]

    start = [0.5, 0.3, 0.4, 0.4, 0.4]
    collapsed = [start + [0.4] + [0.03] * n for n in range(9)]
    counts = [len(checks.step_warnings(history(*entropies), 1.0)) for entropies in collapsed]
    assert counts == [0, 0, 0, 0, 0, 1, 0, 0, 0], "in the first step only whose last five are below a tenth"
    (warning,) = checks.step_warnings(history(*collapsed[5]), 1.0)
    assert "entropy" in warning and "--lr" in warning and "--beta" in warning
    assert checks.step_warnings(history(*start, *[0.05] * 5), 1.0) == [], "an eighth is no collapse"
    assert checks.step_warnings(history(*[0.0] * 20), 1.0) == []
    assert checks.step_warnings(history(*start, *[0.0] * 5), 1.0) == [], "they had no training pass"


# ---------------------------------------------------------------- trust


class MaliciousPickle:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_in_a_checkpoint_is_never_run(run, tmp_path, monkeypatch, capsys):
    with (run / "checkpoints/step-000010/optimizer.pt").open("wb") as file:
        pickle.dump(MaliciousPickle(tmp_path / "was run"), file, protocol=2)
    last = run / "checkpoints/step-000010"
    edit(last / "state.json", **run_folder.checksums(last))
    code, stderr = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 2 and "damaged" in stderr
    assert not (tmp_path / "was run").exists()
