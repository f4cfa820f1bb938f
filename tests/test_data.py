"""Cues: windows, size classes, seeds and splits; box frames, encoded prompts, and `python data.py show`."""

import json
import math
import random
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import data
from data import CueConfig, encode_cue, scene_cues
from files.errors import UserError
from files.pictures import contact_sheet, warn_once
from prompts import FAMILIES, UNITS, Processor, box_frame, encode, prompt_text
from reward import iou, parse_box
from tiny import architecture, scenes

# ---------------------------------------------------------------- windows


def grids(prompt) -> torch.Tensor:
    return torch.stack([image.grid_thw for image in prompt.images])


def pixels(prompt) -> torch.Tensor:
    return torch.cat([image.pixel_values for image in prompt.images])


def area_share(box, width: int, height: int) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def has_size(size: str, box, width: int, height: int) -> bool:
    share = area_share(box, width, height)
    return {"tiny": share < 0.01, "small": 0.01 <= share <= 0.05, "large": share > 0.1}[size]


def check_cue(cue, min_side: int = 16) -> None:
    x1, y1, x2, y2 = cue.box
    assert all(v == int(v) for v in cue.box)
    assert x1 >= 0 and y1 >= 0 and x2 <= cue.image.width and y2 <= cue.image.height
    assert x2 - x1 >= min_side and y2 - y1 >= min_side
    assert has_size(cue.size, cue.box, *cue.image.size)
    assert cue.image.mode == "RGB"


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 10, 9.9), "tiny"),
        ((0, 0, 10, 10), "small"),
        ((0, 0, 20, 25), "small"),
        ((0, 0, 20, 25.1), "medium"),
        ((0, 0, 25, 40), "medium"),
        ((0, 0, 25, 40.1), "large"),
    ],
)
def test_size_class_at_its_limits(box, size):
    assert data.size_class(box, 100, 100) == size


def test_windows_have_integer_edges_inside_the_image_and_at_least_16_pixels_a_side():
    rng = random.Random(0)
    for _ in range(5000):
        width, height = rng.randint(16, 1000), rng.randint(16, 1000)
        x, y = rng.uniform(-50, width), rng.uniform(-50, height)
        box = (x, y, x + rng.uniform(0, 400), y + rng.uniform(0, 400))
        window = data.sample_cue_box(rng, box, width, height, CueConfig())
        is_visible = min(box[2], width) > max(box[0], 0) and min(box[3], height) > max(box[1], 0)
        assert (window is not None) == is_visible
        if is_visible:
            x1, y1, x2, y2 = window
            assert all(isinstance(v, int) for v in window)
            assert 0 <= x1 <= x2 - 16 and x2 <= width and 0 <= y1 <= y2 - 16 and y2 <= height


def test_only_tiny_objects_are_scaled():
    rng, cfg = random.Random(0), CueConfig()
    assert data.sample_cue_box(rng, (100, 100, 200, 180), 500, 500, cfg) == (100, 100, 200, 180)
    windows = [data.sample_cue_box(rng, (480, 480, 520, 520), 1000, 1000, cfg) for _ in range(2000)]
    sides = [window[2] - window[0] for window in windows]
    assert min(sides) >= math.floor(40 * 0.8) and max(sides) <= math.ceil(40 * 1.2 * 2)
    assert min(sides) <= 35 and max(sides) >= 85


INVISIBLE = [(-20, 5, -1, 9), (5, 200, 9, 210), (5, 5, 5, 9), (9, 5, 5, 9), (math.nan, 0, 5, 5)]


@pytest.mark.parametrize("box", INVISIBLE)
def test_a_box_without_a_visible_part_has_no_window(box):
    assert data.sample_cue_box(random.Random(0), box, 100, 100, CueConfig()) is None


