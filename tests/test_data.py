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
from prompts import FAMILIES, UNITS, Processor, box_frame, encode, prompt_text
from reward import iou, parse_box
from tiny import architecture, scenes

# ---------------------------------------------------------------- windows


def grids(item) -> torch.Tensor:
    return torch.stack([picture.grid_thw for picture in item.images])


def pixels(item) -> torch.Tensor:
    return torch.cat([picture.pixel_values for picture in item.images])


def share(box, width: int, height: int) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def is_of(size: str, box, width: int, height: int) -> bool:
    part = share(box, width, height)
    return {"tiny": part < 0.01, "small": 0.01 <= part <= 0.05, "large": part > 0.1}[size]


def check_cue(cue, min_side: int = 16) -> None:
    x1, y1, x2, y2 = cue.box
    assert all(v == int(v) for v in cue.box)
    assert x1 >= 0 and y1 >= 0 and x2 <= cue.image.width and y2 <= cue.image.height
    assert x2 - x1 >= min_side and y2 - y1 >= min_side
    assert is_of(cue.size, cue.box, *cue.image.size)
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
def test_size_class_at_its_ends(box, size):
    assert data.size_class(box, 100, 100) == size


def test_windows_are_whole_inside_and_at_least_16_pixels():
    rng = random.Random(0)
    for _ in range(5000):
        width, height = rng.randint(16, 1000), rng.randint(16, 1000)
        x, y = rng.uniform(-50, width), rng.uniform(-50, height)
        box = (x, y, x + rng.uniform(0, 400), y + rng.uniform(0, 400))
        window = data.sample_cue_box(rng, box, width, height, CueConfig())
        there = min(box[2], width) > max(box[0], 0) and min(box[3], height) > max(box[1], 0)
        assert (window is not None) == there
        if there:
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


VANISHED = [(-20, 5, -1, 9), (5, 200, 9, 210), (5, 5, 5, 9), (9, 5, 5, 9), (math.nan, 0, 5, 5)]


@pytest.mark.parametrize("box", VANISHED)
def test_a_box_that_vanishes_has_no_window(box):
    assert data.sample_cue_box(random.Random(0), box, 100, 100, CueConfig()) is None


def test_a_window_shows_what_is_left_of_its_object():
    """Most of the object is outside: a window around its middle would miss what can be seen."""
    rng = random.Random(0)
    for _ in range(200):
        x1, y1, x2, y2 = data.sample_cue_box(rng, (-60, 40, 3, 60), 1000, 1000, CueConfig())
        assert x1 == 0 and x2 >= 3 and y1 < 50 < y2


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_random_windows_hold_what_they_must(size):
    rng, held = random.Random(0), (300, 200, 310, 212)
    for _ in range(500):
        free = data.sample_random_box(rng, 640, 480, size, CueConfig())
        around = data.sample_random_box(rng, 640, 480, size, CueConfig(), held)
        if free is not None:
            assert is_of(size, free, 640, 480) and free[2] <= 640 and free[3] <= 480 and min(free) >= 0
        if around is not None and is_of(size, around, 640, 480):
            assert around[0] <= 300 and around[1] <= 200 and around[2] >= 310 and around[3] >= 212


# ---------------------------------------------------------------- cues from scenes


@pytest.fixture
def unpainted(monkeypatch):
    """Scenes without their pictures: thousands of draws in seconds."""
    blank = Image.new("RGB", (scenes.SIDE, scenes.SIDE))
    monkeypatch.setattr(scenes, "render", lambda scene: blank)


def test_ten_thousand_draws(unpainted):
    cues = scene_cues(CueConfig(), "train", 0, num_objects=(4, 6))
    sizes = []
    for i in range(10_000):
        cue = cues[i]
        check_cue(cue)
        sizes.append(cue.size)
    assert set(sizes) == {"tiny", "small"}
    assert abs(sizes.count("tiny") / 10_000 - 0.7) < 3 * (0.7 * 0.3 / 10_000) ** 0.5


