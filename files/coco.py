"""COCO's annotations: whatever cannot be used is left out and counted by its reason, and never ends a run."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from files.errors import UserError, require_file
from files.pictures import LEAST_SIDE, NARROWEST, LeftOut, in_split
from reward import Box


class AnnotatedObject(NamedTuple):
    """One object in an image. A tuple, because COCO has 600,000 of them."""

    name: str  # of the image's file
    size: tuple[int, int]  # width and height of the image in pixels, as annotated
    box: Box  # in pixels of the image
    text: str | None  # a description that fits no other object in the image


def read_input(flag: str, path: Path | None, description: str, parse: Callable[[str], Any]) -> Any:
    """The file that a flag names, through `parse`; UserError where it is missing or not what it should be.

    description: what the file should be. Without a path, `parse` gets an empty text.
    """
    require_file(f"--{flag}", path)
    try:
        return parse(path.read_text(encoding="utf-8-sig") if path else "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--{flag} {path} is not a {description} ({error!r}): give one.") from None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for a NaN too


def photo_problem(photo: Any, photos: dict) -> str:
    """Why an entry of COCO's `images` cannot be used, or "". photos: the entries before it, by id."""
    if not isinstance(photo, dict) or not isinstance(photo.get("id"), int | str):
        return "without an id"
    name, size = photo.get("file_name"), (photo.get("width"), photo.get("height"))
    if photo["id"] in photos:
        return "with an id that occurs twice"
    if not isinstance(name, str) or not all(is_number(side) and side == int(side) for side in size):
        return "without a name, width and height"
    # On any system, a name may be neither absolute nor lead out of the folder.
    if any(".." in kind(name).parts or kind(name).anchor for kind in (PurePosixPath, PureWindowsPath)):
        return "outside their folder"
    return "too small or narrow" if min(size) < LEAST_SIDE or max(size) > NARROWEST * min(size) else ""


def box_problem(row: Any, photos: dict, rows: dict) -> str:
    """Why an annotation (image id, category id, id, is crowd, box) cannot be used, or "".

    photos: name and size of each usable image, by id; rows: the usable annotations before it, by id.
    """
    if not isinstance(row, list) or not all(isinstance(value, int | str | None) for value in row[:3]):
        return "without a box"
    image_id, _, annotation_id, _, box = row
    if annotation_id in rows:
        return "with an id that occurs twice"
    if image_id not in photos:
        return "without a usable image"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "with a box that is not four numbers"
    (x, y, w, h), (width, height) = box, photos[image_id][1]
    if w <= 0 or h <= 0:
        return "with an empty or inverted box"
    return "with a box outside the image" if x >= width or y >= height or x + w <= 0 or y + h <= 0 else ""


def index_coco(
    text: str, name: str, split: str, excluded: set[int], texts: dict[str, str], need_text: bool
) -> tuple[list[AnnotatedObject], list[LeftOut]]:
    """The objects in COCO's instances JSON that cues of a split can show, and what is left out.

    text, name: of the JSON file. excluded: ids of images to leave out. texts: descriptions by annotation id;
    other objects are described by their category if it occurs once in the image. need_text: leave out
    objects without a description.
    """
    # Of an annotation only these values are kept: the polygons, most of the file, are dropped while parsing.
    keys = ("image_id", "category_id", "id", "iscrowd", "bbox")
    data = json.loads(text, object_hook=lambda row: [row.get(key) for key in keys] if "bbox" in row else row)
    left_out = [LeftOut(f"{part} in {name}", len(data[part])) for part in ("images", "annotations")]
    photos, rows, objects = {}, {}, []
    for photo in data["images"]:
        if problem := photo_problem(photo, photos):
            left_out[0].add(problem)
        else:
            photos[photo["id"]] = photo["file_name"], (int(photo["width"]), int(photo["height"]))
    for row in data["annotations"]:
        if problem := box_problem(row, photos, rows):
            left_out[1].add(problem)
        else:
            # Ids are optional: a row without one gets a key that no other row has.
            rows[object() if row[2] is None else row[2]] = row
    category_names = {category["id"]: category["name"] for category in data["categories"]}
    # A category describes an object only if no other object of the image, crowds included, has it too.
    category_counts = Counter((image_id, category_id) for image_id, category_id, *_ in rows.values())
    for image_id, category_id, annotation_id, is_crowd, (x, y, w, h) in rows.values():
        is_unique = category_counts[image_id, category_id] == 1
        description = texts.get(str(annotation_id), category_names.get(category_id) if is_unique else None)
        reasons = {"crowds": is_crowd, "excluded": image_id in excluded}
        reasons["of the other split"] = not in_split(image_id, split, 50)
        reasons["without a text"] = need_text and not description
        if reason := next(filter(reasons.get, reasons), None):  # the first that applies
            left_out[1].add(reason, on_purpose=True)
        else:
            objects.append(AnnotatedObject(*photos[image_id], (x, y, x + w, y + h), description))
    return objects, left_out
