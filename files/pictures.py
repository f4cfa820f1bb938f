"""Images from users: one that cannot be used is left out and counted by its reason, and never ends a run."""

import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from files.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LEAST_SIDE = 16  # pixels: the paper's smallest crop
NARROWEST = 200  # longest side ÷ shortest side: the limit of Qwen's image processors
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not EPS, for which Pillow starts Ghostscript
MOST_PIXELS = 2**27  # 400 MB of RGB; a file of a few bytes can claim terabytes


class UnusableImage(Exception):
    """The reason why an image cannot be used."""


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
            image = image if image.size == size else ImageOps.exif_transpose(image)
            if size not in (None, image.size):
                raise UnusableImage("of another size than annotated")
            if image.mode.startswith("I"):  # 16 bits per pixel; Pillow would make 255 of all values above 255
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            # A palette with transparency becomes RGB correctly only by way of RGBA.
            return image.convert("RGBA").convert("RGB")
    except Exception as error:  # decoders raise any exception on a broken file
        reasons = {UnusableImage: str(error), FileNotFoundError: "missing"}
        reasons[Image.DecompressionBombError] = f"larger than {MOST_PIXELS:,} pixels"
        raise UnusableImage(reasons.get(type(error), "broken or not an image")) from None


@dataclass
class Photos:
    """The images of a folder, each opened when a cue needs it; an unusable one is opened and counted once."""

    folder: Path
    left_out: LeftOut
    unusable: set[tuple] = field(default_factory=set)  # names and annotated sizes

    def open(self, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
        """The image as RGB (see load_image for `size`), or None if it cannot be used."""
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
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    names = sorted(name for name in names if in_split(name, split, 10))
    if not names:
        raise UserError(f"--data {folder} has no image for {split} cues: give a folder with more images.")
    return names, Photos(folder, LeftOut(f"{split} images in {folder}", len(names)))
