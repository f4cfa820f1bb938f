"""Annotations as exporters write them: they are read, or refused in one sentence that says what to do."""

import copy
import gzip
import json
import random
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image
from random_models import noise

import locus_mini
from data import CueConfig, coco_cues
from files.coco import index_coco, parse_ids
from files.errors import UserError

SIZE = (320, 240)
IMAGE_IDS = [i for i in range(1, 60) if zlib.crc32(str(i).encode()) % 50][:8]  # of the training split
BOXES = [[40, 60, 24, 20], [150, 90, 50, 40]]


def instances(folder: Path) -> dict:
    """A small data set in `folder`/images: two boxes on each image, a cat and a dog."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in IMAGE_IDS:
        noise(SIZE, i).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]})
        row = {"image_id": i, "iscrowd": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        annotations += [row | {"id": 2 * i + k, "category_id": k, "bbox": BOXES[k]} for k in (0, 1)]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def data(tmp_path) -> dict:
    return instances(tmp_path)


def open_cues(folder: Path, content: object, images: str = "images", split: str = "train", **files: Path):
    file = folder / "instances.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    files = {"exclude": folder / "none.txt"} | files
    (folder / "none.txt").touch()
    return coco_cues(file, folder / images, CueConfig(), split, 0, **files)


def boxes_and_pixels(cues) -> list:
    return [(cue.box, cue.text, cue.image.tobytes()) for cue in map(cues.__getitem__, range(20))]


def each(key: str, **changes):
    """Changes every entry of a list of the data set; a function gives the new value from the entry."""

    def change(content: dict) -> None:
        for entry in content[key]:
            for name, value in changes.items():
                entry[name] = value(entry) if callable(value) else value

    return change


def without(key: str, *names: str):
    def change(content: dict) -> None:
        for entry in content[key]:
            for name in names:
                del entry[name]

    return change


def lvis(content: dict) -> None:
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"


def add(**values):
    return lambda content: content.update(values)


HARMLESS = {  # changes that mean the same data set
    "LVIS": lvis,
    "backslashes": each("images", file_name=lambda entry: "1\\" + entry["file_name"]),
    "Label Studio": each("images", file_name=lambda entry: "images/1/" + entry["file_name"]),
    "a path that leads out": each(
        "images", file_name=lambda entry: "..\\..\\upload\\4\\" + entry["file_name"]
    ),
    "an absolute path": each("images", file_name=lambda entry: "/data/" + entry["file_name"]),
    "a drive": each("images", file_name=lambda entry: "C:\\data\\" + entry["file_name"]),
    "ids that are floats": each("images", id=lambda entry: float(entry["id"])),
    "image ids that are floats": each("annotations", image_id=lambda entry: float(entry["image_id"])),
    "category ids that are floats": each("categories", id=lambda entry: float(entry["id"])),
    "sizes as text": each("images", width="320", height="240"),
    "boxes as text": each("annotations", bbox=lambda entry: [str(float(v)) for v in entry["bbox"]]),
    "images with a box": each("images", bbox=[0, 0, 320, 240]),
    "images with a box and an image id": each("images", bbox=[0, 0, 1, 1], image_id=7),
    "annotations with names": each("annotations", file_name="a.png", name="x", coco_url=""),
    "categories with a box": each("categories", bbox=[0, 0, 1, 1]),
    "a box at the top": add(bbox=[0, 0, 1, 1], image_id=1),
    "iscrowd 0 as text": each("annotations", iscrowd="0"),
    "iscrowd false": each("annotations", iscrowd=False),
    "no iscrowd": without("annotations", "iscrowd"),
    "one id for all": each("annotations", id=0),
    "no ids": without("annotations", "id"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_exporters_write_differently_gives_the_same_cues(name, data, tmp_path):
    expected = boxes_and_pixels(open_cues(tmp_path, data))
    changed = copy.deepcopy(data)
    HARMLESS[name](changed)
    assert json.dumps(changed) != json.dumps(data)
    cues = open_cues(tmp_path, changed)
    assert boxes_and_pixels(cues) == expected
    assert not any(part.unusable for part in cues.left_out)


@pytest.mark.parametrize("change", [lambda c: c.pop("categories"), without("categories", "name")])
def test_without_categories_cues_have_no_text(change, data, tmp_path):
    expected = [box for box, _, _ in boxes_and_pixels(open_cues(tmp_path, data))]
    change(data)
    assert [(box, text) for box, text, _ in boxes_and_pixels(open_cues(tmp_path, data))] == [
        (box, None) for box in expected
    ]


@pytest.mark.parametrize("pair", [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_of_a_name_are_one_name(pair, data, tmp_path):
    in_json, on_disk = pair
    for image in data["images"]:
        path = tmp_path / "images" / image["file_name"]
        path.rename(path.with_name(unicodedata.normalize(on_disk, f"é{image['id']}.png")))
        image["file_name"] = unicodedata.normalize(in_json, f"é{image['id']}.png")
    cues = open_cues(tmp_path, data)
    assert cues[0].image.size == SIZE and not any(part.unusable for part in cues.left_out)


def test_a_last_part_that_several_names_share_is_not_taken(data, tmp_path):
    """One of them is not the file of that name, and its boxes would be drawn on another image."""
    data["images"][0]["file_name"] = "a/9.png"
    data["images"][1]["file_name"] = "b/9.png"
    noise(SIZE, 99).save(tmp_path / "images" / "9.png")
    cues = open_cues(tmp_path, data)
    assert {cues[i].name for i in range(60)} == {f"{i}.png" for i in IMAGE_IDS[2:]}
    assert cues.left_out[-1].reasons == {"missing": 2}


def test_duplicate_ids_lose_no_box_but_their_expressions(data, tmp_path):
    expressions = tmp_path / "expressions.json"
    expressions.write_text(json.dumps({"7": "the cat"}))
    each("annotations", id=7)(data)
    cues = open_cues(tmp_path, data, expressions=expressions)
    assert {cues[i].text for i in range(20)} == {"cat", "dog"} and not cues.left_out[1].unusable
    data["annotations"].append(data["annotations"][0])
    assert open_cues(tmp_path, data).left_out[1].reasons == {"that occur twice": 1}


@pytest.mark.parametrize("form", ["{:012d}", "{}"])
@pytest.mark.parametrize("listed", ["{:012d}", "{}"])
def test_ids_to_exclude_are_compared_as_numbers(form, listed, data, tmp_path, capsys):
    each("images", id=lambda entry: form.format(entry["id"]))(data)
    each("annotations", image_id=lambda entry: form.format(entry["image_id"]))(data)
    exclude = tmp_path / "ids.txt"
    exclude.write_text("".join(f"{listed.format(i)}\n" for i in IMAGE_IDS))
    with pytest.raises(UserError, match=r"\d+ excluded"):
        open_cues(tmp_path, data, exclude=exclude)
    assert capsys.readouterr().err == ""
    exclude.write_text("999\n")
    open_cues(tmp_path, data, exclude=exclude)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--exclude names no image of" in err


def test_ids_to_exclude_need_not_be_numbers():
    assert parse_ids("000000000285 285 a7\n") == {285, "a7"}


ENCODINGS = {
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip of UTF-16": lambda text: gzip.compress(text.encode("utf-16")),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16 with a mark": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_compressed_and_other_unicode_files_are_read(name, data, tmp_path):
    data["categories"][1]["name"] = "café"
    text = json.dumps(data, ensure_ascii=False)
    texts = {text for _, text, _ in boxes_and_pixels(open_cues(tmp_path, ENCODINGS[name](text)))}
    assert texts == {"cat", "café"}


SECRET = "not to be repeated"
REFUSED = {  # content of --annotations, and what the message must name
    "a Latin-1 byte": (json.dumps([SECRET] * 99).encode() + b"caf\xe9", "UTF-8"),
    "half a gzip file": (gzip.compress(random.Random(0).randbytes(9999))[:5000], "EOFError"),
    "a gzip file with a wrong byte": (gzip.compress(SECRET.encode() * 99)[:-9] + b"123456789", "Error"),
    "a list": (json.dumps([{"image_id": 1, "bbox": [1, 2, 3, 4], "x": SECRET}] * 999).encode(), '"images"'),
    "no images": (json.dumps({"annotations": [SECRET] * 999}).encode(), '"images"'),
    "no annotations": (json.dumps({"images": [SECRET] * 999}).encode(), '"annotations"'),
    "images that are no list": (json.dumps({"images": {}, "annotations": [SECRET]}).encode(), '"images"'),
    "a number": (b"7", '"images"'),
    "YOLO": (b"0 0.5 0.5 0.1 0.1\n" * 99, "datum convert"),
    "VOC": (b"<annotation><filename>a.jpg</filename></annotation>" * 99, "datum convert"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 99, "COCO instances JSON"),
    "brackets": (b"[" * 100_000, "Recursion"),
    "nothing": (b"", "COCO instances JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_sentence_without_their_content(name, data, tmp_path):
    content, named = REFUSED[name]
    with pytest.raises(UserError) as raised:
        open_cues(tmp_path, content)
    message = str(raised.value)
    assert named in message and "--annotations" in message and "COCO instances JSON" in message
    assert len(message) - len(str(tmp_path)) <= 330 and SECRET not in message and "\n" not in message


def test_a_folder_of_labels_is_refused_in_one_sentence(data, tmp_path):
    with pytest.raises(UserError, match="datum convert"):
        coco_cues(tmp_path / "images", tmp_path / "images", CueConfig(), "train", 0)


# ---------------------------------------------------------------- boxes on turned pixels

EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6


def turned_instances(folder: Path, boxes: list, exif: Image.Exif | None = EXIF_6) -> dict:
    """Images of red boxes, shown as 240 × 320 pixels but stored and annotated as 320 × 240."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in IMAGE_IDS:
        shown = Image.new("RGB", SIZE[::-1], "white")
        for k, (x, y, w, h) in enumerate(boxes):
            shown.paste("red", (x, y, x + w, y + h))
            annotations.append({"id": 100 * i + k, "image_id": i, "category_id": 0, "bbox": [x, y, w, h]})
        stored = shown.transpose(Image.Transpose.ROTATE_90)
        stored.save(folder / "images" / f"{i}.png", **({"exif": exif} if exif else {}))
        images.append({"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]})
    return {"images": images, "annotations": annotations}


def red_shares(cues) -> set[float]:
    crops = [cues[i].crop for i in range(20)]
    return {
        sum(pixel == (255, 0, 0) for pixel in crop.get_flattened_data()) / crop.size[0] / crop.size[1]
        for crop in crops
    }


def test_boxes_that_fit_only_turned_pixels_are_read_as_turned_with_one_warning(tmp_path, capsys):
    """The second box lies below the stored image, the third reaches beyond it, the first fits both sizes."""
    data = turned_instances(tmp_path, [[100, 50, 60, 50], [20, 250, 60, 50], [100, 180, 60, 65]])
    cues = open_cues(tmp_path, data)
    cues = coco_cues(
        tmp_path / "instances.json",
        tmp_path / "images",
        CueConfig(tiny_ratio=0),
        "train",
        0,
        tmp_path / "none.txt",
    )
    assert red_shares(cues) == {1.0} and not any(part.unusable for part in cues.left_out)
    assert {cues[i].image.size for i in range(20)} == {(240, 320)}
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{len(IMAGE_IDS)} images in" in err and "as EXIF turns them" in err


@pytest.mark.parametrize(
    ("boxes", "exif"),
    [
        ([[100, 50, 60, 50], [20, 250, 60, 50]], None),  # no orientation
        (
            [[100, 50, 60, 50], [250, 20, 60, 50], [20, 250, 60, 50]],
            EXIF_6,
        ),  # a box that fits only the stored
        ([[100, 50, 60, 50]], EXIF_6),  # boxes that fit both
        ([[100, 150, 60, 91]], EXIF_6),  # half a pixel too far: rounding
    ],
)
def test_other_boxes_stay_on_the_stored_pixels(boxes, exif, tmp_path):
    cues = open_cues(tmp_path, turned_instances(tmp_path, boxes, exif))
    objects, _ = index_coco(
        (tmp_path / "instances.json").read_text(), "", "train", set(), {}, False, tmp_path / "images"
    )
    assert {annotated.size for annotated in objects} == {SIZE} and cues.split == "coco-train"


# ---------------------------------------------------------------- real photos

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"
real_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos of COCO in {PHOTOS}")


@real_photos
def test_cues_of_real_photos_show_the_pixels_of_their_boxes(tmp_path):
    (tmp_path / "none.txt").touch()
    cues = coco_cues(
        PHOTOS / "instances.json", PHOTOS / "images", CueConfig(), "train", 0, tmp_path / "none.txt"
    )
    drawn = [cues[i] for i in range(200)]
    for cue in drawn:
        with Image.open(PHOTOS / "images" / cue.name) as image:
            assert cue.crop.tobytes() == image.convert("RGB").crop(cue.box).tobytes()
    assert 0.63 <= sum(cue.size == "tiny" for cue in drawn) / 200 <= 0.77


@real_photos
def test_a_run_on_real_photos_ends_well(tmp_path, monkeypatch):
    """The photos are all of the training split, so some images get an id of the held-out one."""
    data = json.loads((PHOTOS / "instances.json").read_text())
    held = [i for i in range(10**6, 10**6 + 3000) if zlib.crc32(str(i).encode()) % 50 == 0]
    new_ids = dict(zip([image["id"] for image in data["images"]][:20], held, strict=False))
    for key, name in (("images", "id"), ("annotations", "image_id")):
        for entry in data[key]:
            entry[name] = new_ids.get(entry[name], entry[name])
    (tmp_path / "instances.json").write_text(json.dumps(data))
    flags = ["--data", "coco", "--annotations", tmp_path / "instances.json", "--images", PHOTOS / "images"]
    flags += [
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--prompts",
        2,
        "--num-generations",
        2,
        "--eval-cues",
        4,
    ]
    monkeypatch.setattr("sys.argv", ["locus_mini.py", *map(str, flags)])
    locus_mini.main()
    assert (tmp_path / "run" / "results.json").exists()