def test_a_window_shows_the_visible_part_of_its_object():
    """Most of the object is outside the image: a window around its centre would miss the visible part."""
    rng = random.Random(0)
    for _ in range(200):
        x1, y1, x2, y2 = data.sample_cue_box(rng, (-60, 40, 3, 60), 1000, 1000, CueConfig())
        assert x1 == 0 and x2 >= 3 and y1 < 50 < y2


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_random_windows_have_their_size_class_and_contain_the_box_they_must(size):
    rng, must_contain = random.Random(0), (300, 200, 310, 212)
    for _ in range(500):
        anywhere = data.sample_random_box(rng, 640, 480, size, CueConfig())
        around = data.sample_random_box(rng, 640, 480, size, CueConfig(), must_contain)
        if anywhere is not None:
            assert has_size(size, anywhere, 640, 480)
            assert anywhere[2] <= 640 and anywhere[3] <= 480 and min(anywhere) >= 0
        if around is not None and has_size(size, around, 640, 480):
            assert around[0] <= 300 and around[1] <= 200 and around[2] >= 310 and around[3] >= 212


# ---------------------------------------------------------------- cues from scenes


@pytest.fixture
def without_rendering(monkeypatch):
    """Scenes with a blank image, so that thousands of draws take seconds."""
    blank = Image.new("RGB", (scenes.SIDE, scenes.SIDE))
    monkeypatch.setattr(scenes, "render", lambda scene: blank)


def test_ten_thousand_cues_are_valid_and_have_the_ratio_of_size_classes(without_rendering):
    cues = scene_cues(CueConfig(), "train", 0, num_objects=(4, 6))
    sizes = []
    for i in range(10_000):
        cue = cues[i]
        check_cue(cue)
        sizes.append(cue.size)
    assert set(sizes) == {"tiny", "small"}
    assert abs(sizes.count("tiny") / 10_000 - 0.7) < 3 * (0.7 * 0.3 / 10_000) ** 0.5


@pytest.mark.parametrize(("ratio", "size"), [(0.0, "small"), (1.0, "tiny")])
def test_a_ratio_of_0_or_1_gives_one_size_class(without_rendering, ratio, size):
    cues = scene_cues(CueConfig(tiny_ratio=ratio), "train", 0)
    assert {cues[i].size for i in range(100)} == {size}


def contents(cue) -> tuple:
    return cue.box, cue.size, cue.text, cue.image.tobytes(), cue.crop.tobytes()


@pytest.mark.parametrize("source", ["object", "random", "large", "text"])
def test_a_cue_depends_on_split_seed_and_index_alone(source):
    cfg = CueConfig(source=source)
    first = scene_cues(cfg, "train", 3)
    forward = [contents(first[i]) for i in range(8)]
    random.seed(99)  # the global generator must not matter
    again = scene_cues(cfg, "train", 3)
    assert [contents(again[i]) for i in reversed(range(8))] == forward[::-1]
    assert contents(scene_cues(cfg, "train", 3)[5]) == forward[5]
    assert contents(scene_cues(cfg, "train", 4)[5]) != forward[5]
    assert contents(scene_cues(cfg, "heldout", 3)[5]) != forward[5]


def test_training_and_held_out_scenes_differ():
    train, heldout = (scene_cues(CueConfig(), split, 0) for split in ("train", "heldout"))
    splits = [{cues[i].image.tobytes() for i in range(60)} for cues in (train, heldout)]
    assert [len(split) for split in splits] == [60, 60] and not splits[0] & splits[1]


def test_each_source_on_scenes_draws_its_own_kind_of_window():
    cues = {source: scene_cues(CueConfig(source=source), "train", 0) for source in data.SOURCES}
    for i in range(40):
        for source, source_cues in cues.items():
            cue = source_cues[i]
            check_cue(cue)
            assert 8 <= len(cue.scene.objects) <= 12
            assert (cue.size == "large") == (source == "large")
            assert cue.crop.size == (scenes.CROP_SIDE, scenes.CROP_SIDE)
            if source == "random":
                assert cue.text is None and cue.target is None
                continue
            assert cue.target in cue.scene.objects and cue.text == cue.target.name
            object_box = cue.target.box
            if source == "large":
                assert 0.1 <= area_share(cue.box, *cue.image.size) <= 0.31
                assert cue.box[0] <= object_box[0] and cue.box[1] <= object_box[1]
                assert cue.box[2] >= object_box[2] and cue.box[3] >= object_box[3]
            else:
                assert cue.target.size == cue.size
                scale = (cue.box[2] - cue.box[0]) / (object_box[2] - object_box[0])
                assert scale == 1 if cue.size == "small" else scale <= 2 * 1.2 + 1 / 14
                shown = scenes.visible_fraction(object_box, cue.box)
                assert shown > 0.5, "most of the object is in its window"