@pytest.mark.parametrize(("ratio", "size"), [(0.0, "small"), (1.0, "tiny")])
def test_ratios_at_their_ends(unpainted, ratio, size):
    cues = scene_cues(CueConfig(tiny_ratio=ratio), "train", 0)
    assert {cues[i].size for i in range(100)} == {size}


def looks(cue) -> tuple:
    return cue.box, cue.size, cue.text, cue.image.tobytes(), cue.crop.tobytes()


@pytest.mark.parametrize("source", ["object", "random", "large", "text"])
def test_a_cue_depends_on_split_seed_and_index_alone(source):
    cfg = CueConfig(source=source)
    first = scene_cues(cfg, "train", 3)
    forward = [looks(first[i]) for i in range(8)]
    random.seed(99)  # nothing global may matter
    other = scene_cues(cfg, "train", 3)
    assert [looks(other[i]) for i in reversed(range(8))] == forward[::-1]
    assert looks(scene_cues(cfg, "train", 3)[5]) == forward[5]
    assert looks(scene_cues(cfg, "train", 4)[5]) != forward[5]
    assert looks(scene_cues(cfg, "heldout", 3)[5]) != forward[5]


def test_training_and_held_out_scenes_differ():
    train, heldout = (scene_cues(CueConfig(), split, 0) for split in ("train", "heldout"))
    splits = [{cues[i].image.tobytes() for i in range(60)} for cues in (train, heldout)]
    assert [len(split) for split in splits] == [60, 60] and not splits[0] & splits[1]


def test_sources_on_scenes():
    cues = {source: scene_cues(CueConfig(source=source), "train", 0) for source in data.SOURCES}
    for i in range(40):
        for source, kind in cues.items():
            cue = kind[i]
            check_cue(cue)
            names = {scene_object.name: scene_object for scene_object in cue.scene.objects}
            assert 12 <= len(names) <= 16
            assert (cue.size == "large") == (source == "large")
            assert cue.crop.size == (scenes.CROP_SIDE, scenes.CROP_SIDE)
            if source == "random":
                assert cue.text is None
                continue
            scene_object = names[cue.text].box
            if source == "large":
                assert 0.1 <= share(cue.box, *cue.image.size) <= 0.31
                assert cue.box[0] <= scene_object[0] and cue.box[1] <= scene_object[1]
                assert cue.box[2] >= scene_object[2] and cue.box[3] >= scene_object[3]
            else:
                assert iou(cue.box, scene_object) > 0.5


# ---------------------------------------------------------------- cues from COCO


def an_id(held: bool, skip: int = 0) -> int:
    ids = (k for k in range(1, 10_000) if (zlib.crc32(str(k).encode()) % 50 == 0) == held)
    return next(k for i, k in enumerate(ids) if i == skip)


