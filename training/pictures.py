"""Draws PNG files that explain themselves: boxes before and after training, one group, attention.

Every sheet is put together from blocks of pixels that stand beside or below each other. So no block covers
another and no text leaves the sheet, whatever the shape of a photo and the length of a question.
"""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import Cue
from evaluation.attention import attention_in_box, attention_maps
from evaluation.session import Session
from reward import Box, iou, parse_box

SIDE = 302  # pixels of an image's longer side
MARGIN = 9  # white pixels around an image: the edges of its boxes grow into them
# Orange and sky blue differ for every kind of colour blindness; both are light, so black edges set them off.
ORANGE, BLUE, RED = "#f5a11c", "#56b4e9", "#f01000"
SOLID = 10**6
# Boxes that coincide can all be seen: a narrow line leaves the outer part of a wide one visible, and the gaps
# of a dashed one show what is below it.
LINES = {  # color, width in pixels, pixels of a dash
    "base model": (ORANGE, 6, SOLID),
    "after training": (BLUE, 3, SOLID),
    "prediction": (BLUE, 3, SOLID),
    "ground truth": ("white", 2, 5),
    "advantage > 0": (BLUE, 3, SOLID),
    "advantage 0 or below": (ORANGE, 3, SOLID),
}

# ---------------------------------------------------------------- blocks of pixels


def beside(blocks: Sequence[Image.Image], align: float = 0.0) -> Image.Image:
    """Several blocks from left to right as one block; align: 0 along their tops, 0.5 along their middles."""
    size = sum(block.width for block in blocks), max(block.height for block in blocks)
    sheet, x = Image.new("RGB", size, "white"), 0
    for block in blocks:
        sheet.paste(block, (x, round(align * (sheet.height - block.height))))
        x += block.width
    return sheet


def below(blocks: Sequence[Image.Image]) -> Image.Image:
    """Several blocks from top to bottom as one block."""
    flip = Image.Transpose.TRANSPOSE
    return beside([block.transpose(flip) for block in blocks]).transpose(flip)


