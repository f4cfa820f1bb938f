"""Nothing lost: a run that was stopped, killed or out of disk goes on, and ends as if nothing had been."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from random_models import noise

import locus_mini
from evaluation import heldout, reply_cache
from training import checks, run_folder

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", 20, "--prompts", 4, "--num-generations", 4, "--max-new-tokens", 16, "--eval-cues", 6]
SMALL = [str(word) for word in (*SMALL, "--save-every", 4, "--show-every", 0)]


def start(*arguments: object, **ways) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "locus_mini.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **ways)


def in_process(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """The main program's exit code and what it says on stderr, without the seconds of a new process."""
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
    code = 0
    try:
        locus_mini.main()
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Twenty steps in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start("--out", folder, *SMALL)
    assert process.wait(300) == 0, process.stderr.read()
    return folder


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """The same run, which got a SIGTERM in its tenth step."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    patch = pytest.MonkeyPatch()
    usual = locus_mini.train_step

    def signalled(policy, optimizer, cues, step, *rest):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(policy, optimizer, cues, step, *rest)

    patch.setattr(locus_mini, "train_step", signalled)
    patch.setattr(sys, "argv", ["locus_mini.py", "--out", str(folder), *SMALL])
    with pytest.raises(SystemExit) as stopped:
        locus_mini.main()
    patch.undo()
    assert stopped.value.code == 130
    return folder


@pytest.fixture
def begun(halfway, tmp_path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def assert_the_same_end(folder: Path, whole: Path) -> None:
    assert metrics(folder) == metrics(whole)
    assert [row["step"] for row in metrics(folder)] == list(range(20))
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    one, other = (json.loads((path / "results.json").read_text()) for path in (folder, whole))
    for key in ("before", "after", "change", "baselines"):
        assert one[key] == other[key]
    states = [torch.load(path / "checkpoints/step-000020/optimizer.pt") for path in (folder, whole)]
    for moments in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert [path.name for path in run_folder.checkpoints(folder)] == ["step-000016", "step-000020"]


# ---------------------------------------------------------------- resume


def test_ten_and_ten_steps_are_twenty(begun, whole):
    assert [row["step"] for row in metrics(begun)] == list(range(10))
    assert [path.name for path in run_folder.checkpoints(begun)] == ["step-000008", "step-000010"]
    assert not (begun / "results.json").exists() and not (begun / "adapter").exists(), "nothing is evaluated"
    process = start("--resume", begun)
    assert process.wait(300) == 0, process.stderr.read()
    assert_the_same_end(begun, whole)


def test_memory_flags_may_change_when_a_run_goes_on(begun, monkeypatch, capsys):
    """As an out-of-memory error advises; anything else still refuses."""
    code, said = in_process(
        monkeypatch, capsys, "--resume", begun, "--micro-batch", 1, "--gradient-checkpointing"
    )
    assert code == 0, said
    assert len(metrics(begun)) == 20 and (begun / "results.json").exists()


def test_the_base_is_not_asked_again(begun, monkeypatch, capsys):
    asked, usual = [], reply_cache.generate_replies

    def counted(policy, items, *ways):
        items = list(items)
        asked.append(len(items))
        return usual(policy, items, *ways)

    monkeypatch.setattr(reply_cache, "generate_replies", counted)
    code, said = in_process(monkeypatch, capsys, "--resume", begun)
    assert code == 0, said
    assert sum(asked) == 6 + 6 + 12 + 12, "cue search, finding, questions, and these suppressed, once"
    code, _ = in_process(monkeypatch, capsys, "--resume", begun)
    assert code == 0 and sum(asked) == 36, "a complete run has nothing to go on with"


def test_kills_at_three_moments_change_nothing(whole, tmp_path):
    """While the base is asked, between two checkpoints, and in the middle of writing one."""
    folder = tmp_path / "run"
    log, answers = folder / "metrics.jsonl", folder / "answers.jsonl"
    moments = [
        lambda: answers.exists() and answers.stat().st_size > 2000,
        lambda: log.exists() and log.read_bytes().count(b"\n") >= 6,
        lambda: any(folder.glob("checkpoints/*.new/*")),
    ]
    for i, moment in enumerate(moments):
        process = start(*(("--resume", folder) if i else ("--out", folder, *SMALL)))
        while not moment():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.0005)
        process.kill()
        process.wait()
    assert len(run_folder.checkpoints(folder)) >= 1
    process = start("--resume", folder)
    assert process.wait(300) == 0, process.stderr.read()
    assert_the_same_end(folder, whole)


def test_what_a_kill_tore_is_done_again(begun, monkeypatch, capsys, whole):
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "reward": 0.3}\n{"step": 11, "rew')
    with (begun / "answers.jsonl").open("a") as file:
        file.write('["after/cue search/0", ["<think>')
    (begun / "checkpoints" / "step-000012.new").mkdir()
    (begun / "config.json.new").write_text("{")
    assert in_process(monkeypatch, capsys, "--resume", begun)[0] == 0
    assert_the_same_end(begun, whole)
    assert not list(begun.glob("checkpoints/*.new"))


def flip(path: Path) -> None:
    """One bit in the middle, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_a_checkpoint_it_starts_at_step_0(begun, monkeypatch, capsys, whole):
    shutil.rmtree(begun / "checkpoints")
    assert in_process(monkeypatch, capsys, "--resume", begun)[0] == 0
    assert_the_same_end(begun, whole)