class Corpus:
    """A small COCO: a file of annotations and a folder of images, written when opened."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        self.json = {"images": [], "annotations": [], "categories": []}
        for number, name in ((1, "cat"), (7, "stop sign")):
            self.json["categories"].append({"id": number, "name": name})

    def image(self, number: int, picture: Image.Image, size=None, name: str | None = None, **save) -> None:
        name = name or f"{number}.png"
        picture.save(self.images / name, **save)
        width, height = size or picture.size
        self.json["images"].append({"id": number, "file_name": name, "width": width, "height": height})

    def box(self, image: int, *bbox: float, kind: int = 1, crowd: int = 0) -> int:
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
    """Smooth colours, different at every place and for every seed."""
    y, x = np.mgrid[:height, :width]
    bands = [x * 255 // width, y * 255 // height, np.full_like(x, seed * 40 % 256)]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))


def test_coco_draws_what_may_be_drawn(corpus, tmp_path):
    good, excluded = an_id(False), an_id(False, 1)
    for number in (good, excluded):
        corpus.image(number, noise(320, 240, number))
    corpus.box(good, 100, 100, 20, 20)  # tiny
    corpus.box(good, 200, 50, 40, 40, kind=7)  # small
    corpus.box(good, 0, 0, 30, 30, crowd=1)
    corpus.box(good, 400, 10, 30, 30)  # outside
    corpus.box(good, 10, 10, 0, 30)  # empty
    corpus.box(good, 0, 120, 300, 110)  # large: never asked for here
    corpus.box(excluded, 10, 10, 30, 30)
    exclude = tmp_path / "refcoco.txt"
    exclude.write_text(f"{excluded}\n")
    cues = corpus.open(exclude=exclude)
    seen = set()
    for i in range(100):
        cue = cues[i]
        check_cue(cue)
        assert cue.image.tobytes() == noise(320, 240, good).tobytes()
        assert cue.crop.tobytes() == cue.image.crop(cue.box).tobytes()
        centre = (cue.box[0] + cue.box[2]) / 2, (cue.box[1] + cue.box[3]) / 2
        at = min([(110, 110), (220, 70)], key=lambda p: math.dist(p, centre))
        assert math.dist(at, centre) < 2
        seen.add((at, cue.size))
    assert seen >= {((110, 110), "tiny"), ((220, 70), "small")}
    large = corpus.open(exclude=exclude, source="large")[0]
    assert (large.box, large.size) == ((0, 120, 300, 230), "large")


def test_coco_cues_repeat_in_any_order(corpus):
    for k in range(5):
        corpus.image(an_id(False, k), noise(240, 240, k))
        corpus.box(an_id(False, k), 20 * k, 30, 18, 18)
    first, again = corpus.open(seed=1), corpus.open(seed=1)
    forward = [looks(first[i]) for i in range(20)]
    assert [looks(again[i]) for i in reversed(range(20))] == forward[::-1]
    assert [looks(corpus.open(seed=2)[i]) for i in range(20)] != forward


def test_coco_splits_share_no_image(corpus):
    for k in range(12):
        corpus.image(an_id(k % 2 == 0, k), noise(200, 200, k), name=f"{k}.png")
        corpus.box(an_id(k % 2 == 0, k), 30, 30, 40, 40)
    pictures = {k: noise(200, 200, k).tobytes() for k in range(12)}
    for seed in (0, 1):
        for split, parity in (("train", 1), ("heldout", 0)):
            cues = corpus.open(split, seed, tiny_ratio=0)
            drawn = {cues[i].image.tobytes() for i in range(60)}
            assert drawn <= {pictures[k] for k in range(12) if k % 2 == parity}


def exif_6() -> dict:
    """Save options that say: turn me by 90° to see me."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


