"""Pictures of cues, of boxes before and after training, and of one group: people look before they read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import Cue
from reward import Box, iou, parse_box


def draw_box(draw: ImageDraw.ImageDraw, box: Box | None, zoom: float, color: str, width: int = 2) -> None:
    if box is not None:
        x1, y1, x2, y2 = (v * zoom for v in box)
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=color, width=width)


def draw_cues(cues: Sequence[Cue], before: list, after: list | None, path: Path, n: int = 8) -> None:
    """Cues with the true box (white), the box before (red) and after training (green); the crop below."""
    side = 320
    columns = 4
    tile, crop = (side, side + 72), 64
    sheet = Image.new("RGB", (columns * tile[0], -(-n // columns) * tile[1]), "white")
    for i in range(min(n, len(cues))):
        cue = cues[i]
        zoom = side / max(cue.image.size)
        picture = cue.image.resize([round(v * zoom) for v in cue.image.size], Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        draw_box(draw, cue.box, zoom, "white", 4)
        draw_box(draw, before[i], zoom, "#ff4040")
        draw_box(draw, after[i] if after else None, zoom, "#20ff60")
        x, y = i % columns * tile[0], i // columns * tile[1]
        sheet.paste(picture, (x, y))
        sheet.paste(cue.crop.resize((crop, crop)), (x + 4, y + side + 4))
        scores = f"IoU before {iou(before[i], cue.box) if before[i] else 0:.2f}"
        if after:
            scores += f"\n        after {iou(after[i], cue.box) if after[i] else 0:.2f}"
        ImageDraw.Draw(sheet).text((x + crop + 12, y + side + 16), scores, "black", font_size=16)
    sheet.save(path)


def draw_group(group: Any, path: Path) -> None:
    """One group: its G boxes, from blue (advantage below 0) to red (above), and the rewards beside."""
    cue, side = group.example.cue, 576
    zoom = side / max(cue.image.size)
    sheet = Image.new("RGB", (side + 260, side), "white")
    sheet.paste(cue.image.resize([round(v * zoom) for v in cue.image.size], Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(sheet)
    draw_box(draw, cue.box, zoom, "white", 5)
    sheet.paste(cue.crop.resize((96, 96)), (side + 12, 12))
    draw.text((side + 120, 36), "the cue\n(true box white)", "black", font_size=16)
    order = sorted(range(len(group.completions)), key=lambda g: group.advantages[g])
    for line, g in enumerate(reversed(order)):
        strength = max(-1.0, min(1.0, group.advantages[g] / 2))
        color = (
            (255, round(200 - 200 * strength), 0) if strength > 0 else (0, round(200 + 200 * strength), 255)
        )
        box = parse_box(group.completions[g])
        draw_box(draw, box and group.example.prompt.frame.to_pixels(box), zoom, color, 3)
        y = 130 + 24 * line
        draw.rectangle((side + 12, y + 2, side + 28, y + 18), fill=color)
        text = f"reward {group.rewards[g].total:.2f}  A {group.advantages[g]:+.2f}"
        draw.text((side + 38, y), text, "black", font_size=16)
    sheet.save(path)


def draw_attention(
    rows: list[tuple[str, Image.Image, list[Box], list[Tensor]]], names: list[str], path: Path
) -> None:
    """Heat-maps: a row for each (title, image, boxes in its pixels, layer-averaged maps [rows, columns]).

    All maps of a row, before and after, share one scale; the lower 60 % of their values are transparent.
    """
    side, gap = 320, 24
    sheet = Image.new(
        "RGB", ((1 + max(len(maps) for *_, maps in rows)) * side, len(rows) * (side + gap)), "white"
    )
    for line, (title, image, boxes, maps) in enumerate(rows):
        zoom, y = side / max(image.size), line * (side + gap) + gap
        plain = image.resize([max(1, round(v * zoom)) for v in image.size], Image.Resampling.BICUBIC)
        values = torch.cat([layer.flatten() for layer in maps])
        low, high = values.quantile(0.6).item(), values.max().item()
        ImageDraw.Draw(sheet).text((4, y - gap + 4), title, "black", font_size=15)
        for column, layer in enumerate([None, *maps]):
            tile = plain.copy()
            if layer is not None:
                strength = (255 * (layer - low) / (high - low + 1e-12)).clamp(0, 255)  # [rows, columns]
                alpha = Image.fromarray(strength.byte().numpy()).resize(plain.size, Image.Resampling.BILINEAR)
                tile.paste(Image.new("RGB", plain.size, "#ff2000"), mask=alpha.point(lambda v: v * 0.8))
            for box in boxes:
                draw_box(ImageDraw.Draw(tile), box, zoom, "white")
            sheet.paste(tile, (column * side, y))
    sheet.save(path)
