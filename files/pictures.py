"""Images from users: one that cannot be used is left out and counted by its reason, and never ends a run."""

import sys
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from files.disk import visible_files
from files.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
LEAST_SIDE = 16  # pixels: the paper's smallest crop
NARROWEST = 200  # longest side ÷ shortest side: the limit of Qwen's image processors
# Not EPS, for which Pillow starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 turn the image by 90°
MOST_PIXELS = 2**27  # 400 MB of RGB; a file of a few bytes can claim terabytes


class UnusableImage(Exception):
    """The reason why an image cannot be used."""


@cache
def warn_once(message: str) -> None:
    """Prints a warning on stderr, the same one only once in a process."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


@dataclass
class LeftOut:
    """Counts of the images or annotations that are left out, by reason; warns once where it is over 1 %."""

    what: str  # "images in FOLDER", "annotations in FILE"
    total: int
    reasons: Counter = field(default_factory=Counter)
    unusable: int = 0  # without those that are left out on purpose
    warned: bool = False

    def add(self, reason: str, on_purpose: bool = False) -> None:
        self.reasons[reason] += 1
        self.unusable += not on_purpose

    def warn(self) -> None:
        """Prints a warning on stderr, once, if more than 1 % cannot be used."""
        if not self.warned and self.unusable > 0.01 * self.total:
            self.warned = True
            tqdm.write(f"warning: more than 1 % cannot be used: {self}", file=sys.stderr)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items()) or "none"
        return f"left out of {self.total:,} {self.what}: {counts}"


# ---------------------------------------------------------------- images


def load_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image as RGB; UnusableImage with the reason where that is impossible.

    size: the width and height that an annotation states for the image. Its boxes refer to the pixels either
    as they are stored or as the EXIF orientation turns them: whichever of the two has this size.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Nothing is decoded before these checks, so a file cannot claim more memory than there is.
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError  # as Pillow itself does, at a higher limit
            if min(image.size) < LEAST_SIDE:
                raise UnusableImage(f"under {LEAST_SIDE} pixels on a side")
            if max(image.size) > NARROWEST * min(image.size):
                raise UnusableImage(f"over {NARROWEST} times as long as wide")
            with suppress(Exception):  # EXIF data can be damaged in any way
                if image.size == size != size[::-1] and image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                    warn_once("boxes on photos that EXIF turns are read as on the stored pixels")
            image = image if image.size == size else ImageOps.exif_transpose(image)
            if size not in (None, image.size):
                raise UnusableImage("of another size than annotated")
            # Pillow would cut off what is above 255, and only their maker knows the range of the values.
            if image.mode[0] in "IF":
                raise UnusableImage("of over 8 bits a value")
            # A palette with transparency becomes RGB correctly only by way of RGBA. Pixels that one sees
            # through would keep a hidden colour, mostly black, as the strokes of a drawing: white is behind.
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # decoders raise any exception on a broken file
        reasons = {UnusableImage: str(error), FileNotFoundError: "missing"}
        reasons[Image.DecompressionBombError] = f"larger than {MOST_PIXELS:,} pixels"
        if isinstance(error, UnidentifiedImageError) and path.read_bytes()[4:8] in (b"ftyp", b"jP  "):
            reasons[type(error)] = "of a format that is not read, such as HEIC"
        raise UnusableImage(reasons.get(type(error), "broken or not an image")) from None


@dataclass
class Photos:
    """The images of a folder, each opened when a cue needs it; an unusable one is opened and counted once."""

    folder: Path
    left_out: LeftOut
    unusable: set[tuple] = field(default_factory=set)  # names and annotated sizes

    def open(self, name: str, size: tuple[int, int] | None = None, address: str = "") -> Image.Image | None:
        """The image as RGB (see load_image for `size`), or None if it cannot be used.

        address: on the web, for those who download it.
        """
        if (name, size) not in self.unusable:
            try:
                return load_image(self.folder / name, size)
            except UnusableImage as reason:
                self.unusable.add((name, size))
                self.left_out.add(str(reason))
                self.left_out.warn()
        return None


def in_split(name: int | str, split: str, one_in: int) -> bool:
    """Whether an image belongs to the split: one image in `one_in` is held out, chosen by its name or id.

    The choice depends on no seed, so a training cue never comes from a held-out image.
    """
    # surrogatepass: a file name need not be valid Unicode.
    return (zlib.crc32(str(name).encode(errors="surrogatepass")) % one_in == 0) == (split != "train")


def open_folder(folder: Path, split: str) -> tuple[list[str], Photos]:
    """The names of a split's images in a folder and its subfolders, and the Photos that opens them."""
    files = list(visible_files(folder))
    names = (p.relative_to(folder).as_posix() for p in files if p.suffix.lower() in SUFFIXES)
    names = sorted(name for name in names if in_split(name, split, 10))
    if not names:
        others = Counter(p.suffix.lower() for p in files if p.suffix.lower() not in SUFFIXES)
        held = ", ".join(f"{n:,} {suffix:.20}" for suffix, n in others.most_common(5)) or "none"
        remedy = f"give a folder with more images of {' '.join(SUFFIXES)}"
        raise UserError(f"--data {folder} has no image for {split} cues (other files: {held}): {remedy}.")
    return names, Photos(folder, LeftOut(f"{split} images in {folder}", len(names)))


# ---------------------------------------------------------------- a sheet of cues to look at


def contact_sheet(cues: Any, n: int) -> Image.Image:
    """Cues 0 to n − 1, three a row: the image with its window, what to find (crop or text), size class."""
    sheet = Image.new("RGB", (3 * 480, -(-n // 3) * 260), "white")
    for i in range(n):
        cue, x, y = cues[i], i % 3 * 480 + 10, i // 3 * 260 + 10
        image = cue.image.copy()
        ImageDraw.Draw(image).rectangle(cue.box, outline="magenta", width=max(1, max(image.size) // 120))
        shown = ImageOps.contain(image, (320, 240))
        sheet.paste(shown, (x, y))
        x += shown.width + 10
        if cues.cfg.source != "text":  # with a text cue, the model sees no crop
            sheet.paste(ImageOps.contain(cue.crop, (130, 130)), (x, y))
        label = f"cue {i} ({cue.size})\n{cue.text or ''}\nin the pink box"
        ImageDraw.Draw(sheet).text((x, y + 140), label, fill="black", font_size=16)
    return sheet