def test_half_of_the_cues_on_scenes_are_of_a_twin(without_rendering):
    drawn = {twins: scene_cues(CueConfig(), "train", 0, twins=twins) for twins in (None, True, False)}
    shares = {}
    for twins, cues in drawn.items():
        targets = [(cue.scene, cue.target) for cue in (cues[i] for i in range(300))]
        shares[twins] = 1 - np.mean([scene.is_unique(target) for scene, target in targets])
    assert (shares[True], shares[False]) == (1, 0)
    assert abs(shares[None] - 0.5) < 3 * (0.25 / 300) ** 0.5 + 0.03  # large objects are no targets


def test_a_text_cue_of_a_twin_is_its_bare_name_and_the_description_is_unique(without_rendering):
    cues = scene_cues(CueConfig("text"), "train", 0, twins=True)
    for cue in (cues[i] for i in range(20)):
        assert sum(o.name == cue.text for o in cue.scene.objects) == 2
        assert sum(o.description == cue.target.description for o in cue.scene.objects) == 1


def test_crops_of_scenes_keep_their_proportions():
    image = Image.new("RGB", (scenes.SIDE, scenes.SIDE), "white")
    cue = data.Cue(image, (10, 10, 26, 42), "small", scene=scenes.Scene([], (0, 0, 0)))
    columns = (np.asarray(cue.crop) == 255).all(-1).all(0)  # white from top to bottom
    assert columns.sum() == scenes.CROP_SIDE // 2 and columns[16:48].all(), "16 × 32 pixels: half as wide"


# ---------------------------------------------------------------- cues from COCO


def an_id(held: bool, skip: int = 0) -> int:
    """An image id of the held-out or the training split, after `skip` others of the same split."""
    ids = (k for k in range(1, 10_000) if (zlib.crc32(str(k).encode()) % 50 == 0) == held)
    return next(k for i, k in enumerate(ids) if i == skip)


