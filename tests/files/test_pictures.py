"""Bad images and annotations are left out, counted and replaced by another cue; they never end a run."""

import io
import json
import math
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, features
from random_models import noise

import locus_mini
from data import CueConfig, coco_cues, folder_cues
from files.coco import index_coco
from files.disk import file_stats
from files.errors import UserError
from files.pictures import LeftOut, Photos, UnusableImage, load_image, open_folder

SIZE = (320, 240)


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes that claims to be side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        png += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    return png


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    noise(size, seed).save(file, "JPEG")
    return file.getvalue()


BAD = {  # file name: content, reason why it cannot be used
    "truncated.jpg": (jpeg(SIZE, 0)[:3000], "broken or not an image"),
    "zero.jpg": (b"", "broken or not an image"),
    "text.jpg": (b"<html>not found</html>", "broken or not an image"),
    "zeros.png": (bytes(4096), "broken or not an image"),
    "one.png": (jpeg((1, 1), 0), "under 16 pixels on a side"),
    "line.png": (jpeg((1, 4000), 0), "under 16 pixels on a side"),
    "strip.png": (jpeg((16, 4000), 0), "over 200 times as long as wide"),
    "bomb.png": (huge_png(20_000), "larger than 134,217,728 pixels"),
    "worse.png": (huge_png(2**31 - 1), "larger than 134,217,728 pixels"),
    "script.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n",
        "broken or not an image",
    ),
    "missing.jpg": (None, "missing"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_an_unusable_image_raises_its_reason(name, tmp_path):
    content, reason = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnusableImage) as raised:
        load_image(tmp_path / name)
    assert str(raised.value) == reason


def fill(folder: Path, num_good: int) -> None:
    """Writes good images and all bad ones into a new folder."""
    folder.mkdir()
    for i in range(num_good):
        noise(SIZE, i).save(folder / f"{i}.png")
    for name, (content, _) in BAD.items():
        if content is not None:
            (folder / name).write_bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_another_cue_replaces_an_unusable_one_and_depends_on_the_seed_alone(tmp_path, capsys):
    fill(tmp_path / "photos", 20)
    cues = folder_cues(tmp_path / "photos", CueConfig(), "train", 0)
    contents = [(cues[i].box, cues[i].image.tobytes()) for i in range(60)]
    fresh = folder_cues(tmp_path / "photos", CueConfig(), "train", 0)
    assert [(fresh[i].box, fresh[i].image.tobytes()) for i in reversed(range(60))] == contents[::-1]
    (left_out,) = cues.left_out
    assert left_out.unusable >= 5 and left_out.reasons["broken or not an image"] >= 2
    assert left_out.reasons == fresh.left_out[0].reasons, "each image counts once"
    err = capsys.readouterr().err
    assert err.count("warning: more than 1 % cannot be used") == 2, "once for each sequence of cues"


def test_an_image_never_runs_as_a_program(tmp_path, monkeypatch):
    (tmp_path / "script.jpg").write_bytes(BAD["script.jpg"][0])
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    with pytest.raises(UnusableImage):
        load_image(tmp_path / "script.jpg")


