"""Pictures of cues, of boxes before and after training, and of one group: people look before they read."""

from pathlib import Path

from PIL import Image, ImageDraw

from data import Cue
from reward import Box, iou, parse_box


def draw_box(draw: ImageDraw.ImageDraw, box: Box | None, zoom: float, color: str, width: int = 2) -> None:
    if box is not None:
        x1, y1, x2, y2 = (v * zoom for v in box)
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=color, width=width)


def draw_cues(cues: list[Cue], before: list, after: list | None, path: Path, n: int = 8) -> None:
    """Cues with the true box (white), the box before (red) and after training (green); the crop below."""
    side = 320
    columns = 4
    tile, crop = (side, side + 72), 64
    sheet = Image.new("RGB", (columns * tile[0], -(-n // columns) * tile[1]), "white")
    for i, cue in enumerate(cues[:n]):
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


def draw_group(shown: dict, path: Path) -> None:
    """One group: its G boxes, from blue (advantage below 0) to red (above), and the rewards beside."""
    cue, side = shown["cue"], 576
    zoom = side / max(cue.image.size)
    sheet = Image.new("RGB", (side + 260, side), "white")
    sheet.paste(cue.image.resize([round(v * zoom) for v in cue.image.size], Image.Resampling.BICUBIC), (0, 0))
    draw = ImageDraw.Draw(sheet)
    draw_box(draw, cue.box, zoom, "white", 5)
    sheet.paste(cue.crop.resize((96, 96)), (side + 12, 12))
    draw.text((side + 120, 36), "the cue\n(true box white)", "black", font_size=16)
    order = sorted(range(len(shown["answers"])), key=lambda g: shown["advantages"][g])
    for line, g in enumerate(reversed(order)):
        strength = max(-1.0, min(1.0, shown["advantages"][g] / 2))
        color = (
            (255, round(200 - 200 * strength), 0) if strength > 0 else (0, round(200 + 200 * strength), 255)
        )
        box = parse_box(shown["answers"][g])
        draw_box(draw, box and shown["frame"].to_pixels(box), zoom, color, 3)
        y = 130 + 24 * line
        draw.rectangle((side + 12, y + 2, side + 28, y + 18), fill=color)
        text = f"reward {shown['rewards'][g].total:.2f}  A {shown['advantages'][g]:+.2f}"
        draw.text((side + 38, y), text, "black", font_size=16)
    sheet.save(path)