COLOUR, GREY, PALETTE = noise(200, 100), noise(200, 100).convert("L"), noise(200, 100).quantize(32)
SIXTEEN = (np.arange(200 * 100).reshape(100, 200) * 3).astype(np.uint16)
TURNED = COLOUR.transpose(Image.Transpose.ROTATE_270)
KINDS = {  # kind: what is saved, the file's name, options, the JSON's size, the RGB that must come out
    "grey": (GREY, "a.png", {}, None, GREY.convert("RGB")),
    "black and white": (GREY.convert("1"), "a.png", {}, None, GREY.convert("1").convert("RGB")),
    "alpha": (COLOUR.convert("RGBA"), "a.png", {}, None, COLOUR),
    "grey and alpha": (GREY.convert("LA"), "a.png", {}, None, GREY.convert("RGB")),
    "CMYK": (COLOUR.convert("CMYK"), "a.jpg", {"quality": 98}, None, COLOUR),
    "palette": (PALETTE, "a.png", {}, None, PALETTE.convert("RGB")),
    "palette, alpha": (PALETTE, "a.png", {"transparency": bytes(range(32))}, None, PALETTE.convert("RGB")),
    "GIF": (PALETTE, "a.gif", {"transparency": 3}, None, PALETTE.convert("RGB")),
    "16 bit": (Image.fromarray(SIXTEEN), "a.png", {}, None, Image.fromarray(SIXTEEN // 256).convert("RGB")),
    "boxes on raw pixels": (COLOUR, "a.png", exif_6(), None, COLOUR),
    "boxes on turned pixels": (COLOUR, "a.png", exif_6(), (100, 200), TURNED),
}


@pytest.mark.parametrize(("picture", "name", "save", "size", "expected"), KINDS.values(), ids=list(KINDS))
@pytest.mark.filterwarnings("error")
def test_images_come_out_as_the_rgb_that_boxes_mean(corpus, picture, name, save, size, expected):
    corpus.image(an_id(False), picture, size, name, **save)
    corpus.box(an_id(False), 30, 30, 20, 20)
    got = corpus.open(tiny_ratio=0)[0].image
    assert (got.mode, got.size) == ("RGB", expected.size)
    off = np.abs(np.asarray(got).astype(int) - np.asarray(expected))
    assert off.max() <= (1 if name == "a.png" else 12)


@pytest.mark.parametrize("broken", ["size", "missing", "completions/clipped_ratio", "text", "empty"])
def test_images_that_do_not_fit_are_never_drawn(corpus, broken):
    good, bad = an_id(False), an_id(False, 1)
    corpus.image(good, noise(200, 100))
    corpus.image(bad, noise(200, 100, 5), (300, 100) if broken == "size" else None)
    file = corpus.images / f"{bad}.png"
    if broken == "missing":
        file.unlink()
    elif broken != "size":
        file.write_bytes(
            {"completions/clipped_ratio": file.read_bytes()[:200], "text": b"<html>", "empty": b""}[broken]
        )
    for number in (good, bad):
        corpus.box(number, 30, 30, 20, 20)
    cues = corpus.open(tiny_ratio=0)
    assert all(cues[i].image.tobytes() == noise(200, 100).tobytes() for i in range(20))


def test_no_image_is_opened_before_it_is_drawn(corpus, monkeypatch):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    monkeypatch.setattr(Image, "open", None)
    cues = corpus.open(tiny_ratio=0)
    monkeypatch.undo()
    assert cues[0].image.size == (200, 100)


def test_text_on_coco(corpus, tmp_path):
    one, two = an_id(False), an_id(False, 1)
    corpus.image(one, noise(200, 200, 1))
    corpus.image(two, noise(200, 200, 2))
    corpus.box(one, 10, 10, 30, 30, kind=7)  # the only stop sign of its image
    corpus.box(one, 60, 60, 30, 30)
    corpus.box(one, 100, 100, 40, 40, crowd=1)  # a crowd of cats: the cat before is not the only one
    second = corpus.box(two, 10, 10, 30, 30)
    corpus.box(two, 60, 60, 30, 30)
    plain = corpus.open(source="text", tiny_ratio=0)
    assert {plain[i].text for i in range(30)} == {"stop sign"}
    file = tmp_path / "expressions.json"
    file.write_text(json.dumps({str(second): "the cat on the left"}))
    cues = corpus.open(source="text", tiny_ratio=0, expressions=file)
    drawn = [cues[i] for i in range(60)]
    assert {(cue.text, cue.image.tobytes()) for cue in drawn} == {
        ("stop sign", noise(200, 200, 1).tobytes()),
        ("the cat on the left", noise(200, 200, 2).tobytes()),
    }
    unnamed = corpus.open(tiny_ratio=0)
    assert {unnamed[i].text for i in range(60)} == {None, "stop sign"}
    assert {corpus.open(source="random")[i].text for i in range(10)} == {None}


def test_without_exclude_there_is_one_line_of_warning(corpus, tmp_path, capsys):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    corpus.open()
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "none.txt").write_text("")
    corpus.open(exclude=tmp_path / "none.txt")
    assert capsys.readouterr().err == ""


def test_an_empty_set_says_what_was_dropped(corpus, tmp_path):
    image, other = an_id(False), an_id(True)
    for number in (image, other):
        corpus.image(number, noise(200, 100))
    for _ in range(3):
        corpus.box(image, 30, 30, 20, 20, crowd=1)
    corpus.box(other, 30, 30, 20, 20)
    corpus.box(image, 300, 30, 20, 20)
    with pytest.raises(UserError, match=r"3 crowds") as raised:
        corpus.open()
    assert "1 of the other split" in str(raised.value) and "1 outside" in str(raised.value)


@pytest.mark.parametrize("source", ["object", "text"])
def test_a_size_that_no_box_can_have_is_named(corpus, source):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 0, 0, 190, 90)
    with pytest.raises(UserError, match="tiny"):
        corpus.open(source=source, tiny_ratio=1.0)[0]


