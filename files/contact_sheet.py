"""A sheet of cues to look at, for `python data.py show`."""

from typing import Any

from PIL import Image, ImageDraw, ImageOps


def contact_sheet(cues: Any, n: int) -> Image.Image:
    """Cues 0 to n − 1, three a row: the image with its window, what to find (crop or text), size class."""
    sheet = Image.new("RGB", (3 * 480, -(-n // 3) * 260), "white")
    for i in range(n):
        cue, x, y = cues[i], i % 3 * 480 + 10, i // 3 * 260 + 10
        image = ImageOps.contain(cue.image, (320, 240))
        box = [v * image.width / cue.image.width for v in cue.box]
        ImageDraw.Draw(image).rectangle(box, outline="magenta", width=2)
        sheet.paste(image, (x, y))
        x += image.width + 10
        label = f"cue {i}: the crop\nin the pink box\n{cue.size}\n{cue.text or ''}"
        if cues.cfg.source == "text":  # the model sees no crop
            label = f"cue {i}, text alone:\n{cue.text}\nin the pink box\n{cue.size}"
        else:
            sheet.paste(ImageOps.contain(cue.crop, (130, 130)), (x, y))
        ImageDraw.Draw(sheet).text((x, y + 140), label, fill="black", font_size=16)
    return sheet
