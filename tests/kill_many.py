"""Kills a run at 50 random moments, a third of them while a checkpoint is written, and checks its end.

    python tests/kill_many.py [--kills 50] [--seed 0]

After each kill the run is resumed; when it is complete, another starts. Every complete run must equal one
that was never killed, to the last bit. The ordinary tests kill three times; this script takes longer.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", 12, "--prompts", 4, "--num-generations", 4, "--max-new-tokens", 16, "--eval-cues", 4]
SMALL = [str(word) for word in (*SMALL, "--save-every", 2, "--show-every", 0)]


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "locus_mini.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def start_or_resume(run: Path) -> subprocess.Popen:
    """Resumes the run if it has a config.json, else starts it."""
    resumed = (run / "config.json").exists()
    return start("--resume", run) if resumed else start("--out", run, *SMALL)


def outcome(folder: Path) -> tuple:
    """Metrics, adapter and scores of a complete run, which must not depend on whether it was killed."""
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    metrics = [{key: line[key] for key in line if not key.startswith("seconds")} for line in lines]
    results = json.loads((folder / "results.json").read_text())
    scores = {key: results[key] for key in ("before", "after", "change", "baselines")}
    return metrics, (folder / "adapter" / "adapter_model.safetensors").read_bytes(), scores


def is_writing(folder: Path, started: float) -> bool:
    """Whether a checkpoint is being written; files that an earlier kill has left are older."""
    try:
        return any(path.stat().st_mtime > started for path in folder.glob("checkpoints/*.new/*"))
    except FileNotFoundError:
        return False


def count_steps(folder: Path) -> tuple[int, int]:
    """Steps in the last checkpoint, and complete lines of metrics.jsonl, which must be steps 0, 1, 2 …"""
    saved = sorted(p for p in folder.glob("checkpoints/step-*") if p.suffix != ".new")
    log = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").exists() else b""
    steps = [json.loads(line)["step"] for line in log[: log.rfind(b"\n") + 1].splitlines()]
    assert steps == list(range(len(steps))), f"metrics.jsonl holds the steps {steps}"
    return int(saved[-1].name[5:]) if saved else 0, len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), Path(tempfile.mkdtemp())
    run, num_runs, num_writing, repeated = folder / "run", 0, 0, []
    started = time.monotonic()
    assert start("--out", folder / "uninterrupted", *SMALL).wait() == 0
    seconds, expected = time.monotonic() - started, outcome(folder / "uninterrupted")
    for kill in tqdm(range(args.kills), desc="kills"):
        started = time.time()
        process = start_or_resume(run)
        if kill % 3 == 2:  # while a checkpoint is written
            while process.poll() is None and not is_writing(run, started):
                time.sleep(0.0005)
            num_writing += process.poll() is None
        else:
            time.sleep(rng.uniform(0, seconds))
        process.kill()
        stderr = process.stderr.read()
        assert process.wait() in (0, -9), stderr
        saved, done = count_steps(run)
        assert 0 <= done - saved <= 2, f"{done} steps done, {saved} saved: at most the last two may be lost"
        repeated.append(done - saved)
        if (run / "results.json").exists():
            assert outcome(run) == expected
            shutil.rmtree(run)
            num_runs += 1
    if run.exists():
        assert start_or_resume(run).wait() == 0
        assert outcome(run) == expected
        num_runs += 1
    print(f"{args.kills} kills, {num_writing} while a checkpoint was written: {num_runs} runs end alike")
    print(f"steps repeated after a kill: mean {sum(repeated) / len(repeated):.1f}, at most {max(repeated)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
