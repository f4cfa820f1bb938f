"""COCO's annotations as they are found: whatever cannot be used is left out and counted, never fatal."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from files.errors import UserError
from files.pictures import LEAST_SIDE, NARROWEST, LeftOut, in_split
from reward import Box


def read(flag: str, path: Path | None, what: str, parse: Callable[[str], Any]) -> Any:
    """A user's file through `parse`, with one sentence where it is missing or something else."""
    try:
        return parse(path.read_text(encoding="utf-8-sig") if path else "")
    except OSError as error:
        raise UserError(f"--{flag} {path} cannot be read ({error.strerror}): give a {what}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"--{flag} {path} is no {what} ({error!r}): give one.") from None


@dataclass(frozen=True)
class Annotated:
    """An object in a photo: box in the photo's pixels; words where they can mean nothing else in it."""

    name: str
    size: tuple[int, int]
    box: Box
    text: str | None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # false of a NaN too


def photo_problem(photo: Any, photos: dict) -> str:
    """Why an entry of `images` is of no use; empty if it is of use."""
    if not isinstance(photo, dict) or not isinstance(photo.get("id"), int | str):
        return "without an id"
    name, size = photo.get("file_name"), (photo.get("width"), photo.get("height"))
    if photo["id"] in photos:
        return "whose id stands twice"
    if not isinstance(name, str) or not all(is_number(side) and side == int(side) for side in size):
        return "without name, width and height"
    if any(".." in kind(name).parts or kind(name).anchor for kind in (PurePosixPath, PureWindowsPath)):
        return "outside their folder"
    return "too small or narrow" if min(size) < LEAST_SIDE or max(size) > NARROWEST * min(size) else ""


def box_problem(row: Any, photos: dict, seen: set) -> str:
    """Why an annotation (image id, category, id, is crowd, box) is of no use; empty if it is of use."""
    if not isinstance(row, list) or not all(isinstance(v, int | str | None) for v in row[:3]):
        return "without a box"
    image_id, _, number, _, box = row
    if number is not None and number in seen:
        return "whose id stands twice"
    if image_id not in photos:
        return "without an image that can be used"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "that are not four numbers"
    (x, y, w, h), (width, height) = box, photos[image_id][1]
    if w <= 0 or h <= 0:
        return "empty or inverted"
    return "outside their image" if x >= width or y >= height or x + w <= 0 or y + h <= 0 else ""


def index_coco(text: str, name: str, split: str, excluded: set[int], texts: dict, need_text: bool):
    """Annotated objects to draw from, and what is left out, from the text of COCO's instances JSON."""
    # Of an annotation only this is kept; its polygons go as soon as they are read.
    keys = ("image_id", "category_id", "id", "iscrowd", "bbox")
    data = json.loads(text, object_hook=lambda d: [d.get(key) for key in keys] if "bbox" in d else d)
    left_out = [LeftOut(f"{what} in {name}", len(data[what])) for what in ("images", "annotations")]
    photos, boxes, rows, seen = {}, [], [], set()
    for photo in data["images"]:
        if why := photo_problem(photo, photos):
            left_out[0].add(why)
        else:
            photos[photo["id"]] = photo["file_name"], (int(photo["width"]), int(photo["height"]))
    for row in data["annotations"]:
        if why := box_problem(row, photos, seen):
            left_out[1].add(why)
        else:
            seen.add(row[2])
            rows.append(row)
    names = {kind["id"]: kind["name"] for kind in data["categories"]}
    alike = Counter((row[0], row[1]) for row in rows)
    for image_id, kind, number, crowd, (x, y, w, h) in rows:
        words = texts.get(str(number), names.get(kind) if alike[image_id, kind] == 1 else None)
        reasons = {
            "crowds": crowd,
            "excluded": image_id in excluded,
            "of the other split": not in_split(image_id, split, 50),
            "without a text": need_text and not words,
        }
        if any(reasons.values()):
            left_out[1].add(next(reason for reason, holds in reasons.items() if holds), on_purpose=True)
        else:
            boxes.append(Annotated(*photos[image_id], (x, y, x + w, y + h), words))
    return boxes, left_out
