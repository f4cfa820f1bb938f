"""Published benchmarks: their files as samples, a model's replies judged, and the official figures.

    rows = [judge(sample, ask(sample)) for sample in read_samples("pope", path)]
    aggregate("pope", rows)["score"]

Files are VLMEvalKit's tables (a question per row, images in base64) or V*Bench's own folders. They are read
as a stream: of an image only its place in the file is kept, until the sample's images() are called. A row
that cannot be read does not end a benchmark: it is left out, and counts as a wrong reply.
"""

import ast
import base64
import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

from PIL import Image

from evaluation.replies import answer_parts, box_of, choice_of, contains, yes_no
from evaluation.scores import mean, split
from files.errors import UserError
from files.pictures import FORMATS, SUFFIXES, UnusableImage
from reward import Box, iou

Image.MAX_IMAGE_PIXELS = 2**28  # MME-RealWorld has aerial photos beyond Pillow's limit


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and scored, and where it is published: a line of benchmarks.tsv."""

    name: str
    file: str  # name or pattern, or several: "a.tsv or b.tsv"
    kind: str  # choice | yesno | box | string
    source: str  # an address, or a data set of huggingface.co
    over: str  # names of columns: the score is the mean over their groups, nested
    own: str  # glob of the data set's own files, where it has a folder of them
    judged: str  # "yes": officially a model judges the replies, so our score by rules is not comparable


TABLE = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
BENCHMARKS = {row["name"]: Benchmark(**row) for row in csv.DictReader(TABLE, delimiter="\t")}


class BadSample(UserError, UnusableImage):
    """Why a row of a benchmark's file, or an image of it, cannot be read."""


@dataclass
class Sample:
    """One question of a benchmark; `images()` opens its images anew, RGB, at each call."""

    id: str  # unique in its benchmark
    kind: str  # its benchmark's
    question: str  # without the options, where the file has columns for them
    options: dict[str, str]  # letter: text
    answer: str  # a letter, "yes" or "no", or a text
    answers: tuple[str, ...]  # all that are accepted
    row: dict[str, str]  # the cells of the file; V*'s "target" names the object that the question is on
    file_boxes: list[Box]  # as they are in the file
    images: Callable[[], list[Image.Image]] = field(repr=False)
    left_out: bool = False  # set where the images cannot be read

    @cached_property
    def boxes(self) -> list[Box]:
        """Evidence (V*) or target (RefCOCO), in pixels; the file may have shares of the image's sides."""
        is_share = self.kind == "box" and max(self.file_boxes[0]) <= 1.5
        width, height = self.images()[0].size if is_share else (1, 1)
        return [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in self.file_boxes]


# ---------------------------------------------------------------- from files to samples


