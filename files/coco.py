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
from files.pictures import LEAST_SIDE, NARROWEST, LeftOut, Photos, UnusableImage, in_split, warn_once
from reward import Box

NOT_A_CROWD = ("0", "0.0", "false", "none", "")
# What the content of a damaged file may raise.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, zlib.error)
DATUMARO = ", or convert YOLO or VOC labels with Datumaro: datum convert -if yolo -i DIR -f coco_instances"


class AnnotatedObject(NamedTuple):
    """One object in an image. A tuple, because COCO has 600,000 of them."""

    name: str  # of the image's file
    size: tuple[int, int]  # width and height of the image in pixels, as annotated
    address: str  # of the image on the web, or ""
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
    except (*UNREADABLE, OSError) as error:
        # Cut, so that the message never repeats the content of the file.
        reason = str(error if isinstance(error, ValueError) else repr(error))[:99]
        remedy = "give one in UTF-8" + DATUMARO * (flag == "annotations")
        raise UserError(f"--{flag} {path} is not a {description} ({reason}): {remedy}.") from None


# ---------------------------------------------------------------- values as exporters write them


def as_number(value: Any) -> float | None:
    """A number, also from a text that holds it; None for anything else, a NaN and what is too large.

    >>> as_number("12.5"), as_number(7), as_number("wide")
    (12.5, 7, None)
    """
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value if type(value) in (int, float) and abs(value) < 1e9 else None


def whole_id(value: Any) -> Any:
    """An id that is written as 285.0 is 285; any other stays as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def id_key(value: int | str) -> int | str:
    """What --exclude compares: "000000000285" and 285 are the same id.

    >>> id_key("000000000285"), id_key(285), id_key("a7")
    (285, 285, 'a7')
    """
    return int(value) if str(value).isdecimal() and len(str(value)) < 99 else value


def parse_ids(text: str) -> set[int | str]:
    """The ids of --exclude; ValueError where the text is JSON or a table."""
    if marks := set(text) & set('[]{}",;'):
        raise ValueError(f"it holds {min(marks)}, but should hold one id a line")
    return set(map(id_key, text.split()))


def parse_instances(text: str) -> dict[str, Any]:
    """COCO's instances JSON without polygons; ValueError where a part of it is missing."""
    # Polygons are most of the file, so they are dropped while it is parsed.
    data = json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k != "segmentation"})
    for key in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise ValueError(f'it has no list "{key}"')
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


def find_name(name: str, folder: Path, is_unique: bool) -> str:
    """The name of an image below its folder, where exporters write other folders or another Unicode form.

    is_unique: no other image has the same last part of its name. UnusableImage where the name leads out of
    the folder, and the folder has no image of its last part.
    """
    posix = name.replace("\\", "/")
    candidates = (name, posix, last_part(name)) if is_unique else (name, posix)
    # Most names need no search, and COCO has 118,000 of them.
    for candidate in () if posix.isascii() and "/" not in posix else candidates:
        # macOS stores é as two characters, most other programs as one.
        for form in (candidate, *(unicodedata.normalize(form, candidate) for form in ("NFC", "NFD"))):
            with suppress(OSError):  # no file can have this name
                if not leads_out(form) and (folder / form).is_file():
                    return form
    if leads_out(name):
        raise UnusableImage("outside their folder")
    return posix


def read_photo(photo: Any, photos: dict, folder: Path, last_parts: dict) -> tuple[str, tuple, str]:
    """File name, size and address of an entry of COCO's `images`; UnusableImage with the reason otherwise.

    photos: the entries before it, by id; last_parts: how many names have each last part.
    """
    if not isinstance(photo, dict) or not isinstance(whole_id(photo.get("id")), int | str):
        raise UnusableImage("without an id")
    name, size = name_of(photo), tuple(as_number(photo.get(side)) for side in ("width", "height"))
    if whole_id(photo["id"]) in photos:
        raise UnusableImage("with an id that occurs twice")
    if not name or not isinstance(name, str) or not all(side and side == int(side) for side in size):
        raise UnusableImage("without a name, width and height")
    if min(size) < LEAST_SIDE or max(size) > NARROWEST * min(size):
        raise UnusableImage("too small or narrow")
    name = find_name(name, folder, last_parts[last_part(name)] == 1)
    return name, tuple(map(int, size)), str(photo.get("coco_url") or "")


def index_photos(entries: list, folder: Path, left_out: LeftOut) -> dict:
    """Name, size and address of each usable image, by id; the others are counted in `left_out`."""
    photos, last_parts = {}, Counter(map(last_part, {str(name_of(entry)) for entry in entries}))
    for entry in entries:
        try:
            photos[whole_id(entry["id"])] = read_photo(entry, photos, folder, last_parts)
        except UnusableImage as reason:
            left_out.add(str(reason))
    return photos


# ---------------------------------------------------------------- annotations


def as_row(entry: Any) -> list | None:
    """[image id, category id, id, is a crowd, box] of an annotation; None without ids and a box.

    Numbers may be written as text. A box that is not four numbers is ().
    """
    if not isinstance(entry, dict) or "bbox" not in entry:
        return None
    ids = [whole_id(entry.get(key)) for key in ("image_id", "category_id", "id")]
    box = tuple(map(as_number, entry["bbox"] if isinstance(entry["bbox"], list) else ()))
    is_crowd = str(entry.get("iscrowd")).lower() not in NOT_A_CROWD
    row = [*ids, is_crowd, box if len(box) == 4 and None not in box else ()]
    return row if all(isinstance(value, int | str | None) for value in ids) else None


