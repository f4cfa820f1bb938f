"""Kills a run at 50 random moments, some of them while a checkpoint is written, and compares its end.

    python tests/kill_many.py [--kills 50] [--seed 0]

After each kill the run is resumed; when it is complete another one begins. At the end every run must be the
same, to the last bit, as one that was left alone. The ordinary tests kill three times; this takes longer.
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


def end_of(folder: Path) -> tuple:
    """What must not hang on whether a run was killed."""
    lines = [json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").open()]
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results[key] for key in ("before", "after", "change", "baselines")}
    return lines, (folder / "adapter" / "adapter_model.safetensors").read_bytes(), kept


def writes(folder: Path, began: float) -> bool:
    """Whether a checkpoint is being written; what an earlier kill has left is older."""
    try:
        return any(path.stat().st_mtime > began for path in folder.glob("checkpoints/*.new/*"))
    except FileNotFoundError:
        return False


def state_of(folder: Path) -> tuple[int, int]:
    """Steps of the last checkpoint, and whole lines of metrics.jsonl: these must be steps 0, 1, 2 …"""
    saved = sorted(p for p in folder.glob("checkpoints/step-*") if p.suffix != ".new")
    log = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").exists() else b""
    whole = [json.loads(line)["step"] for line in log[: log.rfind(b"\n") + 1].splitlines()]
    assert whole == list(range(len(whole))), f"metrics.jsonl holds the steps {whole}"
    return int(saved[-1].name[5:]) if saved else 0, len(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder, runs = random.Random(args.seed), Path(tempfile.mkdtemp()), 0
    began = time.monotonic()
    assert start("--out", folder / "whole", *SMALL).wait() == 0
    seconds, expected = time.monotonic() - began, end_of(folder / "whole")
    run, writing, repeated = folder / "run", 0, []
    for kill in tqdm(range(args.kills), desc="kills"):
        begun = (run / "config.json").exists()
        began = time.time()
        process = start(*(("--resume", run) if begun else ("--out", run, *SMALL)))
        if kill % 3 == 2:  # in the middle of a checkpoint
            while process.poll() is None and not writes(run, began):
                time.sleep(0.0005)
            writing += process.poll() is None
        else:
            process.poll() or time.sleep(rng.uniform(0, seconds))
        process.kill()
        said = process.stderr.read()
        assert process.wait() in (0, -9), said
        saved, done = state_of(run)
        assert 0 <= done - saved <= 2, f"{done} steps done, {saved} saved: the last two can be lost, no more"
        repeated.append(done - saved)
        if (run / "results.json").exists():
            assert end_of(run) == expected
            shutil.rmtree(run)
            runs += 1
    if run.exists():
        assert (
            start(*(("--resume", run) if (run / "config.json").exists() else ("--out", run, *SMALL))).wait()
            == 0
        )
        assert end_of(run) == expected
        runs += 1
    print(
        f"{args.kills} kills, {writing} of them inside a checkpoint, in {runs} runs: all end as the whole one"
    )
    print(f"steps done again after a kill: mean {sum(repeated) / len(repeated):.1f}, at most {max(repeated)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
