"""Published benchmarks: their files as samples, a model's replies as answers, answers as official figures.

    rows = [judge(s, ask(s)) | {"fields": s.fields, "answer": s.answer} for s in read_samples("pope", path)]
    aggregate("pope", rows)["score"]

Files are VLMEvalKit's tables (a question a line, pictures in base64) and V*Bench's own folders, read as a
stream: of a picture only its place in the file is kept, until the sample's images() are called.
"""

import ast
import base64
import csv
import io
import json
import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.replies import box_of, choice_of, contains, parts, yes_no
from evaluation.scores import mean
from files.errors import UserError
from files.pictures import FORMATS
from reward import Box, iou

Image.MAX_IMAGE_PIXELS = 2**28  # MME-RealWorld has aerial pictures over Pillow's limit


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and scored, and where it is published."""

    kind: str  # choice | yesno | box | string
    file: str  # name or pattern
    source: str = "opencompass.openxlab.space/utils/VLMEval"  # or a data set of huggingface.co
    over: tuple[str, ...] = ()  # the score is the mean over the groups of these columns, one inside the other
    judged: bool = False  # officially a model judges the replies: ours is a `rule` score, not to be compared


MME = "yifanzhang114/MME-RealWorld-Base64"
REFCOCO = Benchmark("box", "RefCOCO*.tsv", "mjuicem/RefCOCO-VLMEvalKit", over=("split",))
BENCHMARKS = {
    "vstar": Benchmark("choice", "VStarBench.tsv", "craigwu/vstar_bench (folders), xjtupanda/VStar_Bench"),
    "hrbench4k": Benchmark("choice", "hr_bench_4k.tsv", "DreamMr/HR-Bench", over=("cycle_category",)),
    "hrbench8k": Benchmark("choice", "hr_bench_8k.tsv", "DreamMr/HR-Bench", over=("cycle_category",)),
    "cvbench": Benchmark("choice", "CV-Bench-?D.tsv", over=("split", "source")),
    "cvbench2d": Benchmark("choice", "CV-Bench-2D.tsv", over=("split", "source")),
    "cvbench3d": Benchmark("choice", "CV-Bench-3D.tsv", over=("split", "source")),
    "mme_realworld": Benchmark("choice", "MME-RealWorld.tsv", MME),
    "mme_realworld_lite": Benchmark("choice", "mme_realworld_lite.tsv", MME),
    "mmstar": Benchmark("choice", "MMStar.tsv"),
    "realworldqa": Benchmark("choice", "RealWorldQA.tsv"),
    "ai2d": Benchmark("choice", "AI2D_TEST.tsv"),
    "pope": Benchmark("yesno", "POPE.tsv"),
    "hallusionbench": Benchmark("yesno", "HallusionBench.tsv"),
    "ocrbench": Benchmark("string", "OCRBench.tsv"),
    "refcoco": REFCOCO,
    "refcoco+": REFCOCO,
    "refcocog": REFCOCO,
    "babyvision": Benchmark("choice", "BabyVision.tsv", judged=True),
    "mathvision": Benchmark("choice", "MathVision.tsv", judged=True),
    "mathverse": Benchmark("choice", "MathVerse_MINIV.tsv", judged=True),
    "wemath": Benchmark("choice", "WeMath.tsv", judged=True),
    "logicvista": Benchmark("choice", "LogicVista.tsv", judged=True),
}


@dataclass
class Sample:
    """One question; `images()` opens its pictures anew, RGB, at every call."""

    id: str  # unique in its benchmark
    kind: str  # Benchmark's
    question: str  # without the options, where the file has columns for them
    options: dict[str, str]  # letter: text
    answer: str  # a letter, "yes" or "no", or a text
    answers: tuple[str, ...]  # all that are accepted
    fields: dict[str, str]  # short columns: what a metric groups by
    boxes: list[Box]  # evidence (V*) or target (RefCOCO), in pixels of the image
    target: str  # V*: the object in question
    images: Callable[[], list[Image.Image]] = field(repr=False)


def read_samples(name: str, path: Path) -> Iterator[Sample]:
    """A benchmark's samples, from its file or a folder that holds its files (or V*Bench's own folders)."""
    if name not in BENCHMARKS:
        raise UserError(f"{name} is no benchmark: give one of {', '.join(BENCHMARKS)}.")
    wanted = BENCHMARKS[name].file
    files = [file for file in path.glob("*.tsv") if fnmatch(file.name.lower(), wanted.lower())]
    if name == "vstar":
        files = [*path.glob("direct_attributes/*.json"), *path.glob("relative_position/*.json")] or files
    seen = set()
    for file in [path] if path.is_file() else sorted(files):
        cells, number = {}, 1  # cells of pictures, by index: rows name each other's
        try:
            for number, row in vstar_row(file) if file.suffix == ".json" else tsv_rows(file):  # noqa: B007
                cells[row["index"]] = row.get("image", "")
                if sample := sample_of(name, file, row, cells):
                    if sample.id in seen:
                        raise ValueError(f"{sample.id} stands twice")
                    seen.add(sample.id)
                    yield sample
        except (OSError, csv.Error, LookupError, TypeError, ValueError, SyntaxError, RecursionError) as error:
            raise UserError(f"{file}, row {number} cannot be read ({error!r}): download it again.") from None
    if not seen:
        raise UserError(f"{path} has nothing of {name}: get {wanted} from {BENCHMARKS[name].source}.")


def tsv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Row numbers (the header is row 1) and the cells that are not empty, by column.

    pandas writes a missing value as an empty cell, or "nan" where it was a text; "None" and "NA" are texts.
    """
    picture = re.compile(rb"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{4096,}")  # base64; no text has such a word
    csv.field_size_limit(2**31 - 1)

    def lines() -> Iterator[str]:
        """Pictures replaced by <offset:length> in the file: csv would take four bytes for each of theirs."""
        start = 0
        with path.open("rb") as file:
            for line in file:
                short = picture.sub(lambda m, at=start: b"<%d:%d>" % (at + m.start(), len(m[0])), line)
                yield short.decode("utf-8" if start else "utf-8-sig")
                start += len(line)

    reader = csv.reader(lines(), delimiter="\t")
    header = [column.replace("l2_category", "l2-category") for column in next(reader, [])]
    for number, cells in enumerate(reader, 2):
        if len(cells) not in (0, len(header)):
            raise ValueError(f"{len(cells)} cells of {len(header)} in row {number}")
        if cells:
            yield number, {c: v.strip() for c, v in zip(header, cells) if v.strip() not in ("", "nan")}


