"""Trackers, read back from what they write: no step is there twice, whatever a run survives."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Program

import locus_mini
from training import run_folder
from training.settings import read_flags

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", 6, "--prompts", 2, "--num-generations", 4, "--max-new-tokens", 16, "--eval-cues", 2]
SMALL = [str(word) for word in (*SMALL, "--save-every", 2, "--eval-every", 3, "--show-every", 0)]


def run_program(*arguments: object, kill_after: int = -1, number: int = signal.SIGTERM) -> int:
    """The main program's exit code; after the step `kill_after` it gets a signal."""
    log_step = run_folder.log_step

    def log_step_and_signal(log, bar, history, *rest):
        log_step(log, bar, history, *rest)
        if history[-1]["step"] == kill_after:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "log_step", log_step_and_signal)
        patch.setattr(sys, "argv", ["locus_mini.py", *map(str, arguments)])
        try:
            locus_mini.main()
        except SystemExit as stopped:
            return stopped.code
    return 0


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


KILLED = """
import os
import locus_mini
from training import run_folder

report_to_tensorboard = run_folder.report_to_tensorboard

def report_and_die(writer, folder, metrics):
    report_to_tensorboard(writer, folder, metrics)
    if metrics["step"] == 4:
        os._exit(9)

run_folder.report_to_tensorboard = report_and_die
locus_mini.main()
"""


def test_tensorboard_shows_each_step_of_a_killed_run_once(tmp_path):
    """Killed after step 4, whose checkpoint is that of step 4: its first three steps and step 4 again."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    folder = tmp_path / "run"
    process = Program("--out", folder, *SMALL, "--report-to", "tensorboard", code=KILLED)
    assert process.wait() == 9, process.stderr
    assert run_folder.checkpoints(folder)[-1].name == "step-000004", "step 4 is reported and not saved"
    assert run_program("--resume", folder) == 0
    assert len(list((folder / "tensorboard").iterdir())) == 2, "a file from each process"
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    metrics = read_metrics(folder)
    assert set(events.Tags()["scalars"]) == set().union(*metrics) - {"step"}
    for name in ("reward", "completions/mean_length", "eval/iou"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected, name
    images = events.Images("eval/boxes")
    assert [image.step for image in images] == [2, 5]
    assert images[1].encoded_image_string.startswith(b"\x89PNG") and images[1].width > 500


def wandb_records(path: Path) -> Iterator:
    """The records of a .wandb file: a LevelDB log of protocol buffers after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, data = path.read_bytes(), 7, b""
    while position < len(content):
        left = 2**15 - position % 2**15  # in a block; a record's header has seven bytes
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        data += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(data)
            data = b""


def test_wandb_continues_the_run_that_config_json_names(tmp_path, monkeypatch):
    """Offline, stopped after its fourth step and resumed."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "my run"
    assert run_program("--out", folder, *SMALL, "--report-to", "wandb", kill_after=3) == 130
    assert run_program("--resume", folder) == 0
    run_id = json.loads((folder / "config.json").read_text())["tracker_run"]
    paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in paths] == [f"run-{run_id}.wandb"] * 2
    reported = {}
    for path in paths:
        records = list(wandb_records(path))
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.display_name, run.project) == (run_id, "my run", "locus-mini")
        histories = [r.history for r in records if r.WhichOneof("record_type") == "history"]
        for history in histories:
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in history.item}
            assert history.step.num not in reported, "no step is there twice"
            reported[history.step.num] = row
    metrics = read_metrics(folder)
    assert list(reported) == [row["step"] for row in metrics] == list(range(6))
    for row in metrics:
        sent = reported[row["step"]]
        assert {name: json.loads(sent[name]) for name in row if name != "step"} == {
            name: value for name, value in row.items() if name != "step"
        }
        assert ("eval/boxes/path" in sent) == (row["step"] in (2, 5))


NO_KEY = """
import os, sys
from pathlib import Path

kept = {name: os.environ[name] for name in os.environ if not name.startswith(("WANDB", "NETRC"))}
os.chdir(sys.argv[1])
os.environ.clear()
os.environ |= kept | {"HOME": sys.argv[1]}  # a home without a key

from files.errors import exit_on_error
from training.run_folder import open_tracker
from training.settings import Config

with exit_on_error(), open_tracker(Config(report_to="wandb"), Path(), 0):
    print("started")
"""


def test_wandb_without_a_key_is_one_sentence(tmp_path):
    """In a process of its own: wandb remembers the mode of earlier runs."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    (tmp_path / "config.json").write_text('{"tracker_run": "0123abcd"}')
    process = Program(tmp_path, code=NO_KEY)
    assert process.wait() == 2
    last = process.stderr.splitlines()[-1]
    assert process.stdout == "" and "Traceback" not in process.stderr
    assert "--report-to wandb cannot start (" in last and "WANDB_MODE=offline" in last


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(tracker, tmp_path):
    """In a process that cannot find the package: one sentence, exit code 2, no torch, no folder."""
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {tracker!r} else find_spec(name, *rest)
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["locus_mini.py", "--report-to", {tracker!r}]
try:
    runpy.run_path({str(ROOT / "locus_mini.py")!r}, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "False\n"
    sentence = f"--report-to {tracker} needs its package: run python -m pip install {tracker}.\n"
    assert done.stderr == sentence and list(tmp_path.iterdir()) == []


def test_without_a_tracker_nothing_is_imported_and_no_id_is_stored(tmp_path):
    code = "import sys, locus_mini; locus_mini.main()"
    code += "; print([name for name in ('tensorboard', 'wandb') if name in sys.modules])"
    process = Program("--out", tmp_path / "run", *SMALL[:-6], code=code)
    assert process.wait() == 0 and process.stdout.endswith("[]\n"), process.stderr
    assert "tracker_run" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_an_unknown_tracker_is_refused(capsys):
    with pytest.raises(SystemExit):
        read_flags("", ["--report-to", "mlflow"])
    assert "invalid choice: 'mlflow'" in capsys.readouterr().err