def text_block(text: str, width: int, font_size: int = 16) -> Image.Image:
    """A block of this width with its text in as many lines as it needs; longer words are broken."""
    font, line_height = ImageFont.load_default(font_size), font_size + 4
    for characters in range(width // 4, 0, -1):  # the longest lines that fit
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width - 2 * MARGIN for line in lines):
            break
    block = Image.new("RGB", (width, line_height * len(lines) + 8), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(block).text((MARGIN, line_height * i + 5), line, "black", font)
    return block


def image_block(image: Image.Image, side: int, boxes: Sequence[tuple[str, Box | None]] = ()) -> Image.Image:
    """An image in a margin, its longer side scaled to `side`, as wide as a square image's block.

    boxes: names in LINES and boxes in pixels of the image, drawn in this order; None is left out.
    """
    width, height = (max(1, round(v * side / max(image.size))) for v in image.size)
    block = Image.new("RGB", (side + 2 * MARGIN, height + 2 * MARGIN), "white")
    block.paste(image.resize((width, height), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    for name, box in boxes:
        if box is not None:
            draw_box(block, place_of(box, image.size, side), name)
    return block


def place_of(box: Box, size: tuple[int, int], side: int) -> list[int]:
    """A box of an image of this size (width, height) in pixels of its block; clipped to the image."""
    return [MARGIN + round(min(max(v, 0), limit) * side / max(size)) for v, limit in zip(box, size * 2)]


def draw_box(block: Image.Image, place: list[int], name: str) -> None:
    """Draws the line `name` around the pixels of a place, with a black edge on both of its sides."""
    (x1, y1, x2, y2), (color, width, dash) = place, LINES[name]
    drawn = block.copy()
    for fill, grow, thickness in (("black", width + 1, width + 2), (color, width, width)):
        corners = (x1 - grow, y1 - grow, max(x1, x2 - 1) + grow, max(y1, y2 - 1) + grow)
        ImageDraw.Draw(drawn).rectangle(corners, outline=fill, width=thickness)
    # Diagonal stripes cut all four edges into dashes.
    stripes = (torch.arange(block.height)[:, None] + torch.arange(block.width)) // dash % 2 == 0  # [h, w]
    block.paste(drawn, mask=Image.fromarray(stripes.numpy()))


def legend(names: Sequence[str]) -> Image.Image:
    """A sample of each line of LINES with its name."""
    plain, box = Image.new("RGB", (52, 30), "#606060"), (11, 9, 41, 21)
    samples = [(image_block(plain, plain.width, [(name, box)]), text_block(name, 190)) for name in names]
    return beside([beside(pair, 0.5) for pair in samples])


def paste_number(block: Image.Image, number: int, color: str, place: Sequence[int], taken: list) -> None:
    """Pastes a filled label with a number above a box's place, or where there is room near it.

    taken: the places (x1, y1, x2, y2) that no label may cover; the label's own is appended.
    """
    label = ImageOps.expand(Image.new("RGB", (24, 16), color), 1)
    ImageDraw.Draw(label).text((13, 9), str(number), "black", font_size=14, anchor="mm")
    columns, rows = range(0, block.width - 25, 13), range(0, block.height - 17, 9)
    spots = [(x, y, x + 26, y + 18) for x in columns for y in rows]
    spots.sort(key=lambda spot: (spot[0] - place[0]) ** 2 + (spot[3] - place[1]) ** 2)
    free = (spot for spot in spots if not any(iou(spot, other) for other in taken))
    taken.append(next(free, spots[0]))
    block.paste(label, taken[-1])


# ---------------------------------------------------------------- the sheets


def draw_cues(cues: Sequence[Cue], before: list, after: list | None, path: Path, n: int = 8) -> None:
    """The first n cues, four a row: the image with its boxes; below it the crop and the IoU of each box.

    before, after: the predicted boxes in pixels of the cues' images, None where a completion has none;
    `after` is None where there is one model.
    """
    names, tiles = ("base model", "after training")[: 1 if after is None else 2], []
    for i, cue in zip(range(n), cues):  # opens no image beyond the n-th
        boxes = [(name, part[i]) for name, part in zip(names, (before, after))]
        scores = [f"{name}: {f'IoU {iou(box, cue.box):.2f}' if box else 'no box'}" for name, box in boxes]
        captions = below([text_block(text, 222) for text in ("crop to find", *scores)])
        tile = image_block(cue.image, SIDE, [*boxes, ("ground truth", cue.box)])
        tiles.append(below([tile, beside([image_block(cue.crop, 80), captions], 0.5)]))
    title = "Task: find the crop in the image. IoU: overlap of a box with the ground truth, from 0 to 1."
    rows = [beside(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    below([text_block(title, 1280, 18), legend(["ground truth", *names]), *rows]).save(path)


def group_boxes(group: Any) -> list[Box | None]:
    """The predicted boxes of a group in pixels of its cue's image; None for a completion without one."""
    frame = group.example.prompt.frame
    return [box and frame.to_pixels(box) for box in map(parse_box, group.completions)]


def line_name(advantage: float) -> str:
    """The line in LINES of a completion's box."""
    return "advantage > 0" if advantage > 0 else "advantage 0 or below"


def draw_numbered_boxes(cue: Cue, ranked: Sequence[tuple[str, Box | None]], side: int) -> Image.Image:
    """The block of a cue's image with its box and predicted ones, numbered from 1; the first on top.

    ranked: names in LINES and boxes in pixels of the image; None has no box, but a number.
    """
    tile = image_block(cue.image, side, [*reversed(ranked), ("ground truth", cue.box)])
    taken = [place_of(cue.box, cue.image.size, side)]
    for number, (name, box) in enumerate(ranked, 1):
        if box:
            paste_number(tile, number, LINES[name][0], place_of(box, cue.image.size, side), taken)
    return tile


def draw_group(group: Any, path: Path) -> None:
    """One group: the image with its numbered boxes; what to find; rewards and advantages, the best first."""
    cue, boxes, advantages = group.example.cue, group_boxes(group), group.advantages
    names = [line_name(advantage) for advantage in advantages]
    ranked = sorted(range(len(boxes)), key=lambda g: -advantages[g])
    tile = draw_numbered_boxes(cue, [(names[g], boxes[g]) for g in ranked], 2 * SIDE)
    table = [beside([image_block(cue.crop, 96), text_block("crop to find", 220)], 0.5)]
    if len(group.example.prompt.images) == 1:  # the model sees no crop
        table = [text_block(f"in words, without a crop: {cue.text}", 340)]
    for number, g in enumerate(ranked, 1):
        color, ending = LINES[names[g]][0], "" if boxes[g] else ", no box"
        text = f"{number}:  reward {group.rewards[g].total:.2f}, advantage {advantages[g]:+.2f}{ending}"
        table.append(beside([image_block(Image.new("RGB", (18, 12), color), 18), text_block(text, 340)], 0.5))
    sheet = beside([tile, below(table)])
    title = f"One group: {len(ranked)} completions of the same prompt. "
    title += "Advantage > 0: better than the group's mean, made more likely."
    lines = legend(["ground truth", *sorted(set(names), reverse=True)])  # "> 0" first
    below([text_block(title, sheet.width, 18), lines, sheet]).save(path)


def draw_attention(rows: Sequence[tuple], names: list[str], path: Path) -> None:
    """Heat maps: a row for each (title, image, boxes in its pixels, layer-averaged maps [rows, columns]).

    names: the titles of the maps. All maps of a row, before and after, share one scale; the lower 60 % of
    their values are transparent.
    """
    width, heads = SIDE + 2 * MARGIN, ("image", *names)
    note = "Red: where the model looks when it predicts the first token of its answer, the mean over heads"
    note += " and layers. All maps of a row share one scale."
    note += " Dashed: the object that the question is about." if any(boxes for _, _, boxes, _ in rows) else ""
    swatch = image_block(Image.new("RGB", (36, 16), RED), 36)
    note = beside([swatch, text_block(note, len(heads) * width - swatch.width)], 0.5)
    blocks = [note, beside([text_block(head, width, 18) for head in heads])]
    for title, image, boxes, maps in rows:
        values = torch.cat([layer.flatten() for layer in maps])
        low, high = values.quantile(0.6).item(), values.max().item()
        pale = ImageOps.colorize(image.convert("L"), "#606060", "white")  # no object is red
        evidence = [("ground truth", box) for box in boxes]
        tiles = [image_block(image, SIDE, evidence)]
        for layer in maps:
            strength = (200 * (layer - low) / (high - low + 1e-12)).clamp(0, 200)  # [rows, columns]
            alpha = Image.fromarray(strength.byte().numpy()).resize(image.size, Image.Resampling.BILINEAR)
            heat_map = Image.composite(Image.new("RGB", image.size, RED), pale, alpha)
            stats = attention_in_box(layer[None], boxes, image.size)
            text = f"{stats.mean_aib:.0%} of the attention in the box, {stats.chance:.0%} by chance"
            numbers = [text_block(text, width, 14)] if boxes else []
            tiles.append(below([image_block(heat_map, SIDE, evidence), *numbers]))
        blocks += [text_block(title, len(tiles) * width, 20), beside(tiles)]
    below(blocks).save(path)


def draw_heat_maps(session: Session, rows: Sequence[tuple], prompts_by_model: list, names: list) -> None:
    """attention.png of a session: a row per (title, image, boxes in its pixels), a column per model.

    prompts_by_model: for each model the prompts of all images, whose last token predicts the answer.
    """
    columns = []
    try:
        for _, prompts in zip(session.each_model(), prompts_by_model, strict=True):
            columns.append([attention_maps(session.policy, [prompt])[0].mean(0) for prompt in prompts])
    except torch.OutOfMemoryError:
        print("The memory is too small for attention.png: give a smaller image.", file=sys.stderr)
        return
    rows = [(*row, maps) for row, maps in zip(rows, zip(*columns), strict=True)]
    draw_attention(rows, names, session.folder / "attention.png")
