"""Rows as paper/reproduce.py leaves them, with answers drawn by chance instead of trained ones."""

import gzip
import json
import random
from pathlib import Path

from paper import verdicts
from tiny.scenes import KINDS, SIDES

ROOT = Path(__file__).parents[1]
N = 60  # samples of a list


def draw_row(seed: str, protocol_sha256: str, entry: dict, gain: float) -> dict:
    """The content of a row's file; gain: how much more often its answers are right than the base's."""
    rng = random.Random(seed)
    tasks = ["questions", "suppressed"] if entry["flags"].get("steps") == 0 else ["questions"]
    names = [f"{task}_{kind}_{size}" for task in tasks for kind in KINDS for size in SIDES]
    names += [f"{task}_{size}" for task in ("cue", "find") for size in ("tiny", "small")]
    if entry.get("twins"):
        names += [f"twins_{test}_{size}" for test in verdicts.TWIN_TESTS for size in ("tiny", "small")]
    samples = {name: [float(rng.random() < 0.5 + gain) for _ in range(N)] for name in names}
    kl = dict.fromkeys(("cue", "find", "questions", "all"), gain)
    row = {"samples": samples, "kl": kl, "curve": [0.1, 0.2], "seconds": 7}
    return row | {"versions": {"torch": "2"}, "protocol": protocol_sha256}


def write_row(path: Path, row: dict) -> None:
    path.write_bytes(gzip.compress(json.dumps(row).encode(), mtime=0))


def draw_rows(folder: Path) -> None:
    """protocol.json, and samples/ of every row on two bases, three seeds for those with a claim."""
    protocol = verdicts.read_json(ROOT / "paper" / "protocol.json") | {"steps": 2}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    (folder / "samples").mkdir()
    for base, name, seed in verdicts.plan(protocol):
        entry, gain = protocol["rows"][name], {"LOCUS": 0.4, "random crop": 0.39}.get(name, 0.1)
        sha256 = verdicts.sha256(folder / "protocol.json")
        row = draw_row(f"{base}/{name}/{seed}", sha256, entry, 0.0 if name == verdicts.BASE else gain)
        write_row(verdicts.sample_file(folder, base, name, seed), row)