# ---------------------------------------------------------------- cues from a folder


def test_a_folder_gives_random_windows(tmp_path):
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
    pictures = [{cue.image.tobytes() for cue in cues} for cues in drawn]
    assert pictures[0] and pictures[1] and not pictures[0] & pictures[1]
    again = data.open_cues(str(tmp_path), "train", 0, CueConfig(source="random"))
    assert looks(again[7]) == looks(splits[0][7])


# ---------------------------------------------------------------- box frames


def random_sizes(count: int):
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
def test_boxes_come_back_from_their_text(name, patch):
    rng = random.Random(0)
    checked = {40: 0, 200: 0}
    for width, height in random_sizes(200):
        frame = frame_of(name, width, height, patch)
        units = frame.units_x, frame.units_y
        for least in (1, 40, 200):
            if min(units) <= least:
                continue
            sides = [rng.uniform(least, limit) for limit in units]
            start = [rng.uniform(0, limit - side) for limit, side in zip(units, sides)]
            box = frame.to_pixels((*start, start[0] + sides[0], start[1] + sides[1]))
            assert box[0] >= 0 and box[2] <= width * (1 + 1e-9) and box[3] <= height * (1 + 1e-9)
            numbers = [float(v) for v in frame.to_text(box)[1:-1].split(",")]
            back = frame.to_pixels(tuple(numbers))
            for i, edge in enumerate(box):
                assert abs(back[i] - edge) * units[i % 2] / (width, height)[i % 2] <= 0.5 + 1e-6
            if least > 1:
                assert parse_box(f"<answer>{frame.to_text(box)}</answer>") == tuple(numbers)
                assert iou(back, box) > (0.95 if least == 40 else 0.99)
                assert iou(frame.to_units(box), numbers) == pytest.approx(iou(box, back))
                checked[least] += 1
    assert checked[40] > 150 and checked[200] > 80


@pytest.mark.parametrize(("size", "low", "high"), [((1920, 1080), 0, 0.001), ((640, 480), 0.92, 0.94)])
def test_original_pixels_taken_for_resized_ones(size, low, high):
    """The field's most reported bug: gone unnoticed on COCO's sizes, fatal on large images."""
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
    for source, cells in (("object", [36, 4]), ("text", [36])):
        item = encode_cue(processor, cue, source)
        image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert (grids(item).prod(-1) // 4).tolist() == cells
        assert item.mm_token_type_ids.tolist() == (item.input_ids == image).long().tolist()
        assert item.mm_token_type_ids.sum() == sum(cells)
        assert pixels(item).shape == (4 * sum(cells), 3 * 2 * 16 * 16)
        text = processor.tokenizer.decode(item.input_ids[item.mm_token_type_ids == 0])
        assert text.count("<|vision_start|><|vision_end|>") == len(cells)
        assert text.endswith("<|im_start|>assistant\n")
        wanted = "Find Image 2 in Image 1." if source == "object" else f"Find the {cue.text}."
        assert wanted in text


@pytest.mark.parametrize("size", [(200, 100), (64, 300), (17, 33), (900, 700)])
@pytest.mark.parametrize(("kind", "patch"), [("qwen2_5_vl", 14), ("qwen3_vl", 16)])
def test_pixel_limits_of_image_and_crop_are_their_own(size, kind, patch):
    family = replace(FAMILIES[kind], image_pixels=(56**2, 300**2), crop_pixels=(112**2, 150**2))
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2)
    processor = Processor(architecture.build_tokenizer(), processor, family, "<|image_pad|>")
    item = encode(processor, "Find it.", noise(*size), crop=noise(16, 16))
    image, crop = (grids(item).prod(-1) * patch**2).tolist()
    assert image <= 300**2 and 112**2 <= crop <= 150**2
    assert item.mm_token_type_ids.sum() == grids(item).prod(-1).sum() // 4
    frame = item.frame
    assert (frame.width, frame.height) == size
    resized = (int(grids(item)[0, 2]) * patch, int(grids(item)[0, 1]) * patch)
    assert (frame.units_x, frame.units_y) == (resized if kind == "qwen2_5_vl" else (1000, 1000))