class Corpus:
    """A small COCO data set: a folder of images and a JSON file, which is written when it is opened."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        self.json = {"images": [], "annotations": [], "categories": []}
        for number, name in ((1, "cat"), (7, "stop sign")):
            self.json["categories"].append({"id": number, "name": name})

    def image(self, number: int, image: Image.Image, size=None, name: str | None = None, **options) -> None:
        """Adds an image; options: of Pillow's save."""
        name = name or f"{number}.png"
        image.save(self.images / name, **options)
        width, height = size or image.size
        self.json["images"].append({"id": number, "file_name": name, "width": width, "height": height})

    def box(self, image: int, *bbox: float, kind: int = 1, crowd: int = 0) -> int:
        """Adds an annotation of category `kind` to an image; returns its id."""
        number = len(self.json["annotations"]) + 100
        polygon = {"counts": [1, 2], "size": [3, 4]} if crowd else [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
        entry = {"id": number, "image_id": image, "category_id": kind, "iscrowd": crowd, "area": 1.0}
        self.json["annotations"].append(entry | {"bbox": list(bbox), "segmentation": polygon})
        return number

    @property
    def file(self) -> Path:
        path = self.folder / "instances.json"
        path.write_text(json.dumps(self.json))
        return path

    def open(self, split: str = "train", seed: int = 0, **cfg):
        files = {key: cfg.pop(key) for key in ("exclude", "expressions") if key in cfg}
        return data.coco_cues(self.file, self.images, CueConfig(**cfg), split, seed, **files)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus(tmp_path)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of smooth colours, different at every place and for every seed."""
    y, x = np.mgrid[:height, :width]
    bands = [x * 255 // width, y * 255 // height, np.full_like(x, seed * 40 % 256)]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def test_coco_cues_are_drawn_from_usable_boxes_only(corpus, tmp_path):
    good, excluded = an_id(False), an_id(False, 1)
    for number in (good, excluded):
        corpus.image(number, noise(320, 240, number))
    corpus.box(good, 100, 100, 20, 20)  # tiny
    corpus.box(good, 200, 50, 40, 40, kind=7)  # small
    corpus.box(good, 0, 0, 30, 30, crowd=1)
    corpus.box(good, 400, 10, 30, 30)  # outside
    corpus.box(good, 10, 10, 0, 30)  # empty
    corpus.box(good, 0, 120, 300, 110)  # large: not drawn as tiny or small
    corpus.box(excluded, 10, 10, 30, 30)
    exclude = tmp_path / "refcoco.txt"
    exclude.write_text(f"{excluded}\n")
    cues = corpus.open(exclude=exclude)
    drawn = set()
    for i in range(100):
        cue = cues[i]
        check_cue(cue)
        assert cue.image.tobytes() == noise(320, 240, good).tobytes()
        assert cue.crop.tobytes() == cue.image.crop(cue.box).tobytes()
        centre = (cue.box[0] + cue.box[2]) / 2, (cue.box[1] + cue.box[3]) / 2
        nearest = min([(110, 110), (220, 70)], key=lambda p: math.dist(p, centre))
        assert math.dist(nearest, centre) < 2
        drawn.add((nearest, cue.size))
    assert drawn >= {((110, 110), "tiny"), ((220, 70), "small")}
    large = corpus.open(exclude=exclude, source="large")[0]
    assert (large.box, large.size) == ((0, 120, 300, 230), "large")


def test_coco_cues_are_the_same_in_any_order(corpus):
    for k in range(5):
        corpus.image(an_id(False, k), noise(240, 240, k))
        corpus.box(an_id(False, k), 20 * k, 30, 18, 18)
    first, again = corpus.open(seed=1), corpus.open(seed=1)
    forward = [contents(first[i]) for i in range(20)]
    assert [contents(again[i]) for i in reversed(range(20))] == forward[::-1]
    assert [contents(corpus.open(seed=2)[i]) for i in range(20)] != forward


def test_coco_splits_share_no_images(corpus):
    for k in range(12):
        corpus.image(an_id(k % 2 == 0, k), noise(200, 200, k), name=f"{k}.png")
        corpus.box(an_id(k % 2 == 0, k), 30, 30, 40, 40)
    images = {k: noise(200, 200, k).tobytes() for k in range(12)}
    for seed in (0, 1):
        for split, parity in (("train", 1), ("heldout", 0)):
            cues = corpus.open(split, seed, tiny_ratio=0)
            drawn = {cues[i].image.tobytes() for i in range(60)}
            assert drawn <= {images[k] for k in range(12) if k % 2 == parity}


def exif_6() -> dict:
    """Options of Pillow's save that state the EXIF orientation 6: to be shown turned by 90°."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


COLOUR, GREY, PALETTE = noise(200, 100), noise(200, 100).convert("L"), noise(200, 100).quantize(32)


def on_white(alphas) -> Image.Image:
    """PALETTE where each colour has an opacity, before a white ground."""
    colours = np.array(PALETTE.getpalette()).reshape(-1, 3)[:32]
    share = np.array(alphas)[:, None] / 255
    composed = np.round(colours * share + 255 * (1 - share)).astype(np.uint8)
    return Image.fromarray(composed[np.asarray(PALETTE)])


TURNED = COLOUR.transpose(Image.Transpose.ROTATE_270)
KINDS = {  # kind: the image, its file name, options of save, the size in the JSON, the expected RGB image
    "grey": (GREY, "a.png", {}, None, GREY.convert("RGB")),
    "black and white": (GREY.convert("1"), "a.png", {}, None, GREY.convert("1").convert("RGB")),
    "alpha": (COLOUR.convert("RGBA"), "a.png", {}, None, COLOUR),
    "grey and alpha": (GREY.convert("LA"), "a.png", {}, None, GREY.convert("RGB")),
    "CMYK": (COLOUR.convert("CMYK"), "a.jpg", {"quality": 98}, None, COLOUR),
    "palette": (PALETTE, "a.png", {}, None, PALETTE.convert("RGB")),
    "palette, alpha": (PALETTE, "a.png", {"transparency": bytes(range(32))}, None, on_white(range(32))),
    "GIF": (PALETTE, "a.gif", {"transparency": 3}, None, on_white([255] * 3 + [0] + [255] * 28)),
    "boxes on raw pixels": (COLOUR, "a.png", exif_6(), None, COLOUR),
    "boxes on turned pixels": (COLOUR, "a.png", exif_6(), (100, 200), TURNED),
}


@pytest.mark.parametrize(("image", "name", "options", "size", "expected"), KINDS.values(), ids=list(KINDS))
@pytest.mark.filterwarnings("error")
def test_images_are_read_as_the_rgb_pixels_that_boxes_refer_to(corpus, image, name, options, size, expected):
    corpus.image(an_id(False), image, size, name, **options)
    corpus.box(an_id(False), 30, 30, 20, 20)
    opened = corpus.open(tiny_ratio=0)[0].image
    assert (opened.mode, opened.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(opened).astype(int) - np.asarray(expected))
    assert difference.max() <= (1 if name == "a.png" else 12)


@pytest.mark.parametrize("broken", ["size", "missing", "truncated", "text", "empty"])
def test_unusable_images_are_never_drawn(corpus, broken):
    good, bad = an_id(False), an_id(False, 1)
    corpus.image(good, noise(200, 100))
    corpus.image(bad, noise(200, 100, 5), (300, 100) if broken == "size" else None)
    file = corpus.images / f"{bad}.png"
    if broken == "missing":
        file.unlink()
    elif broken != "size":
        file.write_bytes({"truncated": file.read_bytes()[:200], "text": b"<html>", "empty": b""}[broken])
    for number in (good, bad):
        corpus.box(number, 30, 30, 20, 20)
    cues = corpus.open(tiny_ratio=0)
    assert all(cues[i].image.tobytes() == noise(200, 100).tobytes() for i in range(20))


def test_no_image_is_opened_before_a_cue_needs_it(corpus, monkeypatch):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    monkeypatch.setattr(Image, "open", None)
    cues = corpus.open(tiny_ratio=0)
    monkeypatch.undo()
    assert cues[0].image.size == (200, 100)


def test_text_cues_have_an_expression_or_a_category_that_is_unique_in_the_image(corpus, tmp_path):
    first, second = an_id(False), an_id(False, 1)
    corpus.image(first, noise(200, 200, 1))
    corpus.image(second, noise(200, 200, 2))
    corpus.box(first, 10, 10, 30, 30, kind=7)  # the only stop sign of its image
    corpus.box(first, 60, 60, 30, 30)
    corpus.box(first, 100, 100, 40, 40, crowd=1)  # a crowd of cats, so the cat is not the only one
    annotation_id = corpus.box(second, 10, 10, 30, 30)
    corpus.box(second, 60, 60, 30, 30)
    plain = corpus.open(source="text", tiny_ratio=0)
    assert {plain[i].text for i in range(30)} == {"stop sign"}
    file = tmp_path / "expressions.json"
    file.write_text(json.dumps({str(annotation_id): "the cat on the left"}))
    cues = corpus.open(source="text", tiny_ratio=0, expressions=file)
    drawn = [cues[i] for i in range(60)]
    assert {(cue.text, cue.image.tobytes()) for cue in drawn} == {
        ("stop sign", noise(200, 200, 1).tobytes()),
        ("the cat on the left", noise(200, 200, 2).tobytes()),
    }
    without_expressions = corpus.open(tiny_ratio=0)
    assert {without_expressions[i].text for i in range(60)} == {None, "stop sign"}
    assert {corpus.open(source="random")[i].text for i in range(10)} == {None}


def test_a_missing_exclude_file_is_one_line_of_warning(corpus, tmp_path, capsys):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    warn_once.cache_clear()  # other tests in this process have seen it
    corpus.open()
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "none.txt").write_text("")
    corpus.open(exclude=tmp_path / "none.txt")
    assert capsys.readouterr().err == ""