def vstar_row(note: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """V*Bench's note on a picture as a row; its right option stands first: the file's name shuffles them."""
    content = json.loads(note.read_text(encoding="utf-8-sig"))
    options = list(content["options"])
    random.Random(note.stem).shuffle(options)
    row = dict(zip(string.ascii_uppercase, options))
    row["answer"] = string.ascii_uppercase[options.index(content["options"][0])]
    row |= {"index": f"{note.parent.name}/{note.stem}", "category": note.parent.name}
    row |= {"question": content["question"], "target": " and ".join(content["target_object"])}
    row["boxes"] = json.dumps([(x, y, x + w, y + h) for x, y, w, h in content["bbox"]])
    (row["image_path"],) = (f.name for f in note.parent.glob("*.*") if f.stem == note.stem and f != note)
    yield 1, row


def sample_of(name: str, path: Path, row: dict[str, str], cells: dict[str, str]) -> Sample | None:
    """A row as a sample; None where it has no picture (officially left out too) or is of another data set."""
    if not row.keys() & {"image", "image_path"}:
        return None
    benchmark, answer, boxes = BENCHMARKS[name], row["answer"], json.loads(row.get("boxes", "[]"))
    used = {"image", "image_path", "question", "answer", "boxes", *string.ascii_uppercase}
    fields = {column: cell for column, cell in row.items() if column not in used and len(cell) <= 100}
    images, answers, options = partial(pictures, path, row, cells), (answer,), {}
    if benchmark.kind == "box":
        fields["split"] = row.get("split") or row.get("category") or path.stem
        if re.match(r"[a-z]*\+?", fields["split"].lower())[0] != name:
            return None
        x1, y1, x2, y2 = json.loads(answer)
        w, h = images()[0].size if max(x1, y1, x2, y2) <= 1.5 else (1, 1)  # published as shares of the sides
        boxes = [(x1 * w, y1 * h, x2 * w, y2 * h)]
    elif benchmark.kind == "yesno":
        answer = answer.lower()
    elif benchmark.kind == "string" and answer.startswith("["):
        answers = tuple(map(str, ast.literal_eval(answer)))
    elif benchmark.kind == "choice":
        listed = row.get("choices") or row.get("multi-choice options", "")  # MathVision, MME-RealWorld-Lite
        texts = ast.literal_eval(listed) if listed.startswith("[") else []
        texts = dict(zip(string.ascii_uppercase, texts)) | row
        texts = {letter: str(texts[letter]) for letter in string.ascii_uppercase if letter in texts}
        options = {letter: text.removeprefix(f"({letter})").strip() for letter, text in texts.items()}
        answer = re.sub(r"^[( ]*([A-Za-z])[). ]*$", lambda match: match[1].upper(), answer)
        if options and answer not in options and not benchmark.judged:
            raise ValueError(f"answer {answer}, options {', '.join(options)}")
    identity = "/".join([*(fields[column] for column in benchmark.over), row["index"]])
    question = (f"{row['hint']}\n" if "hint" in row else "") + row["question"]
    boxes, target = [tuple(box) for box in boxes], row.get("target", "")
    return Sample(identity, benchmark.kind, question, options, answer, answers, fields, boxes, target, images)


def pictures(path: Path, row: dict[str, str], cells: dict[str, str]) -> list[Image.Image]:
    """A row's pictures: base64, another row's index, files beside the table, or a list of these."""
    cell, out = row.get("image") or row["image_path"], []
    if len(cell) <= 64 and "image" in row and cell not in cells and cell[0] not in "<[":
        cells |= {other["index"]: other.get("image", "") for _, other in tsv_rows(path)}  # it comes later
    cell = cells.get(cell, cell)
    try:
        with path.open("rb") as table:
            for part in map(str, ast.literal_eval(cell)) if cell.startswith("[") else [cell]:
                if "image" not in row:
                    file = (path.parent / part).resolve()
                    if not file.is_relative_to(path.parent.resolve()):
                        raise ValueError(f"{part} is outside its folder")
                    data = file.read_bytes()
                elif place := re.fullmatch(r"<(\d+):(\d+)>", part.rpartition(",")[2]):
                    table.seek(int(place[1]))
                    data = base64.b64decode(table.read(int(place[2])))
                else:
                    data = base64.b64decode(part.rpartition(",")[2])  # behind the head of a "data:" address
                # Not turned as EXIF says: boxes and official scores refer to the pixels as stored.
                out.append(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}, index {row['index']}, lacks a picture ({error}): get it again.") from None
    return out


def judge(sample: Sample, reply: str, frame: Any = None) -> dict:
    """{"prediction": str or None, "parsed": bool, "right": 0.0 or 1.0}, and for a box its "iou".

    frame: the BoxFrame of the image that was shown, where a reply's box is not in its pixels.
    """
    extra, expected = {}, sample.answer
    if sample.kind == "box":
        box = box_of(reply)
        box = frame.to_pixels(box) if frame and box else box
        extra, prediction = {"iou": iou(box, sample.boxes[0]) if box else 0.0}, box and str(list(box))
        right = extra["iou"] >= 0.5
    elif sample.kind == "string":
        prediction = parts(reply)[-1].strip() or None
        right = contains(prediction or "", sample.answers, sample.fields.get("category", ""))
    else:
        if sample.kind == "yesno":
            prediction = yes_no(reply)
        elif expected in (options := sample.options or dict.fromkeys("ABCDEFGH", "")):
            prediction = choice_of(reply, options)  # without texts where they stand in the question
        else:  # a free answer has to be the same text
            lines = parts(reply)[0].strip().splitlines()
            both = [re.sub(r"[\s,;$]", "", text).rstrip(".").lower() for text in (*lines[-1:], expected)]
            prediction, expected = (both[0] or None) if lines else None, both[-1]
        right = prediction == expected
    return {"prediction": prediction, "parsed": prediction is not None, "right": float(right)} | extra


def groups(rows: list[dict], column: str) -> dict[str, list[dict]]:
    """Rows by what stands in a column; of several categories ("popular,random", "Perception/OCR") in each."""
    out = defaultdict(list)
    for row in rows:
        cell = row["fields"].get(column, "")
        keys = [cell, cell.partition("/")[0]] if "/" in cell else cell.split(",")
        for key in keys if column == "category" else [cell]:
            out[key.strip()].append(row)
    return {key: out[key] for key in sorted(out) if key}


def accuracy(rows: list[dict], over: tuple[str, ...] = ()) -> float:
    """Share of right answers in points of 100; `over` columns, the mean of the groups' own."""
    if not over:
        return 100 * mean(row["right"] for row in rows)
    return mean(accuracy(group, over[1:]) for group in groups(rows, over[0]).values())


def pope(rows: list[dict]) -> dict[str, float]:
    """F1 of "yes", for which an unparsed reply is a "no"; a row counts once in each of its categories."""
    named, out = groups(rows, "category") or {"all": rows}, {}
    for name, group in [("", [row for key in named for row in named[key]]), *named.items()]:
        said, true = ([row[key] == "yes" for row in group] for key in ("prediction", "answer"))
        hits = sum(s and t for s, t in zip(said, true))
        out[f"{name} f1".strip()] = 200 * hits / max(1, sum(said) + sum(true))
        out[f"{name} accuracy".strip()] = accuracy(group)
        out[f"{name} precision".strip()] = 100 * hits / max(1, sum(said))
        out[f"{name} recall".strip()] = 100 * hits / max(1, sum(true))
    return out | {"score": out["f1"]}


def hallusion(rows: list[dict]) -> dict[str, float]:
    """The paper's 68.0 fits aAcc; VLMEvalKit's is the mean with figures and questions that are all right."""
    out = {"aAcc": accuracy(rows)}
    for name, place in (("fAcc", 4), ("qAcc", 5)):  # an index ends in _set_figure_question
        whole = defaultdict(list)
        for row in rows:
            ids = row["fields"]["index"].split("_")
            whole[row["fields"].get("l2-category"), ids[3], ids[place]].append(row["right"])
        out[name] = 100 * mean(min(right) for right in whole.values())
    return out | {"score": out["aAcc"], "mean": mean(out.values())}


def aggregate(name: str, rows: list[dict]) -> dict[str, float]:
    """A benchmark's official figures: "score" and its parts in points of 100, n, and parse_rate from 0 to 1.

    rows: judge()'s, with the samples' "fields" and "answer". Of OCRBench "count" is the official one.
    """
    if not rows:
        raise UserError(f"{name} has no answered sample to score: give its file.")
    over = BENCHMARKS[name].over
    out = {"score": accuracy(rows, over), "count": sum(row["right"] for row in rows), "n": len(rows)}
    out["parse_rate"] = mean(row["parsed"] for row in rows)
    out |= {"mean_iou": 100 * mean(row["iou"] for row in rows)} if "iou" in rows[0] else {}
    for column in ("category", "l2-category", *over):
        out |= {key: accuracy(group, over) for key, group in groups(rows, column).items()}
    return out | {"pope": pope, "hallusionbench": hallusion}.get(name, lambda _: {})(rows)