def test_the_two_pictures_stand_in_order(processor):
    white, black = Image.new("RGB", (192, 192), "white"), Image.new("RGB", (64, 64))
    first, second = encode(processor, "x", white, crop=black).images
    assert (first.pixel_values == 1).all() and (second.pixel_values == -1).all()


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_prompts_name_their_units_and_keep_their_braces(kind):
    family = FAMILIES[kind]
    for task in ("cue", "text", "name"):
        with_think = prompt_text(family, task, text="a {cup} <b>")
        without = prompt_text(family, task, think=False, text="a {cup} <b>")
        assert with_think.startswith(without) and "{units}" not in with_think
        assert ("<think>" in with_think) == (family.template == "paper") and "<think>" not in without
        assert ("a {cup} <b>" in without) == (task == "text")
        if family.template == "paper" and task != "name":
            assert UNITS[family.box_frame] in without


# ---------------------------------------------------------------- the command line


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, data.__file__, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_show_draws_a_sheet(tmp_path):
    done = run("show", "--n", "4", "--seed", "3", "--out", "sheet.png", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "sheet.png", "")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600 and len(sheet.getcolors(1 << 24)) > 100


def test_the_command_ends_with_one_sentence(tmp_path):
    done = run("show", "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr.count("\n") == 1 and "--data nowhere" in done.stderr


def test_show_reads_coco(corpus, tmp_path, monkeypatch, capsys):
    corpus.image(an_id(False), noise(200, 100))
    corpus.box(an_id(False), 30, 30, 20, 20)
    (tmp_path / "ids.txt").write_text("5\n6\n")
    monkeypatch.chdir(tmp_path)
    where = ["--annotations", str(corpus.file), "--images", "images", "--exclude", "ids.txt"]
    monkeypatch.setattr(sys, "argv", ["data.py", "show", "--data", "coco", *where, "--tiny-ratio", "0"])
    data.main()
    assert capsys.readouterr() == ("cues.png\n", "")
    assert (tmp_path / "cues.png").is_file()


WRONG = {  # what is typed after `show`, and what the sentence must name
    "--data coco": "--annotations",
    "COCO missing.json": "missing.json",
    "COCO images": "images",
    "COCO broken.json": "broken.json",
    "COCO list.json": "list.json",
    "COCO captions.json": "captions.json",
    "COCO binary.json": "binary.json",
    "COCO nan.json": "1 that are not four numbers",
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
    "--n 0": "--n 0",
}


@pytest.mark.parametrize(("typed", "says"), WRONG.items())
def test_wrong_use_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, typed, says):
    (tmp_path / "images").mkdir()
    image = {"id": an_id(False), "file_name": "a.jpg", "width": 90, "height": 90}
    nan = {"id": 1, "image_id": image["id"], "category_id": 1, "iscrowd": 0, "bbox": [math.nan, 0, 1, 1]}
    caption = {"id": 1, "image_id": image["id"], "caption": "a cat"}
    kinds = [{"id": 1, "name": "cat"}]
    files = {
        "broken.json": '{"images": [',
        "list.json": "[1, 2, 3]",
        "captions.json": json.dumps({"images": [image], "annotations": [caption]}),
        "nan.json": json.dumps({"images": [image], "annotations": [nan], "categories": kinds}),
        "empty.json": json.dumps({"images": [], "annotations": [], "categories": []}),
        "ids.txt": "5\n6\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    monkeypatch.chdir(tmp_path)
    typed = typed.replace("COCO", "--data coco --images images --exclude ids.txt --annotations")
    monkeypatch.setattr(sys, "argv", ["data.py", "show", *typed.split()])
    with pytest.raises(SystemExit) as stopped:
        data.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1), err
    assert says in err and not (tmp_path / "cues.png").exists()