def test_file_names_need_not_be_valid_text(tmp_path):
    for i in range(30):
        noise(SIZE, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/%d\xff.png" % i))
    cue = folder_cues(tmp_path, CueConfig(), "train", 0)[0]
    assert cue.image.size == SIZE
    assert index([IMAGE | {"id": "\ud800"}, IMAGE], [BOX])[0], "an id need not be valid text either"


def test_an_entry_with_a_wrong_size_does_not_spoil_another_entry_of_the_same_file(tmp_path):
    """Only the entry with the wrong size is unusable, even if it is opened first."""
    noise(SIZE, 0).save(tmp_path / "1.png")
    photos = Photos(tmp_path, LeftOut("images", 1))
    assert photos.open("1.png", (999, 999)) is None
    assert photos.open("1.png", SIZE) is not None


def test_a_folder_without_usable_images_is_an_error_with_counts(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"left out of \d+ train images in .*: \d+ broken or not an image"):
        folder_cues(tmp_path, CueConfig(), "train", 0)[0]


def test_the_warning_is_printed_once_and_only_above_one_percent(capsys):
    left_out = LeftOut("images in x", 300)
    for _ in range(3):
        left_out.add("missing")
    left_out.add("excluded", on_purpose=True)
    left_out.warn()
    assert capsys.readouterr().err == ""
    for _ in range(2):
        left_out.add("missing")
        left_out.warn()
    assert capsys.readouterr().err.count("warning") == 1
    assert str(left_out) == "left out of 300 images in x: 5 missing, 1 excluded"


# ---------------------------------------------------------------- annotations

IMAGE = {"id": 1, "file_name": "1.png", "width": 320, "height": 240}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [10, 10, 20, 20]}
BAD_IMAGES = {
    "without an id": [IMAGE | {"id": None}, IMAGE | {"id": [3]}, "text", None, {}],
    "with an id that occurs twice": [IMAGE, IMAGE | {"file_name": "other.png"}],
    "without a name, width and height": [
        IMAGE | {"id": 2, "width": "wide"},
        IMAGE | {"id": 3, "height": None},
        IMAGE | {"id": 4, "width": math.nan},
        IMAGE | {"id": 5, "file_name": 7},
        IMAGE | {"id": 6, "width": 320.5},
        IMAGE | {"id": 7, "width": 10**300, "height": 10**300},
        IMAGE | {"id": 8, "height": 1e308},
    ],
    "outside their folder": [
        IMAGE | {"id": 2, "file_name": "../secret.png"},
        IMAGE | {"id": 3, "file_name": "/etc/passwd"},
        IMAGE | {"id": 4, "file_name": "a/../../b.png"},
        IMAGE | {"id": 5, "file_name": "C:\\b.png"},
        IMAGE | {"id": 6, "file_name": "..\\b.png"},
    ],
    "too small or narrow": [
        IMAGE | {"id": 2, "width": 1, "height": 1},
        IMAGE | {"id": 3, "width": 1, "height": 4000},
        IMAGE | {"id": 4, "width": 4000, "height": 16},
        IMAGE | {"id": 5, "width": -320},
    ],
}
BAD_BOXES = {
    "that occur twice": [BOX, BOX | {"area": 400}],
    "without a usable image": [BOX | {"id": 2, "image_id": 99}, BOX | {"id": 3, "image_id": "1"}],
    "without a box": [{"id": 2, "image_id": 1}, BOX | {"id": 3, "image_id": [1]}, BOX | {"id": {}}, "text"],
    "with a box that is not four numbers": [
        BOX | {"id": 2, "bbox": ["10", "10", "20", "wide"]},
        BOX | {"id": 3, "bbox": [10, 10, 20]},
        BOX | {"id": 4, "bbox": [10, 10, math.nan, 20]},
        BOX | {"id": 5, "bbox": [10, math.inf, 20, 20]},
        BOX | {"id": 6, "bbox": None},
        BOX | {"id": 7, "bbox": [10, 10, True, 20]},
        BOX | {"id": 8, "bbox": [10, 10, 10**400, 20]},
    ],
    "with an empty or inverted box": [
        BOX | {"id": 2, "bbox": [50, 50, -20, 20]},
        BOX | {"id": 3, "bbox": [9, 9, 9, 0]},
    ],
    "with a box outside the image": [
        BOX | {"id": 2, "bbox": [320, 0, 9, 9]},
        BOX | {"id": 3, "bbox": [-9, 0, 9, 9]},
    ],
}


def index(images: list, boxes: list):
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    return index_coco(json.dumps(content), "x.json", "train", set(), {}, False, Path("nowhere"))


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_bad_images_are_counted_and_the_others_are_used(reason):
    good = [] if BAD_IMAGES[reason][0] == IMAGE else [IMAGE]
    objects, (images, annotations) = index([*good, *BAD_IMAGES[reason]], [BOX])
    assert images.reasons == {reason: len(BAD_IMAGES[reason]) - (not good)}
    assert [(annotated.name, annotated.box) for annotated in objects] == [("1.png", (10, 10, 30, 30))]
    assert not annotations.reasons


@pytest.mark.parametrize("reason", BAD_BOXES)
def test_bad_annotations_are_counted_and_the_others_are_used(reason):
    good = [] if BAD_BOXES[reason][0] == BOX else [BOX]
    objects, (images, annotations) = index([IMAGE], [*good, *BAD_BOXES[reason]])
    assert annotations.reasons == {reason: len(BAD_BOXES[reason]) - (not good)}
    assert [annotated.box for annotated in objects] == [(10, 10, 30, 30)] and not images.reasons


def test_no_file_outside_the_folder_is_opened(tmp_path, monkeypatch):
    noise(SIZE, 0).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    noise(SIZE, 1).save(tmp_path / "images" / "1.png")
    images = [IMAGE, IMAGE | {"id": 2, "file_name": "../secret.png"}]
    images += [IMAGE | {"id": 3, "file_name": str(tmp_path / "secret.png")}]
    boxes = [BOX | {"id": i, "image_id": i, "bbox": [50, 50, 60, 50]} for i in (1, 2, 3)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": []}))
    opened, open_image = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **kwargs: opened.append(Path(path)) or open_image(path, **kwargs)
    )
    cues = coco_cues(file, tmp_path / "images", CueConfig(tiny_ratio=0), "train", 0)
    assert all(cues[i].image.size == SIZE for i in range(20))
    assert set(opened) == {tmp_path / "images" / "1.png"}


