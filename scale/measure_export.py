"""The speed of the export, and that its memory does not grow with the number of rows.

    python -m scale.measure_export [--rows 1000 4000] [--photos 1000] [--boxes 20000]

Photos of 640 × 480, at most 1,000 of them as files; with more --photos, several entries name the same file.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from files.errors import FlagParser, exit_on_error
from scale import export
from scale.measure import in_new_process, peak_memory

SIZE, FILES = (640, 480), 1000
HEADER = "| format | rows a second | of processor time | memory of few, many rows | kB a row |"


def write_corpus(folder: Path, photos: int, boxes: int) -> None:
    """JPEGs with some texture, and COCO annotations with the range of box sizes that COCO has."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(min(photos, FILES)):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
    photo = {"width": SIZE[0], "height": SIZE[1]}
    images = [photo | {"id": i, "file_name": f"{i % FILES}.jpg"} for i in range(photos)]
    sides = 2 ** rng.uniform(4, 8, (boxes, 2))
    corners = rng.random((boxes, 2)) * (SIZE - sides)
    numbered = enumerate(np.hstack([corners, sides]).tolist())
    annotations = [{"id": i, "image_id": i % photos, "category_id": 1, "bbox": box} for i, box in numbered]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(content))


def measure(folder: Path, engine: str, rows: int) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak memory in GB of a process that exports this number of rows."""
    flags = ["--format", engine, "--frame", "resized", "--limit", str(rows), "--data", "coco"]
    files = ["--annotations", f"{folder}/instances.json", "--images", f"{folder}/images"]
    sys.argv[1:] = [f"{folder}/{engine}-{rows}", *flags, *files]
    start = time.perf_counter()
    export.main()
    return time.perf_counter() - start, time.process_time(), peak_memory()


def measure_format(folder: Path, engine: str, rows: tuple[int, int]) -> str:
    """A row of the table. The speed is that of the rows by which a large export exceeds a small one."""
    small, large = (in_new_process(measure, folder, engine, limit) for limit in rows)
    wall, processor = ((rows[1] - rows[0]) / (large[i] - small[i]) for i in range(2))
    files = (folder / f"{engine}-{rows[1]}").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file()) / rows[1] / 1e3
    return f"| {engine} | {wall:.0f} | {processor:.0f} | {small[2]:.2f}, {large[2]:.2f} GB | {size:.1f} |"


def main() -> None:
    parser = FlagParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs=2, default=(1000, 4000))
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--boxes", type=int, default=20_000)
    args = parser.parse_args()
    with exit_on_error(), tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), args.photos, args.boxes)
        rows = [measure_format(Path(name), engine, args.rows) for engine in ("easyr1", "trl")]
    print(HEADER, "|---" * 5 + "|", *rows, sep="\n")


if __name__ == "__main__":
    main()