@pytest.mark.parametrize(
    ("change", "arguments", "names"),
    [
        (lambda run: None, ["--lr", "0.5"], ["lr", "0.0007", "0.5"]),
        (lambda run: None, ["--steps", "30"], ["steps", "20", "30"]),
        (lambda run: edit(run / "config.json", beta=0.5), [], ["step-000010", "beta", "0.04", "0.5"]),
        (lambda run: edit(run / "config.json", weights="12345678"), [], ["weights", "12345678"]),
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
def test_other_settings_and_damage_refuse_in_one_sentence(
    change, arguments, names, begun, monkeypatch, capsys
):
    change(begun)
    files = sorted(path for path in begun.rglob("*") if "answers" not in path.name)
    code, said = in_process(monkeypatch, capsys, "--resume", begun, *arguments)
    last = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said and all(name in last for name in names), said
    assert sorted(path for path in begun.rglob("*") if "answers" not in path.name) == files


def test_a_damaged_checkpoint_leaves_the_one_before(begun, monkeypatch, capsys, whole):
    (begun / "checkpoints/step-000010/adapter_model.safetensors").write_bytes(b"\x10")
    assert in_process(monkeypatch, capsys, "--resume", begun)[0] == 2
    shutil.rmtree(begun / "checkpoints/step-000010")
    assert in_process(monkeypatch, capsys, "--resume", begun)[0] == 0
    assert_the_same_end(begun, whole)


def test_changed_data_refuse(tmp_path, monkeypatch, capsys):
    for i in range(30):
        noise((320, 240), i).save(tmp_path / f"{i}.png")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(locus_mini, "train", stopped)
    out = tmp_path / "run"
    code, said = in_process(monkeypatch, capsys, "--out", out, "--data", tmp_path, *SMALL)
    assert code == 130, said
    noise((320, 240), 99).save(tmp_path / "7.png")
    code, said = in_process(monkeypatch, capsys, "--resume", out)
    assert code == 2 and "as of" in said


def test_two_processes_do_not_share_a_run(begun, monkeypatch, capsys):
    with run_folder.lock_run_folder(begun):
        code, said = in_process(monkeypatch, capsys, "--resume", begun)
    assert code == 2 and "at work" in said


def test_out_on_a_run_names_resume(begun, monkeypatch, capsys):
    code, said = in_process(monkeypatch, capsys, "--out", begun, *SMALL)
    assert code == 2 and f"--resume {begun}" in said


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(begun, monkeypatch, capsys, whole):
    resource = pytest.importorskip(
        "resource", reason="file sizes are limited by resource, which Windows lacks"
    )

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    assert (begun / "checkpoints/step-000010/optimizer.pt").stat().st_size > 300_000
    assert (begun / "answers.jsonl").stat().st_size < 100_000
    process = start("--resume", begun, preexec_fn=small_files)
    assert process.wait(300) == 2
    said = process.stderr.read()
    assert "cannot be written" in said and "--resume" in said and "Traceback" not in said
    assert [path.name for path in run_folder.checkpoints(begun)] == ["step-000008", "step-000010"]
    assert in_process(monkeypatch, capsys, "--resume", begun)[0] == 0
    assert_the_same_end(begun, whole)


# ---------------------------------------------------------------- interruption

SLOW = """
import os, signal, sys, time
import locus_mini
def slow(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
locus_mini.train_step = slow
sys.argv = ["locus_mini.py", *sys.argv[1:]]
locus_mini.main()
"""


def test_a_second_interrupt_stops_at_once(begun):
    command = [sys.executable, "-c", SLOW, "--resume", str(begun)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "once more stops at once" in done.stderr
    assert [path.name for path in run_folder.checkpoints(begun)] == ["step-000008", "step-000010"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on_wherever_it_comes(number, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(heldout, "evaluate", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may have it ignored
    code, said = in_process(monkeypatch, capsys, "--out", tmp_path / "run", *SMALL)
    signal.signal(signal.SIGINT, usual)
    assert code == 130 and f"--resume {tmp_path / 'run'}" in said


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing_and_five_end_the_run(what, begun, monkeypatch, capsys):
    usual = locus_mini.grpo_loss

    def broken(logps, *rest):
        loss, stats = usual(logps, *rest)
        if what == "loss":
            return loss + torch.inf, stats
        return loss + 0 * (logps - logps.detach()).abs().sqrt().sum(), stats  # √ at 0: its gradient is 0 · ∞

    monkeypatch.setattr(locus_mini, "grpo_loss", broken)
    code, said = in_process(monkeypatch, capsys, "--resume", begun)
    assert code == 2 and "Five steps in a row were not finite" in said
    assert [row["skipped"] for row in metrics(begun)] == [0] * 10 + [1] * 5
    assert run_folder.checkpoints(begun)[-1].name == "step-000015"
    states = [path / "adapter_model.safetensors" for path in run_folder.checkpoints(begun)]
    assert states[-1].read_bytes() == states[-2].read_bytes()
    assert said.count("was not finite") == 5


FINE = {"skipped": 0.0, "completions/clipped_ratio": 0.0, "kl": 0.1, "frac_reward_zero_std": 0.2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skipped": 1.0}, "not finite"),
        ({"completions/clipped_ratio": 0.5}, "--max-new-tokens"),
        ({"kl": 1.2}, "--kl-limit 1"),
    ],
)
def test_what_goes_wrong_is_said_when_it_begins(change, words):
    assert checks.step_warnings([FINE, FINE], 1.0) == []
    (said,) = checks.step_warnings([FINE, FINE | change], 1.0)
    assert words in said
    assert checks.step_warnings([FINE | change], 1.0) == [said], "in the first step too"
    if "skipped" not in change:
        assert checks.step_warnings([FINE | change, FINE | change], 1.0) == [], "not at every step"


def test_groups_that_teach_nothing_for_twenty_steps_are_said_with_the_likely_causes():
    still = FINE | {"frac_reward_zero_std": 1.0}
    said = [len(checks.step_warnings([FINE] + [still] * n, 1.0)) for n in range(41)]
    assert said == [n in (20, 40) for n in range(41)]
    (warning,) = checks.step_warnings([still] * 20, 1.0)
    assert all(word in warning for word in ("--box-frame", "format", "--max-new-tokens"))


# ---------------------------------------------------------------- trust


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_in_a_checkpoint_is_never_run(begun, tmp_path, monkeypatch, capsys):
    with (begun / "checkpoints/step-000010/optimizer.pt").open("wb") as file:
        pickle.dump(Evil(tmp_path / "was run"), file, protocol=2)
    last = begun / "checkpoints/step-000010"
    edit(last / "state.json", **run_folder.checksums(last))
    code, said = in_process(monkeypatch, capsys, "--resume", begun)
    assert code == 2 and "damaged" in said
    assert not (tmp_path / "was run").exists()