def test_a_data_set_without_usable_boxes_is_an_error_with_counts(corpus, tmp_path):
    image, heldout_image = an_id(False), an_id(True)
    for number in (image, heldout_image):
        corpus.image(number, noise(200, 100))
    for _ in range(3):
        corpus.box(image, 30, 30, 20, 20, crowd=1)
    corpus.box(heldout_image, 30, 30, 20, 20)
    corpus.box(image, 300, 30, 20, 20)
    with pytest.raises(UserError, match=r"3 crowds") as raised:
        corpus.open()
    assert "1 of the other split" in str(raised.value) and "1 with a box outside" in str(raised.value)


@pytest.mark.parametrize("source", ["object", "text"])
def test_a_size_class_that_no_box_has_is_named(corpus, source):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 0, 0, 190, 90)
    with pytest.raises(UserError, match="tiny"):
        corpus.open(source=source, tiny_ratio=1.0)[0]


# ---------------------------------------------------------------- cues from a folder


def test_a_folder_gives_random_windows_of_its_split(tmp_path):
    for k in range(30):
        noise(220, 180, k).save(tmp_path / f"{k}.{'JPG' if k % 2 else 'png'}")
    (tmp_path / "deep").mkdir()
    noise(180, 220).save(tmp_path / "deep" / "turned.png", **exif_6())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(b"no image")
    splits = [data.open_cues(str(tmp_path), split, 0, CueConfig()) for split in ("train", "heldout")]
    drawn = [[cues[i] for i in range(80)] for cues in splits]
    for cue in drawn[0] + drawn[1]:
        check_cue(cue)
        assert cue.text is None and cue.image.size == (220, 180)
    images = [{cue.image.tobytes() for cue in cues} for cues in drawn]
    assert images[0] and images[1] and not images[0] & images[1]
    again = data.open_cues(str(tmp_path), "train", 0, CueConfig(source="random"))
    assert contents(again[7]) == contents(splits[0][7])