def read_samples(name: str, path: Path) -> Iterator[Sample]:
    """A benchmark's samples, from its file or the folder of its files; UserError for what cannot be read.

    Rows that cannot be read come last; their images() raise the reason.
    """
    if name not in BENCHMARKS:
        raise UserError(f"{name} is no benchmark: give one of {', '.join(BENCHMARKS)}.")
    benchmark, kind, ids, bad = BENCHMARKS[name], BENCHMARKS[name].kind, set(), []
    for file in [path] if path.is_file() else benchmark_files(benchmark, path):
        cells, number = {}, 1  # image cells by index: rows refer to each other's
        try:
            for number, read_row in file_rows(name, file):
                row = {"pair": str(number // 2)} if name == "mmvp" else {}  # rows 2 and 3 share a question
                try:
                    row |= read_row()
                    cells[row["index"]] = row.get("image", "")
                    if sample := sample_of(name, file, row, cells):
                        if sample.id in ids:
                            raise ValueError(f"{sample.id} occurs twice")
                        ids.add(sample.id)
                        yield sample
                except (LookupError, TypeError, ValueError, SyntaxError, RecursionError) as error:
                    place = f"{file}, row {number}"
                    reason = BadSample(f"{place} cannot be read ({error!r}): download it again.")
                    # Of its answers, (), none can be right.
                    bad.append(Sample(place, kind, "", {}, "", (), row, [], partial(raise_error, reason)))
        except (OSError, csv.Error, ValueError) as error:
            raise UserError(f"{file}, row {number} cannot be read ({error!r}): download it again.") from None
    if bad and not ids:
        bad[0].images()
    if not ids:
        raise UserError(f"{path} has nothing of {name}: get {benchmark.file} from {benchmark.source}.")
    yield from bad


def benchmark_files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """A benchmark's files in a folder: its own, or those of the first of its names that the folder has."""
    own = sorted(folder.glob(benchmark.own)) if benchmark.own else []
    tables, patterns = sorted(folder.glob("[!.]*.tsv")), benchmark.file.lower().split(" or ")
    matches = ([file for file in tables if fnmatch(file.name.lower(), pattern)] for pattern in patterns)
    return own or next(filter(None, matches), [])


def file_rows(name: str, path: Path) -> Iterable[tuple[int, Callable[[], dict[str, str]]]]:
    """Row numbers, and for each row the function that reads its cells."""
    if (name, path.suffix) == ("vstar", ".json"):
        return [(1, partial(vstar_row, path))]
    if (name, path.suffix) == ("babyvision", ".jsonl"):
        lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        return [(number, partial(babyvision_row, line)) for number, line in lines if line.strip()]
    return ((number, partial(tsv_row, cells)) for number, cells in tsv_rows(path))


def raise_error(error: Exception) -> NoReturn:
    raise error


def tsv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Row numbers (the header is row 1) and the cells by column, as csv gives them."""
    image = re.compile(rb"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{4096,}")  # base64: no text has such a long word
    csv.field_size_limit(2**31 - 1)

    def lines() -> Iterator[str]:
        """Each image replaced by its <offset:length> in the file: as text it would be four times as large."""
        start = 0
        with path.open("rb") as file:
            for line in file:
                short = image.sub(lambda m, start=start: b"<%d:%d>" % (start + m.start(), len(m[0])), line)
                yield short.decode("utf-8" if start else "utf-8-sig")
                start += len(line)

    yield from enumerate(csv.DictReader(lines(), delimiter="\t"), 2)


def tsv_row(cells: dict) -> dict[str, str]:
    """The cells that are not empty, by column.

    pandas writes a missing value as an empty cell, or as "nan" among texts; "None" and "NA" are texts.
    """
    if None in cells or None in cells.values():  # so DictReader marks rows of too many or too few cells
        raise ValueError("it does not have as many cells as the header")
    columns = {name.replace("l2_category", "l2-category"): cell.strip() for name, cell in cells.items()}
    return {name: cell for name, cell in columns.items() if cell not in ("", "nan")}


def babyvision_row(line: str) -> dict[str, str]:
    """A line of BabyVision's meta_data.jsonl as a row; the right option is given by its number."""
    item = json.loads(line)
    options = dict(zip(ascii_uppercase, map(str, item.get("options") or [])))
    answer = str(item["blankAns"]) if item["ansType"] == "blank" else list(options)[int(item["choiceAns"])]
    row = {"index": str(item["taskId"]), "answer": answer, "category": item["type"]} | options
    return row | {"image_path": item["image"], "question": item["question"]}


def vstar_row(path: Path) -> dict[str, str]:
    """A JSON file of V*Bench as a row. Its right option comes first, so the file's name shuffles them."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    options = list(content["options"])
    random.Random(path.stem).shuffle(options)
    row = dict(zip(ascii_uppercase, options))
    row["answer"] = ascii_uppercase[options.index(content["options"][0])]
    row |= {"index": f"{path.parent.name}/{path.stem}", "category": path.parent.name}
    row |= {"question": content["question"], "target": " and ".join(content["target_object"])}
    row["boxes"] = json.dumps([(x, y, x + w, y + h) for x, y, w, h in content["bbox"]])
    siblings = (file for file in path.parent.glob("*.*") if file.suffix.lower() in SUFFIXES)
    row["image_path"] = min(file.name for file in siblings if file.stem == path.stem)  # .jpg before .png
    return row


def sample_of(name: str, path: Path, row: dict[str, str], cells: dict[str, str]) -> Sample | None:
    """A row as a sample; None where it has no image (officially left out too) or is of another data set."""
    if not row.keys() & {"image", "image_path"}:
        return None
    benchmark, images = BENCHMARKS[name], partial(read_images, path, row, cells)
    kind, options = benchmark.kind, {}
    if kind == "box":
        row["split"] = row.get("split") or row.get("category") or path.stem
        if re.match(r"[a-z]*\+?", row["split"].lower())[0] != name:
            return None
    question, answer, answers = row["question"], row["answer"], (row["answer"],)
    boxes = [tuple(box) for box in json.loads(row.get("boxes", "[]"))]
    if kind == "choice":
        options, answer = read_options(row)
        if options and answer not in options and not benchmark.judged:
            raise ValueError(f"answer {answer}, options {', '.join(options)}")
    elif kind == "yesno":
        answer = answer.lower()
    elif kind == "string" and answer.startswith("["):
        answers = tuple(map(str, ast.literal_eval(answer)))
    elif kind == "box":
        x1, y1, x2, y2 = map(float, json.loads(answer))
        boxes = [(x1, y1, x2, y2)]
        question = re.sub(r".*<ref>(.*?)</ref>.*", r"\1", question, flags=re.DOTALL)
    sample_id = "/".join([*(row[column] for column in benchmark.over.split()), row["index"]])
    question = (f"{row['hint']}\n" if "hint" in row else "") + question
    return Sample(sample_id, kind, question, options, answer, answers, row, boxes, images)


def read_options(row: dict[str, str]) -> tuple[dict[str, str], str]:
    """The options (letter: text), in columns or a list (MathVision, MME-RealWorld-Lite), and the answer."""
    listed = row.get("choices") or row.get("multi-choice options", "")
    # CV-Bench's lists are printed by NumPy: ['a' 'b'], or array(['a', 'b'], dtype=object).
    listed = re.sub(r"^array\((.*\]).*\)$", r"\1", listed, flags=re.DOTALL)
    listed = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", listed)
    texts = ast.literal_eval(listed) if listed.startswith("[") else []
    texts = dict(zip(ascii_uppercase, texts)) | row
    options = {x: str(texts[x]).removeprefix(f"({x})").strip() for x in ascii_uppercase if x in texts}
    return options, re.sub(r"^[( ]*([A-Za-z])[). ]*$", lambda match: match[1].upper(), row["answer"])


def read_images(path: Path, row: dict[str, str], cells: dict[str, str]) -> list[Image.Image]:
    """A row's images: base64, the index of another row, files beside the table, or a list of these."""
    cell = row.get("image") or row["image_path"]
    if len(cell) <= 64 and "image" in row and cell not in cells and cell[0] not in "<[":
        cells |= {other["index"]: other["image"] or "" for _, other in tsv_rows(path)}  # of a later row
    cell = cells.get(cell, cell)
    try:
        parts = map(str, ast.literal_eval(cell)) if cell.startswith("[") else [cell]
        files = [io.BytesIO(image_bytes(path, part, in_table="image" in row)) for part in parts]
        # Not turned as EXIF says: boxes and official scores refer to the pixels as they are stored.
        return [Image.open(file, formats=FORMATS).convert("RGB") for file in files]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample(f"{path}, index {row['index']}, lacks an image ({error}): get it again.") from None


def image_bytes(path: Path, part: str, in_table: bool) -> bytes:
    """The content of one image file: base64 in the table, or a file in its folder."""
    if not in_table:
        file = (path.parent / part).resolve()
        if not file.is_relative_to(path.parent.resolve()):
            raise ValueError(f"{part} is outside its folder")
        return file.read_bytes()
    encoded = part.rpartition(",")[2]  # after the head of a "data:" address
    if place := re.fullmatch(r"<(\d+):(\d+)>", encoded):
        with path.open("rb") as table:
            table.seek(int(place[1]))
            encoded = table.read(int(place[2]))
    return base64.b64decode(encoded)


# ---------------------------------------------------------------- from replies to figures


def judge(sample: Sample, reply: str, frame: Any = None) -> dict:
    """{"prediction": str or None, "parsed": bool, "right": 0.0 or 1.0}, and for a box its "iou".

    With the cells ("fields") and the "answer" of the sample, by which `aggregate` groups and counts.
    frame: the BoxFrame of the image, where a reply's box is not in its pixels.
    """
    expected, extra = sample.answer, {"fields": sample.row, "answer": sample.answer}
    options = sample.options or dict.fromkeys("ABCDEFGH", "")  # their texts may be part of the question
    if sample.kind == "box":
        box = box_of(reply)
        box = frame.to_pixels(box) if frame and box else box
        extra["iou"] = iou(box, sample.boxes[0]) if box else 0.0
        prediction, right = box and str(list(box)), extra["iou"] >= 0.5
    elif sample.kind == "string":
        prediction = answer_parts(reply)[-1].strip() or None
        right = contains(prediction or "", sample.answers, sample.row.get("category", ""))
    elif sample.kind == "yesno" or expected in options:
        prediction = yes_no(reply) if sample.kind == "yesno" else choice_of(reply, options)
        right = prediction == expected
    else:  # no option: the last line must be the same text, but for case, spaces and punctuation
        last_line = (answer_parts(reply)[0].strip().splitlines() or [""])[-1]
        texts = [re.sub(r"[\s,;$]", "", text).rstrip(".").lower() for text in (last_line, expected)]
        prediction = texts[0] or None
        right = prediction == texts[1]
    return {"prediction": prediction, "parsed": prediction is not None, "right": float(right)} | extra


def groups(rows: list[dict], column: str) -> dict[str, list[dict]]:
    """Rows by their cell of a column, sorted; a row of several categories is in the group of each.

    "popular,random" are two categories, and "Perception/OCR" is itself and "Perception".
    """
    names = [[row["fields"].get(column, "")] for row in rows]
    if column == "category":
        names = [[cell, cell.partition("/")[0]] if "/" in cell else cell.split(",") for (cell,) in names]
    parts = split(rows, ([name.strip() for name in cell] for cell in names))
    return {key: parts[key] for key in sorted(parts) if key}


def accuracy(rows: list[dict], over: Sequence[str] = ()) -> float:
    """Share of right answers in points of 100; with `over`, the mean of the accuracies of its groups."""
    if not over:
        return 100 * mean(row["right"] for row in rows)
    return mean(accuracy(group, over[1:]) for group in groups(rows, over[0]).values())


def right_throughout(rows: list[dict], keys: list) -> float:
    """Share of the groups (rows of the same key) that are right throughout, in points of 100."""
    return 100 * mean(map(min, split([row["right"] for row in rows], zip(keys)).values()))


def pope(rows: list[dict]) -> dict[str, float]:
    """F1 of "yes", for which an unparsed reply is a "no"; a row counts once in each of its categories."""
    categories, figures = groups(rows, "category") or {"all": rows}, {}
    every = [row for row in rows for _ in row["fields"].get("category", "").split(",")]  # without one: once
    for name, group in [("", every), *categories.items()]:
        predicted, true = ([row[key] == "yes" for row in group] for key in ("prediction", "answer"))
        hits = sum(p and t for p, t in zip(predicted, true))
        figures[f"{name} f1".strip()] = 200 * hits / max(1, sum(predicted) + sum(true))
        figures[f"{name} accuracy".strip()] = accuracy(group)
        figures[f"{name} precision".strip()] = 100 * hits / max(1, sum(predicted))
        figures[f"{name} recall".strip()] = 100 * hits / max(1, sum(true))
    return figures | {"score": figures["f1"]}


def hallusion(rows: list[dict]) -> dict[str, float]:
    """Accuracy of questions, and of figures and question groups that are right throughout.

    The paper's 68.0 fits aAcc; VLMEvalKit reports the mean of the three.
    """
    figures, fields = {"aAcc": accuracy(rows)}, [row["fields"] for row in rows]
    ids = [(cells.get("index", "") + "_____").split("_") for cells in fields]  # …_set_figure_question
    for name, place in (("fAcc", 4), ("qAcc", 5)):
        keys = [(cells.get("l2-category"), x[3], x[place]) for cells, x in zip(fields, ids)]
        figures[name] = right_throughout(rows, keys)
    return figures | {"score": figures["aAcc"], "mean": mean(figures.values())}


def mmvp(rows: list[dict]) -> dict[str, float]:
    """Share of the pairs of images whose question is answered right for both; and the plain accuracy."""
    pairs = [row["fields"].get("pair") for row in rows]
    return {"score": right_throughout(rows, pairs), "accuracy": accuracy(rows)}


def aggregate(name: str, rows: list[dict]) -> dict[str, float]:
    """A benchmark's official figures: "score" and its parts in points of 100, n, and parse_rate from 0 to 1.

    rows: those of judge(). "count" is OCRBench's official figure.
    """
    if not rows:
        raise UserError(f"{name} has no judged reply to score: give its file.")
    over = BENCHMARKS[name].over.split()
    figures = {"score": accuracy(rows, over), "count": sum(row["right"] for row in rows), "n": len(rows)}
    figures["parse_rate"] = mean(row["parsed"] for row in rows)
    figures |= {"mean_iou": 100 * mean(row["iou"] for row in rows)} if "iou" in rows[0] else {}
    by_category = {}
    for column in ("category", "l2-category", *over):
        by_category |= {key: accuracy(group, over) for key, group in groups(rows, column).items()}
    figures |= {f"category {key}" if key in figures else key: value for key, value in by_category.items()}
    return figures | {"pope": pope, "hallusionbench": hallusion, "mmvp": mmvp}.get(name, lambda _: {})(rows)


# ---------------------------------------------------------------- to VLMEvalKit


def export_predictions(path: Path, samples: list[Sample], replies: Iterable[tuple]) -> None:
    """A table that VLMEvalKit's evaluate reads: the columns of the file, and each reply without its thoughts.

    replies: (text, BoxFrame) for each sample. Rows that cannot be read are not in the table.
    """
    rows = []
    for sample, (text, frame) in zip(samples, replies, strict=True):
        if not sample.answers:
            continue
        prediction, row = answer_parts(text or "")[-1].strip(), dict(sample.row)
        if sample.kind == "box":  # in shares of the sides; the split is a part of the index
            box = replace(frame, width=1, height=1).to_pixels(box_of(text or "") or (0, 0, 0, 0))
            prediction = str([min(1.0, max(0.0, share)) for share in box])
            row["index"] = f"{row['split'].replace(' ', '_')}_{row['index']}"
        # The space keeps pandas from reading an empty reply, or "None", as a missing one.
        rows.append(row | {"prediction": prediction + " "})
    left_out = ("image", "image_path", "pair")
    columns = dict.fromkeys(name for row in rows for name in row if name not in left_out)
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictWriter(file, columns, "", "ignore", delimiter="\t", quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(rows)
