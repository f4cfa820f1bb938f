"""Photos as they are found: whatever cannot be used is left out and counted, never fatal."""

import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from files.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LEAST_SIDE = 16  # pixels: the paper's smallest crop
NARROWEST = 200  # times as long as wide: image processors take no more
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # of others, EPS would be run by a program
MOST_PIXELS = 2**27  # 400 MB of pixels; a small file can claim to hold terabytes


class UnusableImage(Exception):
    """Why a picture cannot be used."""


@dataclass
class LeftOut:
    """What is not drawn from, by reason; over 1 % that cannot be used is a warning, once."""

    what: str  # boxes or images, and of what
    total: int
    reasons: Counter = field(default_factory=Counter)
    unusable: int = 0  # of them, those that nobody wanted to leave out
    warned: bool = False

    def add(self, reason: str, on_purpose: bool = False) -> None:
        self.reasons[reason] += 1
        self.unusable += not on_purpose

    def warn(self) -> None:
        if not self.warned and self.unusable > 0.01 * self.total:
            self.warned = True
            tqdm.write(f"warning: more than 1 % cannot be used: {self}", file=sys.stderr)

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.items()) or "none"
        return f"of {self.total:,} {self.what} left out: {counts}"


# ---------------------------------------------------------------- pictures


def load_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB pixels: raw if of the `size` that boxes refer to, else turned as EXIF says. Unfit says why not."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnusableImage(f"larger than {MOST_PIXELS:,} pixels")
            if min(image.size) < LEAST_SIDE:
                raise UnusableImage(f"with a side under {LEAST_SIDE} pixels")
            if max(image.size) > NARROWEST * min(image.size):
                raise UnusableImage(f"over {NARROWEST} times as long as wide")
            image = image if image.size == size else ImageOps.exif_transpose(image)
            if size not in (None, image.size):
                raise UnusableImage("of another size than annotated")
            if image.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
                image = image.convert("I").point(lambda v: v / 256).convert("L")
            return image.convert("RGBA").convert("RGB")
    except Image.DecompressionBombError:
        raise UnusableImage(f"larger than {MOST_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise UnusableImage("missing") from None
    except UnusableImage:
        raise
    except Exception:  # decoders raise anything on a broken file
        raise UnusableImage("broken, or no picture") from None


@dataclass
class Photos:
    """A folder's pictures, opened when asked for; an unfit one is counted at its first touch."""

    folder: Path
    left_out: LeftOut
    unusable: set[tuple] = field(default_factory=set)

    def open(self, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
        if (name, size) not in self.unusable:
            try:
                return load_image(self.folder / name, size)
            except UnusableImage as why:
                self.unusable.add((name, size))
                self.left_out.add(str(why))
                self.left_out.warn()
        return None


def in_split(name: int | str, split: str, one_in: int) -> bool:
    """A share of the images is held out, by name: whatever the seed, no training cue ever comes from them."""
    return (zlib.crc32(str(name).encode(errors="surrogatepass")) % one_in == 0) == (split != "train")


def open_folder(folder: Path, split: str) -> tuple[list[str], Photos]:
    """The names of a split's pictures in a folder and those below it, and how to open them."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    names = [name for name in names if in_split(name, split, 10)]
    if not names:
        raise UserError(f"--data {folder} has no image for {split} cues: give a folder with more images.")
    return names, Photos(folder, LeftOut(f"{split} images in {folder}", len(names)))