def box_problem(row: list | None, photos: dict, seen: dict) -> str:
    """Why an annotation, the result of `as_row`, cannot be used, or "".

    photos: name, size and address of each usable image, by id; seen: the annotations before it that can be
    used.
    """
    if row is None:
        return "without a box"
    if row[0] not in photos:
        return "without a usable image"
    if not row[4]:
        return "with a box that is not four numbers"
    # Ids are optional, and boxes that differ are different objects even if exporters number them alike.
    if row[2] is not None and tuple(row) in seen:
        return "that occur twice"
    (x, y, w, h), (width, height) = row[4], photos[row[0]][1]
    if w <= 0 or h <= 0:
        return "with an empty or inverted box"
    return "with a box outside the image" if x >= width or y >= height or x + w <= 0 or y + h <= 0 else ""


def fits(box: tuple, size: tuple) -> bool:
    """Whether a box ends inside an image; rounding alone can take it a pixel too far."""
    return box[0] + box[2] <= size[0] + 1 and box[1] + box[3] <= size[1] + 1


def turn_photos(rows: list, photos: dict, folder: Path) -> None:
    """Swaps width and height of images whose boxes are on the pixels as the EXIF orientation turns them.

    Some annotation tools state the size of the stored pixels nevertheless. An image is one of these if a box
    reaches beyond the stated size, all boxes fit the turned one, and the file can be read in that size. Where
    all boxes fit both sizes, nothing tells them apart: they are taken as on the stored pixels, like COCO's.
    """
    boxes = [(row[0], row[4]) for row in rows if row and row[4] and row[0] in photos]
    beyond = {image_id for image_id, box in boxes if not fits(box, photos[image_id][1])}
    beyond -= {i for i, box in boxes if i in beyond and not fits(box, photos[i][1][::-1])}
    # A total without limit: what cannot be used is counted later, when a cue needs it.
    probe = Photos(folder, LeftOut("images", 10**9))
    turned = {i: (name, size[::-1], url) for i, (name, size, url) in photos.items() if i in beyond}
    if turned := {i: photo for i, photo in turned.items() if probe.open(*photo)}:
        photos |= turned
        warn_once(f"boxes on {len(turned):,} images in {folder} fit only as EXIF turns them, and are read so")


def index_rows(entries: list, photos: dict, folder: Path, left_out: LeftOut) -> list[list]:
    """The row of each usable annotation (see `as_row`); the others are counted in `left_out`."""
    rows, seen = list(map(as_row, entries)), {}
    turn_photos(rows, photos, folder)
    for row in rows:
        if problem := box_problem(row, photos, seen):
            left_out.add(problem)
        else:
            seen[tuple(row) if row[2] is not None else object()] = row
    return list(seen.values())


def index_coco(
    text: str, name: str, split: str, excluded: set, texts: dict, need_text: bool, folder: Path
) -> tuple[list[AnnotatedObject], list[LeftOut]]:
    """The objects in COCO's instances JSON that cues of a split can show, and what is left out.

    text, name: of the JSON file. excluded: ids of images to leave out. texts: descriptions by annotation id;
    other objects are described by their category if it occurs once in the image. need_text: leave out
    objects without a description. folder: of the images, to find those whose name has another folder.
    """
    data, objects = parse_instances(text), []
    left_out = [LeftOut(f"{part} in {name}", len(data[part])) for part in ("images", "annotations")]
    photos = index_photos(data["images"], folder, left_out[0])
    rows = index_rows(data["annotations"], photos, folder, left_out[1])
    categories = [c for c in data.get("categories") or [] if isinstance(c, dict)]
    category_names = {whole_id(category.get("id")): category.get("name") for category in categories}
    # A category describes an object only if no other object of the image, crowds included, has it too.
    category_counts = Counter((image_id, category_id) for image_id, category_id, *_ in rows)
    id_counts = Counter(annotation_id for _, _, annotation_id, *_ in rows)
    for image_id, category_id, annotation_id, is_crowd, (x, y, w, h) in rows:
        is_unique = category_counts[image_id, category_id] == 1
        # An expression describes one object, so an id that several objects share has none.
        key = str(annotation_id) if id_counts[annotation_id] == 1 else None
        description = texts.get(key, category_names.get(category_id) if is_unique else None)
        reasons = {"crowds": is_crowd, "excluded": id_key(image_id) in excluded}
        reasons["of the other split"] = not in_split(image_id, split, 50)
        reasons["without a text"] = need_text and not description
        if reason := next(filter(reasons.get, reasons), None):  # the first that applies
            left_out[1].add(reason, on_purpose=True)
        else:
            objects.append(AnnotatedObject(*photos[image_id], (x, y, x + w, y + h), description))
    if objects and excluded and excluded.isdisjoint(map(id_key, photos)):
        warn_once(f"--exclude names no image of {name}: is it the list of another data set?")
    return objects, left_out
