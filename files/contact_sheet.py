"""A sheet of cues to look at, for `python data.py show`."""

from typing import Any

from PIL import Image, ImageDraw, ImageOps


def contact_sheet(cues: Any, n: int) -> Image.Image:
    """Cues 0 to n − 1, three a row: the image with its window, what to find (crop or text), size class."""
    sheet = Image.new("RGB", (3 * 480, -(-n // 3) * 260), "white")
    for i in range(n):
        cue, x, y = cues[i], i % 3 * 480 + 10, i // 3 * 260 + 10
        image = cue.image.copy()
        ImageDraw.Draw(image).rectangle(cue.box, outline="magenta", width=max(1, max(image.size) // 120))
        sheet.paste(ImageOps.contain(image, (320, 240)), (x, y))
        if cues.cfg.source != "text":  # with a text cue, the model sees no crop
            sheet.paste(ImageOps.contain(cue.crop, (130, 130)), (x + 330, y))
        label = f"cue {i} ({cue.size})\n{cue.text or ''}\nin the pink box"
        ImageDraw.Draw(sheet).text((x + 330, y + 140), label, fill="black", font_size=16)
    return sheet
