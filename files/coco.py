"""COCO's annotations: whatever cannot be used is left out and counted by its reason, and never ends a run."""

import gzip
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from files.errors import UserError, require_file
from files.pictures import LEAST_SIDE, NARROWEST, LeftOut, UnusableImage, in_split, is_turned, warn_once
from reward import Box

KEYS = ("image_id", "category_id", "id", "iscrowd", "bbox")  # the values of an annotation that are used
NOT_IN_ANNOTATIONS = {"file_name", "coco_url", "name", "images", "annotations"}
NOT_A_CROWD = ("0", "0.0", "false", "none", "")
UNREADABLE = (KeyError, TypeError, AttributeError, RecursionError, EOFError, zlib.error)  # on a bad file
YOLO_OR_VOC = "convert YOLO or VOC labels with Datumaro: datum convert -if yolo -i DIR -f coco_instances"
REMEDIES = {"annotations": f"give one in UTF-8, or {YOLO_OR_VOC}"}


class AnnotatedObject(NamedTuple):
    """One object in an image. A tuple, because COCO has 600,000 of them."""

    name: str  # of the image's file
    size: tuple[int, int]  # width and height of the image in pixels, as annotated
    box: Box  # in pixels of the image
    text: str | None  # a description that fits no other object in the image


def read_input(flag: str, path: Path | None, description: str, parse: Callable[[str], Any]) -> Any:
    """The file that a flag names, through `parse`; UserError where it is missing or not what it should be.

    description: what the file should be. Without a path, `parse` gets an empty text. The file may be gzipped,
    and its text UTF-8, UTF-16 or UTF-32; any other encoding would have to be guessed, and names with it.
    """
    require_file(f"--{flag}", path)
    try:
        content = path.read_bytes() if path else b""
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        return parse(content.decode(json.detect_encoding(content)))
    except (*UNREADABLE, OSError, ValueError) as error:
        # Cut, so that the message never repeats the content of the file.
        reason = str(error if isinstance(error, ValueError) else repr(error))[:99]
        remedy = REMEDIES.get(flag, "give one in UTF-8")
        raise UserError(f"--{flag} {path} is not a {description} ({reason}): {remedy}.") from None


# ---------------------------------------------------------------- values as exporters write them


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for a NaN too


def as_number(value: Any) -> Any:
    """The number that a text holds; whatever is no such text stays as it is.

    >>> as_number("12.5"), as_number(7), as_number("wide")
    (12.5, 7, 'wide')
    """
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def whole_id(value: Any) -> Any:
    """An id that is written as 285.0 is 285; any other stays as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def id_key(value: int | str) -> int | str:
    """What --exclude compares: "000000000285" and 285 are the same id.

    >>> id_key("000000000285"), id_key(285), id_key("a7")
    (285, 285, 'a7')
    """
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 99 else value


def parse_ids(text: str) -> set[int | str]:
    """The ids of --exclude; ValueError where the text is JSON or a table."""
    if marks := set(text) & set('[]{}",;'):
        raise ValueError(f"it holds {min(marks)}, but should hold one id a line")
    return set(map(id_key, text.split()))


def compact(entry: dict) -> dict | list:
    """An annotation as the list of its values of KEYS, any other JSON object as it is.

    Of an annotation only these values are kept: the polygons, most of the file, are dropped while parsing.
    """
    is_annotation = "bbox" in entry and NOT_IN_ANNOTATIONS.isdisjoint(entry)
    return [entry.get(key) for key in KEYS] if is_annotation else entry


def parse_instances(text: str) -> dict[str, Any]:
    """COCO's instances JSON with compact annotations; ValueError where a part of it is missing."""
    data = json.loads(text, object_hook=compact)
    if not isinstance(data, dict):
        raise ValueError('it is a list, as results are, and has no "images"')
    if missing := [key for key in ("images", "annotations") if not isinstance(data.get(key), list)]:
        raise ValueError(f'it has no list "{missing[0]}"')
    return data


# ---------------------------------------------------------------- images


def leads_out(name: str) -> bool:
    """Whether a name leads out of its folder, or is absolute, on any system."""
    return any(".." in kind(name).parts or kind(name).anchor for kind in (PurePosixPath, PureWindowsPath))