# ---------------------------------------------------------------- box frames


def random_sizes(count: int):
    """Widths and heights of images, from 32 to 6,000 pixels, at most 8 times as long as wide."""
    rng = random.Random(5)
    while count:
        aspect = 2 ** rng.uniform(-3, 3)
        height = math.exp(rng.uniform(math.log(32), math.log(6000)))
        width, height = round(height * aspect**0.5), round(height / aspect**0.5)
        if min(width, height) >= 32 and max(width, height) <= 6000 and 1 / 8 <= width / height <= 8:
            count -= 1
            yield width, height


def frame_of(name: str, width: int, height: int, patch: int):
    pixels = (4 * patch * patch, 1280 * 4 * patch * patch)
    h, w = smart_resize(height, width, 2 * patch, *pixels)
    return box_frame(name, width, height, np.array([1, h // patch, w // patch]), patch)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("name", ["resized", "relative1000"])
def test_boxes_survive_the_way_to_text_and_back(name, patch):
    rng = random.Random(0)
    checked = {40: 0, 200: 0}
    for width, height in random_sizes(200):
        frame = frame_of(name, width, height, patch)
        units = frame.units_x, frame.units_y
        for min_side in (1, 40, 200):
            if min(units) <= min_side:
                continue
            sides = [rng.uniform(min_side, limit) for limit in units]
            start = [rng.uniform(0, limit - side) for limit, side in zip(units, sides)]
            box = frame.to_pixels((*start, start[0] + sides[0], start[1] + sides[1]))
            assert box[0] >= 0 and box[2] <= width * (1 + 1e-9) and box[3] <= height * (1 + 1e-9)
            numbers = [float(v) for v in frame.to_text(box)[1:-1].split(",")]
            parsed = frame.to_pixels(tuple(numbers))
            for i, edge in enumerate(box):
                assert abs(parsed[i] - edge) * units[i % 2] / (width, height)[i % 2] <= 0.5 + 1e-6
            if min_side > 1:
                assert parse_box(f"<answer>{frame.to_text(box)}</answer>") == tuple(numbers)
                assert iou(parsed, box) > (0.95 if min_side == 40 else 0.99)
                assert iou(frame.to_units(box), numbers) == pytest.approx(iou(box, parsed))
                checked[min_side] += 1
    assert checked[40] > 150 and checked[200] > 80


@pytest.mark.parametrize(("size", "low", "high"), [((1920, 1080), 0, 0.001), ((640, 480), 0.92, 0.94)])
def test_original_pixels_scored_as_resized_ones(size, low, high):
    """The most reported bug of such models: unnoticed on images of COCO's sizes, fatal on large ones."""
    width, height = size
    box = (0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height)
    frame = frame_of("resized", width, height, 14)
    assert low <= iou(box, frame.to_units(box)) <= high
    assert iou(frame_of("relative1000", width, height, 14).to_units(box), frame.to_units(box)) < 0.05


# ---------------------------------------------------------------- prompts and encoding


@pytest.fixture(scope="module")
def processor():
    return Processor(
        architecture.build_tokenizer(),
        architecture.build_image_processor(),
        FAMILIES["tiny"],
        "<|image_pad|>",
    )


def test_image_tokens_are_counted_and_marked(processor):
    cue = scene_cues(CueConfig(), "train", 0)[0]
    for source, num_tokens in (("object", [64, 4]), ("text", [64])):
        prompt = encode_cue(processor, cue, source)
        image_token_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert (grids(prompt).prod(-1) // 4).tolist() == num_tokens
        assert prompt.mm_token_type_ids.tolist() == (prompt.input_ids == image_token_id).long().tolist()
        assert prompt.mm_token_type_ids.sum() == sum(num_tokens)
        assert pixels(prompt).shape == (4 * sum(num_tokens), 3 * 2 * 16 * 16)
        text = processor.tokenizer.decode(prompt.input_ids[prompt.mm_token_type_ids == 0])
        assert text.count("<|vision_start|><|vision_end|>") == len(num_tokens)
        assert text.endswith("<|im_start|>assistant\n")
        request = "Find Image 2 in Image 1." if source == "object" else f"Find the {cue.text}."
        assert request in text


@pytest.mark.parametrize("size", [(200, 100), (64, 300), (17, 33), (900, 700)])
@pytest.mark.parametrize(("kind", "patch"), [("qwen2_5_vl", 14), ("qwen3_vl", 16)])
def test_image_and_crop_have_separate_pixel_limits(size, kind, patch):
    family = replace(FAMILIES[kind], image_pixels=(56**2, 300**2), crop_pixels=(112**2, 150**2))
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2)
    processor = Processor(architecture.build_tokenizer(), processor, family, "<|image_pad|>")
    prompt = encode(processor, "Find it.", noise(*size), crop=noise(16, 16))
    image, crop = (grids(prompt).prod(-1) * patch**2).tolist()
    assert image <= 300**2 and 112**2 <= crop <= 150**2
    assert prompt.mm_token_type_ids.sum() == grids(prompt).prod(-1).sum() // 4
    frame = prompt.frame
    assert (frame.width, frame.height) == size
    resized = (int(grids(prompt)[0, 2]) * patch, int(grids(prompt)[0, 1]) * patch)
    assert (frame.units_x, frame.units_y) == (resized if kind == "qwen2_5_vl" else (1000, 1000))


def test_the_image_comes_before_the_crop(processor):
    white, black = Image.new("RGB", (256, 256), "white"), Image.new("RGB", (64, 64))
    first, second = encode(processor, "x", white, crop=black).images
    assert (first.pixel_values == 1).all() and (second.pixel_values == -1).all()


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_prompts_name_their_units_and_keep_braces_of_the_text(kind):
    family = FAMILIES[kind]
    for task in ("cue", "text", "name"):
        with_think = prompt_text(family, task, text="a {cup} <b>")
        without_think = prompt_text(family, task, think=False, text="a {cup} <b>")
        assert with_think.startswith(without_think) and "{units}" not in with_think
        assert ("<think>" in with_think) == (family.template == "paper") and "<think>" not in without_think
        assert ("a {cup} <b>" in without_think) == (task == "text")
        if family.template == "paper" and task != "name":
            assert UNITS[family.box_frame] in without_think


# ---------------------------------------------------------------- the command line


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, data.__file__, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_show_writes_a_sheet_of_cues(tmp_path):
    process = run("show", "--n", "4", "--seed", "3", "--out", "sheet.png", cwd=tmp_path)
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, "sheet.png", "")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600 and len(sheet.getcolors(1 << 24)) > 100


def test_a_sheet_of_text_cues_shows_no_crop():
    """Only the window of the crop is coloured, and a text cue's is drawn inside the image alone."""
    image = Image.new("RGB", (320, 240), "gray")
    image.paste("#12f3d4", (30, 30, 60, 60))
    cue = data.Cue(image, (30, 30, 60, 60), "small", "cyan square")
    painted = []
    for source in ("object", "text"):
        cues = data.Cues(CueConfig(source), "train", 0, lambda *_: cue)
        beside = np.asarray(contact_sheet(cues, 1))[:, 335:]
        painted.append((beside == (0x12, 0xF3, 0xD4)).all(-1).sum())
    assert painted[0] > 1000 and painted[1] == 0


@pytest.mark.parametrize("flags", ["--data nowhere", "--out cues"])
def test_show_ends_with_one_sentence_on_wrong_use(flags, tmp_path):
    process = run("show", *flags.split(), cwd=tmp_path)
    assert (process.returncode, process.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert process.stderr.count("\n") == 1 and flags in process.stderr


def test_show_reads_coco(corpus, tmp_path, monkeypatch, capsys):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    corpus.image(5, noise(200, 100))
    (tmp_path / "ids.txt").write_text("5\n6\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--annotations", str(corpus.file), "--images", "images", "--exclude", "ids.txt"]
    monkeypatch.setattr(sys, "argv", ["data.py", "show", "--data", "coco", *flags, "--tiny-ratio", "0"])
    data.main()
    assert capsys.readouterr() == ("cues.png\n", "")
    assert (tmp_path / "cues.png").is_file()


BAD_FLAGS = {  # flags after `show`, and what the error must name
    "--data coco": "--annotations",
    "COCO missing.json": "missing.json",
    "COCO images": "images",
    "COCO broken.json": "broken.json",
    "COCO list.json": "list.json",
    "COCO captions.json": "captions.json",
    "COCO binary.json": "binary.json",
    "COCO nan.json": "1 with a box that is not four numbers",
    "COCO empty.json": "empty.json",
    "COCO empty.json --images nowhere": "--images nowhere",
    "COCO empty.json --exclude no.txt": "no.txt",
    "COCO empty.json --exclude list.json": "list.json",
    "COCO empty.json --expressions broken.json": "broken.json",
    "COCO empty.json --expressions list.json": "list.json",
    "--data nowhere": "nowhere",
    "--data images": "images",
    "--data images --source text": "--source text",
    "--tiny-ratio 1.5": "1.5",
    "--tiny-ratio nan": "nan",
    "--n 0": "--n: 0",
}


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS.items())
def test_bad_flags_end_with_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, named):
    (tmp_path / "images").mkdir()
    image = {"id": an_id(False), "file_name": "a.jpg", "width": 90, "height": 90}
    nan = {"id": 1, "image_id": image["id"], "category_id": 1, "iscrowd": 0, "bbox": [math.nan, 0, 1, 1]}
    caption = {"id": 1, "image_id": image["id"], "caption": "a cat"}
    categories = [{"id": 1, "name": "cat"}]
    files = {
        "broken.json": '{"images": [',
        "list.json": "[1, 2, 3]",
        "captions.json": json.dumps({"images": [image], "annotations": [caption]}),
        "nan.json": json.dumps({"images": [image], "annotations": [nan], "categories": categories}),
        "empty.json": json.dumps({"images": [], "annotations": [], "categories": []}),
        "ids.txt": "5\n6\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    monkeypatch.chdir(tmp_path)
    flags = flags.replace("COCO", "--data coco --images images --exclude ids.txt --annotations")
    monkeypatch.setattr(sys, "argv", ["data.py", "show", *flags.split()])
    with pytest.raises(SystemExit) as exit_error:
        data.main()
    out, err = capsys.readouterr()
    assert (exit_error.value.code, out, err.count("\n")) == (2, "", 1), err
    assert named in err and not (tmp_path / "cues.png").exists()
