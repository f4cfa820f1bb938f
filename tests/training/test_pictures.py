"""The drawn PNG files: what is on them, on scenes and on images of extreme shapes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops, ImageColor

from data import Cue, CueConfig, scene_cues
from prompts import BoxFrame
from reward import reward
from training.pictures import BLUE, LINES, ORANGE, RED, draw_attention, draw_cues, draw_group, text_block

CUES = scene_cues(CueConfig(), "heldout", 0)


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "#406040")


EXTREME = [
    Cue(plain(2000, 100), (100, 10, 400, 60), "tiny"),
    Cue(plain(100, 2000), (0, 0, 16, 1900), "tiny"),
    Cue(plain(200, 1), (0, 0, 200, 1), "large"),
]


def opened(path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def count(image: Image.Image, color: str, area: tuple[int, int, int, int] | None = None) -> int:
    """Pixels of exactly this color."""
    wanted = ImageColor.getrgb(color)
    colors = image.crop(area or (0, 0, *image.size)).getcolors(2**24)
    return sum(number for number, found in colors if found == wanted)


def completion(box) -> str:
    numbers = ", ".join(f"{v}" for v in box)
    return f"<think>there</think><answer>[{numbers}]</answer>"


def group_of(cue: Cue, completions: list[str], with_crop: bool = True) -> SimpleNamespace:
    """A group whose model answers in pixels; the advantage is the difference to the mean reward."""
    frame = BoxFrame(*cue.image.size, *cue.image.size)
    rewards = [reward(text, cue.box) for text in completions]
    mean = sum(r.total for r in rewards) / len(rewards)
    images = [None] * (1 + with_crop)
    example = SimpleNamespace(cue=cue, prompt=SimpleNamespace(frame=frame, images=images))
    advantages = [r.total - mean for r in rewards]
    return SimpleNamespace(example=example, completions=completions, rewards=rewards, advantages=advantages)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["", "a b", "What is it? " * 40, "w" * 500, "one\ntwo\n" * 20])
def test_text_stays_inside_its_block(text):
    block = text_block(text, 200)
    ink = ImageChops.invert(block).getbbox()
    assert block.width == 200
    assert (ink is None) == (text == "")
    left, top, right, bottom = ink or (9, 0, 9, 0)
    assert left >= 9 and right <= 200 - 9 and top >= 0 and bottom < block.height
    assert len(text) < 100 or block.height > 100, "long text has several lines"


@pytest.mark.parametrize(
    "text", ["One group's completions: advantage > 0", "25% (IoU 0.50), +0.64 -1.62 'red' ?"]
)
def test_the_font_has_every_character_that_is_printed(text):
    missing = text_block("\uffff", 40)
    for character in set(text) - {" "}:
        assert text_block(character, 40).tobytes() != missing.tobytes(), character


# ---------------------------------------------------------------- before and after


def test_before_after_has_four_cues_a_row_and_a_legend(tmp_path):
    cues = [CUES[i] for i in range(6)]
    boxes = [cue.box for cue in cues]
    draw_cues(cues, boxes, boxes, tmp_path / "six.png")
    draw_cues(cues, boxes, boxes, tmp_path / "four.png", n=4)
    draw_cues(cues, boxes, None, tmp_path / "base.png", n=4)
    six, four, base = (opened(tmp_path / f"{name}.png") for name in ("six", "four", "base"))
    assert six.width == four.width == 4 * 320
    top = 80  # title and legend
    assert six.height - top == pytest.approx(2 * (four.height - top), abs=10)
    legend = (0, 30, four.width, 70)
    assert count(four, ORANGE, legend) and count(four, BLUE, legend)
    assert count(base, ORANGE, legend) and not count(base, BLUE), "one model: two entries"


def test_boxes_that_coincide_can_all_be_seen(tmp_path):
    cue = Cue(plain(192, 192), (80, 80, 110, 110), "tiny")
    draw_cues([cue], [cue.box], [cue.box], tmp_path / "same.png")
    sheet = opened(tmp_path / "same.png")
    tile = (80, 180, 250, 320)  # around the box alone
    for name in ("base model", "after training", "ground truth"):
        assert count(sheet, LINES[name][0], tile) > 20, name
    assert count(sheet, "black", tile) > 100, "dark edges"


@pytest.mark.parametrize("color", [ORANGE, BLUE, "white", "black"])
def test_a_box_is_seen_on_a_surface_of_its_own_color(tmp_path, color):
    cue = Cue(Image.new("RGB", (192, 192), color), (80, 80, 110, 110), "tiny")
    draw_cues([cue], [(20, 20, 60, 60)], [(120, 20, 160, 60)], tmp_path / "boxes.png")
    sheet, zoom = opened(tmp_path / "boxes.png"), 302 / 192
    for x, y in ((20, 20), (120, 20), (80, 80)):
        left, top = (round(v * zoom) for v in (x, y))
        around = sheet.crop((left - 8, top + 70, left + 80, top + 170))
        assert len(around.getcolors(2**16)) > 1, "the surface is not all that there is"


def test_extreme_images_and_missing_boxes_are_drawn_inside_their_tiles(tmp_path):
    far = (-1e12, -1e12, 1e12, 1e12)
    before = [EXTREME[0].box, None, far]
    draw_cues(EXTREME, before, [None, far, None], tmp_path / "extreme.png")
    sheet = opened(tmp_path / "extreme.png")
    assert sheet.width == 4 * 320
    assert ImageChops.invert(sheet.crop((960, 80, 1280, sheet.height))).getbbox() is None, (
        "the fourth is empty"
    )
    # The first tile is wide and low: below its image, crop and captions there is nothing.
    assert ImageChops.invert(sheet.crop((0, 250, 320, sheet.height))).getbbox() is None


# ---------------------------------------------------------------- one group


@pytest.mark.parametrize("cue", [CUES[0], *EXTREME], ids=["scene", "wide", "tall", "thin"])
def test_a_group_shows_every_box_and_lists_the_rest(tmp_path, cue):
    texts = [completion(cue.box)] * 3 + [
        "no box at all",
        completion((0, 0, 999999999, 999999999)),
        completion((5, 5, 1, 1)),
    ]
    draw_group(group_of(cue, texts), tmp_path / "group.png")
    draw_group(group_of(cue, texts * 4), tmp_path / "long.png")
    sheet, long = opened(tmp_path / "group.png"), opened(tmp_path / "long.png")
    assert sheet.width == long.width and sheet.width > 2 * 302 + 300
    assert long.height > 24 * 26 and long.height > sheet.height, "a line for each completion"
    assert count(sheet, BLUE, (0, 90, 622, sheet.height)) > 20, "the boxes above the mean"
    swatches = sheet.crop((631, 0, 649, sheet.height)), long.crop((631, 0, 649, long.height))
    blue, orange = ([count(part, color) for part in swatches] for color in (BLUE, ORANGE))
    assert blue[1] == 4 * blue[0] > 0 and orange[1] == 4 * orange[0] > 0


def test_a_box_that_equals_the_ground_truth_leaves_both_colors(tmp_path):
    cue = Cue(plain(192, 192), (80, 80, 110, 110), "tiny")
    draw_group(group_of(cue, [completion(cue.box), "nothing"]), tmp_path / "group.png")
    tile = opened(tmp_path / "group.png").crop((230, 300, 400, 480))
    assert count(tile, BLUE) > 20 and count(tile, "white") > 20


def test_labels_of_equal_boxes_do_not_cover_each_other(tmp_path):
    """Each label is filled with the color of its line, so ten of them show more of it than one."""
    cue = Cue(plain(192, 192), (80, 80, 110, 110), "tiny")
    filled = []
    for number in (1, 10):
        group = group_of(cue, [completion(cue.box)] * number + ["nothing"])
        draw_group(group, tmp_path / "group.png")
        filled.append(count(opened(tmp_path / "group.png"), BLUE, (0, 90, 622, 700)))
    assert filled[1] - filled[0] > 9 * 24 * 16 * 0.6


def test_a_group_without_any_box_or_advantage_is_drawn(tmp_path):
    draw_group(group_of(CUES[0], ["nothing"] * 8), tmp_path / "group.png")
    assert count(opened(tmp_path / "group.png"), BLUE) == 0


def test_a_group_of_a_text_cue_shows_no_crop(tmp_path):
    """The model never sees it: the colour of the crop is nowhere beside the image."""
    image = plain(192, 192)
    image.paste("#12f3d4", (80, 80, 110, 110))
    cue = Cue(image, (80, 80, 110, 110), "tiny", "cyan square")
    shown = []
    for with_crop in (True, False):
        draw_group(group_of(cue, ["nothing"] * 3, with_crop), tmp_path / "group.png")
        sheet = opened(tmp_path / "group.png")
        shown.append(count(sheet, "#12f3d4", (630, 0, *sheet.size)))
    assert shown[0] > 1000 and shown[1] == 0


# ---------------------------------------------------------------- attention


def drawn_attention(path, rows, names) -> Image.Image:
    draw_attention(rows, names, path)
    return opened(path)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("boxed", [True, False])
def test_attention_has_a_column_for_the_image_and_one_for_each_model(tmp_path, models, boxed):
    names = ["base model", "with adapter"][:models]
    rows = [
        (f"Where is the {cue.text}?", cue.image, [cue.box] if boxed else [], [torch.rand(8, 8)] * models)
        for cue in (CUES[0], CUES[1])
    ]
    sheet = drawn_attention(tmp_path / "a.png", rows, names)
    short = drawn_attention(tmp_path / "b.png", rows[:1], names)
    assert sheet.width == (1 + models) * 320 and short.height < sheet.height < 2 * short.height
    assert count(sheet, RED, (0, 0, 60, 40)) > 100, "what red means"
    assert ImageChops.invert(sheet.crop((60, 0, sheet.width, 90))).getbbox(), "titles"


def test_boxes_add_the_numbers_below_the_maps(tmp_path):
    cue, maps = CUES[0], [torch.rand(6, 6)]
    heights = [
        drawn_attention(tmp_path / "a.png", [("Where?", cue.image, boxes, maps)], ["base model"]).height
        for boxes in ([], [cue.box])
    ]
    assert heights[1] > heights[0]


def test_red_is_where_the_attention_is_and_maps_share_one_scale(tmp_path):
    weak, strong = torch.zeros(4, 4), torch.zeros(4, 4)
    weak[0, 0], strong[3, 3] = 0.2, 1.0
    sheet = drawn_attention(tmp_path / "a.png", [("", plain(192, 192), [], [weak, strong])], ["one", "two"])

    def redness(x: int, y: int) -> int:
        red, green, _ = sheet.getpixel((x, y))
        return red - green

    top = sheet.height - 320
    low, high = redness(320 + 30, top + 30), redness(640 + 290, top + 290)
    assert 10 < low < high / 2
    assert redness(320 + 290, top + 290) == redness(640 + 30, top + 30) == 0
    assert redness(30, top + 30) < 0, "the first column is the image as it is"


@pytest.mark.parametrize("cue", EXTREME, ids=["wide", "tall", "thin"])
def test_attention_of_extreme_images_and_long_questions(tmp_path, cue):
    question = "Is the sign to the left of the road? " * 20 + "x" * 400
    row = (question, cue.image, [cue.box], [torch.rand(2, 3)])
    sheet = drawn_attention(
        tmp_path / "a.png", [row, row], ["base model, predicting 'a very long token'" * 3]
    )
    short = drawn_attention(tmp_path / "b.png", [("Where?", *row[1:])] * 2, ["base model"])
    assert sheet.width == short.width == 2 * 320 and sheet.height > short.height + 200
    assert ImageChops.invert(sheet.crop((636, 0, 640, sheet.height))).getbbox() is None, "nothing runs off"