def test_an_unusable_image_is_opened_only_once(tmp_path, monkeypatch):
    photos, open_image = Photos(tmp_path, LeftOut("images", 1)), Image.open
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda path, **kwargs: opened.append(path) or open_image(path, **kwargs)
    )
    assert [photos.open("none.png") for _ in range(3)] == [None] * 3
    assert len(opened) == 1 and photos.left_out.reasons == {"missing": 1}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_run_on_bad_data_succeeds_and_counts_what_it_left_out(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "photos", 40)
    arguments = ["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--steps", "4"]
    arguments += ["--prompts", "4", "--num-generations", "2", "--eval-cues", "6"]
    monkeypatch.setattr(sys, "argv", ["locus_mini.py", *arguments])
    locus_mini.main()
    left_out = json.loads((tmp_path / "run" / "results.json").read_text())["left_out"]
    total = sum(sum(reasons.values()) for reasons in left_out.values())
    assert 1 <= total <= len(BAD) - 1


# ---------------------------------------------------------------- pixels


def ellipse_on_nothing() -> Image.Image:
    """A black ellipse on a transparent black ground, as vector tools save a drawing."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((40, 40, 200, 160), fill=(0, 0, 0, 255))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode, tmp_path):
    ellipse_on_nothing().convert(mode).save(tmp_path / "1.png")
    image = load_image(tmp_path / "1.png")
    assert image.getpixel((5, 5)) == (255, 255, 255) and image.getpixel((120, 100)) == (0, 0, 0)


GREY = np.asarray(noise(SIZE, 3).convert("L"))
DEEP = {
    "16 bits": GREY.astype(np.uint16) * 256,
    "32 bits": GREY * np.int32(999),
    "floats": GREY / np.float32(255),
}


@pytest.mark.parametrize("kind", DEEP)
def test_values_of_over_8_bits_are_left_out_with_the_reason(kind, tmp_path):
    Image.fromarray(DEEP[kind]).save(tmp_path / "1.tif")
    with pytest.raises(UnusableImage, match="of over 8 bits a value"):
        load_image(tmp_path / "1.tif")


@pytest.mark.parametrize("suffix", ["avif", "jp2", "tif", "tiff", "gif"])
def test_other_formats_are_listed_and_read(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for i in range(30):
        noise(SIZE, i).save(tmp_path / f"{i}.{suffix}")
    assert folder_cues(tmp_path, CueConfig(), "train", 0)[0].image.size == SIZE


def test_heic_is_named_as_a_format_that_is_not_read(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(UnusableImage, match="of a format that is not read"):
        load_image(tmp_path / "1.jpg")


def test_a_folder_of_other_files_is_one_sentence_with_counts(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.heic").touch()
        (tmp_path / f"{i % 7}.svg").touch()
    with pytest.raises(UserError, match=r"30 \.heic, 7 \.svg") as raised:
        open_folder(tmp_path, "train")
    assert len(str(raised.value)) <= 400


# ---------------------------------------------------------------- what file managers and runs leave


def leave_files(folder: Path, kind: str) -> None:
    """Adds what is no input: of file managers, or of a run with --out inside --data."""
    if kind == "files":
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.png", ".hidden.png"):
            (folder / name).write_bytes(b"x")
    elif kind == "link":
        (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    else:
        (folder / "runs" / "a" / "adapter").mkdir(parents=True)
        name, text = ("metrics.jsonl", "") if kind == "run" else ("config.json", '{"lr": 1, "task": "locus"}')
        (folder / "runs" / "a" / name).write_text(text)
        noise(SIZE, 1).save(folder / "runs" / "a" / "before_after.png")
        noise(SIZE, 1).save(folder / "runs" / "a" / "adapter" / "1.png")


@pytest.mark.parametrize("kind", ["files", "link", "run", "new run"])
def test_what_is_no_input_changes_nothing(kind, tmp_path):
    for i in range(12):
        noise(SIZE, i).save(tmp_path / f"{i}.png")
    names, stats = open_folder(tmp_path, "train")[0], file_stats(tmp_path)
    leave_files(tmp_path, kind)
    assert file_stats(tmp_path) == stats and len(stats) == 12
    found, photos = open_folder(tmp_path, "train")
    assert set(found) - set(names) <= ({"dangling.png"} if kind == "link" else set())
    assert photos.open("dangling.png") is None and photos.left_out.reasons == {"missing": 1}


def test_a_file_that_is_named_counts_whatever_its_ending(tmp_path):
    """BabyVision's data are a meta_data.jsonl: in a folder it could be the reply cache of a run."""
    file = tmp_path / "meta_data.jsonl"
    file.write_text("{}")
    assert list(file_stats(file)) == ["."] and not file_stats(tmp_path)


def test_a_run_folder_itself_can_be_the_input(tmp_path):
    noise(SIZE, 0).save(tmp_path / "1.png")
    (tmp_path / "metrics.jsonl").touch()
    assert list(file_stats(tmp_path)) == ["1.png"]