def last_part(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def name_of(photo: Any) -> Any:
    """The file name of an entry of COCO's `images`; LVIS has none: there, the last part of the address is."""
    entry = photo if isinstance(photo, dict) else {}
    return entry.get("file_name") or last_part(str(entry.get("coco_url", "")))


def find_name(name: str, folder: Path | None, is_unique: bool = True) -> str:
    """The name of an image below its folder, where exporters write other folders or another Unicode form.

    is_unique: no other image has the same last part of its name. UnusableImage where the name leads out of
    the folder, and the folder has no image of its last part.
    """
    is_plain = name.isascii() and "/" not in name and "\\" not in name  # then no search: COCO has 118,000
    candidates = [name, name.replace("\\", "/"), *([last_part(name)] if is_unique else [])]
    for candidate in [c for c in candidates if not leads_out(c)] if folder and not is_plain else []:
        # macOS stores é as two characters, most other programs as one.
        for form in (candidate, *(unicodedata.normalize(form, candidate) for form in ("NFC", "NFD"))):
            with suppress(OSError):  # no file can have this name
                if (folder / form).is_file():
                    return form
    if leads_out(name):
        raise UnusableImage("outside their folder")
    return candidates[1]


def read_photo(
    photo: Any, photos: dict, folder: Path | None, last_parts: dict[str, int]
) -> tuple[str, tuple[int, int]]:
    """File name, width and height of an entry of COCO's `images`; UnusableImage with the reason otherwise.

    photos: the entries before it, by id; last_parts: how many names have each last part.
    """
    if not isinstance(photo, dict) or not isinstance(whole_id(photo.get("id")), int | str):
        raise UnusableImage("without an id")
    name, size = name_of(photo), [as_number(photo.get(side)) for side in ("width", "height")]
    if whole_id(photo["id"]) in photos:
        raise UnusableImage("with an id that occurs twice")
    if not name or not isinstance(name, str) or not all(is_number(v) and v == int(v) for v in size):
        raise UnusableImage("without a name, width and height")
    if min(size) < LEAST_SIDE or max(size) > NARROWEST * min(size):
        raise UnusableImage("too small or narrow")
    return find_name(name, folder, last_parts[last_part(name)] == 1), (int(size[0]), int(size[1]))


def index_photos(entries: list, folder: Path | None, left_out: LeftOut) -> dict:
    """Name and size of each usable image, by id; the others are counted in `left_out`."""
    photos = {}
    last_parts = Counter(map(last_part, {str(name_of(entry)) for entry in entries}))
    for entry in entries:
        try:
            photo = read_photo(entry, photos, folder, last_parts)
            photos[whole_id(entry["id"])] = photo
        except UnusableImage as reason:
            left_out.add(str(reason))
    return photos


# ---------------------------------------------------------------- annotations


def as_row(entry: Any) -> list | None:
    """The values of KEYS of an annotation, with numbers where they are text; None without a box."""
    row = [entry.get(key) for key in KEYS] if isinstance(entry, dict) and "bbox" in entry else entry
    if not isinstance(row, list) or len(row) != len(KEYS):
        return None
    *ids, is_crowd, box = row
    return [*map(whole_id, ids), is_crowd, list(map(as_number, box)) if isinstance(box, list) else box]


def box_problem(row: Any, photos: dict, seen: set) -> str:
    """Why an annotation, the values of KEYS, cannot be used, or "".

    photos: name and size of each usable image, by id; seen: ids and boxes of the annotations before it.
    """
    if row is None or not all(isinstance(value, int | str | None) for value in row[:3]):
        return "without a box"
    image_id, *_, box = row
    if image_id not in photos:
        return "without a usable image"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "with a box that is not four numbers"
    # Ids are optional, and boxes that differ are different objects even if exporters number them alike.
    if row[2] is not None and (*row[:3], *box) in seen:
        return "that occur twice"
    return "with an empty or inverted box" if box[2] <= 0 or box[3] <= 0 else ""


def fits(box: list[float], width: int, height: int) -> bool:
    x, y, w, h = box
    return x + w <= width + 1 and y + h <= height + 1  # rounding alone can take a box a pixel too far


def turned_photos(rows: list[list], photos: dict, folder: Path | None) -> list:
    """The ids of images whose boxes were drawn on the pixels as the file's EXIF orientation turns them.

    Some annotation tools state the size of the stored pixels nevertheless. An image is one of these if a box
    fits only the turned size, no box fits only the stored one, and the file has such an orientation. Where
    all boxes fit both sizes, nothing tells them apart: they are taken as on the stored pixels, like COCO's.
    """
    boxes = {row[0]: [] for row in rows if folder and not fits(row[4], *photos[row[0]][1])}
    for image_id, *_, box in rows if boxes else []:
        width, height = photos[image_id][1]
        if image_id in boxes and fits(box, width, height) != fits(box, height, width):
            boxes[image_id].append(fits(box, height, width))
    # True for each box that fits only the turned size, False for each that fits only the stored one.
    found = [image_id for image_id, votes in boxes.items() if votes and all(votes)]
    return [image_id for image_id in found if is_turned(folder / photos[image_id][0], photos[image_id][1])]


def index_rows(entries: list, photos: dict, folder: Path | None, left_out: LeftOut) -> list[list]:
    """The values of KEYS of each usable annotation; the others are counted in `left_out`.

    Swaps width and height of the images in `photos` whose boxes are on turned pixels.
    """
    rows, seen, inside = [], set(), []
    for row in map(as_row, entries):
        if problem := box_problem(row, photos, seen):
            left_out.add(problem)
        else:
            rows.append(row)
            seen.add((*row[:3], *row[4]))
    if turned := turned_photos(rows, photos, folder):
        kind = "boxes that fit only the image as its EXIF orientation turns it, so they are read as turned"
        warn_once(f"{len(turned):,} {left_out.what.replace('annotations', 'images')} have {kind}")
    photos |= {image_id: (photos[image_id][0], photos[image_id][1][::-1]) for image_id in turned}
    for row in rows:
        (x, y, w, h), (width, height) = row[4], photos[row[0]][1]
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            left_out.add("with a box outside the image")
        else:
            inside.append(row)
    return inside


def index_coco(
    text: str, name: str, split: str, excluded: set[int | str], texts: dict[str, str], need_text: bool,
    folder: Path | None = None,
) -> tuple[list[AnnotatedObject], list[LeftOut]]:  # fmt: skip
    """The objects in COCO's instances JSON that cues of a split can show, and what is left out.

    text, name: of the JSON file. excluded: ids of images to leave out. texts: descriptions by annotation id;
    other objects are described by their category if it occurs once in the image. need_text: leave out
    objects without a description. folder: of the images, to find those whose name has another folder.
    """
    data, objects = parse_instances(text), []
    left_out = [LeftOut(f"{part} in {name}", len(data[part])) for part in ("images", "annotations")]
    photos = index_photos(data["images"], folder, left_out[0])
    rows = index_rows(data["annotations"], photos, folder, left_out[1])
    if excluded and excluded.isdisjoint(map(id_key, photos)):
        warn_once(f"--exclude names no image of {name}: is it the list of another data set?")
    categories = data.get("categories") if isinstance(data.get("categories"), list) else []
    names = [(c.get("id"), c.get("name")) for c in categories if isinstance(c, dict)]
    category_names = {whole_id(i): text for i, text in names if isinstance(i, int | float | str)}
    # A category describes an object only if no other object of the image, crowds included, has it too.
    category_counts = Counter((image_id, category_id) for image_id, category_id, *_ in rows)
    id_counts = Counter(annotation_id for _, _, annotation_id, *_ in rows)
    for image_id, category_id, annotation_id, is_crowd, (x, y, w, h) in rows:
        is_unique = category_counts[image_id, category_id] == 1
        description = category_names.get(category_id) if is_unique else None
        # An expression describes one object, so an id that several objects share has none.
        if id_counts[annotation_id] == 1:
            description = texts.get(str(annotation_id), description)
        reasons = {"crowds": str(is_crowd).lower() not in NOT_A_CROWD}
        reasons["excluded"] = id_key(image_id) in excluded
        reasons["of the other split"] = not in_split(image_id, split, 50)
        reasons["without a text"] = need_text and not description
        if reason := next(filter(reasons.get, reasons), None):  # the first that applies
            left_out[1].add(reason, on_purpose=True)
        else:
            objects.append(AnnotatedObject(*photos[image_id], (x, y, x + w, y + h), description))
    return objects, left_out
