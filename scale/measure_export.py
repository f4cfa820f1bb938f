"""How fast the export is, and that its memory does not grow with its rows.

    python -m scale.measure_export [--rows 1000 4000] [--photos 1000] [--boxes 20000]

Photos of 640 × 480 of which 1,000 are files; with more --photos, several entries name the same file.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE, FILES = (640, 480), 1000


def write_corpus(folder: Path, photos: int, boxes: int) -> None:
    """JPEGs with some texture, and annotations of COCO's form with boxes of COCO's range of sizes."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(min(photos, FILES)):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
    width, height = SIZE
    entry = {"width": width, "height": height}
    images = [entry | {"id": i, "file_name": f"{i % FILES}.jpg"} for i in range(photos)]
    draw, annotations = random.Random(0), []
    for i in range(boxes):
        w, h = (2 ** draw.uniform(4, 8) for _ in range(2))
        box = [draw.uniform(0, width - w), draw.uniform(0, height - h), w, h]
        annotations.append({"id": i, "image_id": i % photos, "category_id": 1, "iscrowd": 0, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "none.txt").write_text("")


def export(folder: Path, engine: str, rows: int) -> tuple[float, float, float]:
    """Seconds, processor time and peak memory in GB of `python -m scale.export` of so many rows."""
    files = ["--annotations", folder / "instances.json", "--images", folder / "images"]
    where = [folder / f"{engine}-{rows}", "--data", "coco", *files, "--exclude", folder / "none.txt"]
    what = ["--format", engine, "--frame", "resized", "--limit", str(rows)]
    command = [sys.executable, "-m", "scale.export", *where, *what]
    began, quiet = time.perf_counter(), subprocess.DEVNULL
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=quiet, stderr=quiet)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"The export failed: {' '.join(map(str, command))}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs=2, default=(1000, 4000))
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--boxes", type=int, default=20_000)
    args = parser.parse_args()
    few, many = args.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, args.photos, args.boxes)
        print("| format | rows a second | of processor time | memory of few, many rows | kB a row |")
        print("|---|---|---|---|---|")
        for engine in ("easyr1", "trl"):
            early, late = (export(folder, engine, rows) for rows in (few, many))
            files = (folder / f"{engine}-{many}").rglob("*")
            kb = sum(p.stat().st_size for p in files if p.is_file()) / many / 1e3
            speeds = " | ".join(f"{(many - few) / (late[i] - early[i]):.0f}" for i in range(2))
            print(f"| {engine} | {speeds} | {early[2]:.2f}, {late[2]:.2f} GB | {kb:.1f} |", flush=True)


if __name__ == "__main__":
    main()
