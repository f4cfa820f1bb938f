"""Downloads the COCO images that the first cues use; an image gets its final name only once it is checked.

Uses urllib: httpx made this no shorter, and what transformers installs today is httpx2, of no fixed version.
"""

import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image
from tqdm import tqdm

from files.errors import UserError
from files.pictures import Photos, UnusableImage, load_image

READ_TIMEOUT_SECONDS = 30  # without a byte
MAX_SECONDS = 300  # for one file
MAX_BYTES = 50_000_000  # of one file
RETRY_PAUSES = (0, 1, 2, 4)  # seconds before each attempt
THREADS = 8
MAX_FAILURES_IN_A_ROW = 16  # so many mean that the network fails, not the images
INVALID_NAME_ERRORS = (EEXIST, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY)
DECODING = threading.Lock()  # a small file can hold 400 MB of pixels, so only one is decoded at a time


class PermanentFailure(UnusableImage):
    """The reason why an image cannot be downloaded, where another attempt would not help."""


@dataclass
class ImageDownloads(Photos):
    """Replaces Photos while cues are drawn and records which images they use.

    `unusable` holds only images whose download failed: the cues that would use one are drawn again.
    """

    used: set[tuple] = field(default_factory=set)  # names, annotated sizes, addresses: by the last draw

    def open(self, *key: object) -> Image.Image | None:
        """A blank image instead of the real one, or None if its download failed; key: as in `used`."""
        self.used |= {key} - self.unusable
        return Image.new("1", (1, 1)) if key in self.used else None


def fetch_bytes(url: object) -> bytes:
    """What an http or https address holds; PermanentFailure, or UnusableImage where a retry may help."""
    if not isinstance(url, str) or not url:
        raise PermanentFailure("without an address")
    if not url.lower().startswith(("http://", "https://")):  # urllib opens file: and ftp: too
        raise PermanentFailure("whose address is not http or https")
    body, deadline = bytearray(), time.monotonic() + MAX_SECONDS
    try:
        request = Request(url, headers={"User-Agent": "locus-mini"})
        with urlopen(request, timeout=READ_TIMEOUT_SECONDS) as response:
            length = response.length or 0  # 0 where the server does not state it
            while max(len(body), length) <= MAX_BYTES and (chunk := response.read1(2**16)):
                body += chunk
                if time.monotonic() > deadline:
                    raise UnusableImage("too slow")
    except HTTPError as error:
        error.close()
        retry = error.code >= 500 or error.code in (408, 429)
        raise (UnusableImage if retry else PermanentFailure)(f"answered with HTTP {error.code}") from None
    # urllib raises the last two for an address or a port that is not valid.
    except (OSError, HTTPException, ValueError, ArithmeticError):
        raise UnusableImage("out of reach") from None
    if max(len(body), length) > MAX_BYTES:
        raise PermanentFailure(f"over {MAX_BYTES / 1e6:.0f} MB")
    return bytes(body)  # one that is incomplete fails the check of the image


def save_image(folder: Path, name: str, size: tuple[int, int], body: bytes) -> None:
    """Writes NAME.part and renames it if it holds a complete image of the annotated size.

    UnusableImage where it does not, PermanentFailure where no file can have this name, UserError where the
    disk cannot be written.
    """
    part = folder / f"{name}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(body)
            with DECODING:
                load_image(part, size)
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in INVALID_NAME_ERRORS:
            raise UserError(f"{part} cannot be written ({error.strerror}): free space or allow it.") from None
        raise PermanentFailure("whose name no file can have") from None


def download_image(folder: Path, name: str, size: tuple[int, int], address: str) -> str:
    """Downloads an image unless the folder has it. Returns the reason if that failed, else ""."""
    with suppress(UnusableImage), DECODING:
        load_image(folder / name, size)
        return ""
    for pause in RETRY_PAUSES:
        time.sleep(pause)
        try:
            save_image(folder, name, size, fetch_bytes(address))
            return ""
        except PermanentFailure as failure:
            return str(failure)
        except UnusableImage as failure:
            reason = str(failure)
    return reason


def download_images(downloads: ImageDownloads, draw: Callable[[], object]) -> None:
    """Draws cues and downloads the images they use, until a draw uses none that is missing.

    UserError after MAX_FAILURES_IN_A_ROW: without a network, every image would be left out.
    """
    checked, failures = set(), 0

    def missing_images() -> list[tuple]:
        downloads.used.clear()
        draw()
        # One key per path, so that no two threads write the same file.
        return list({downloads.folder / key[0]: key for key in downloads.used - checked}.values())

    # Not thread_map: on Ctrl-C or an error it waits for downloads in progress; ThreadPool's threads just end.
    with ThreadPool(THREADS) as pool:
        while missing := missing_images():
            checked.update(missing)
            results = pool.imap_unordered(lambda key: (key, download_image(downloads.folder, *key)), missing)
            for key, reason in tqdm(results, "images", len(missing), unit=" files"):
                if reason:
                    downloads.unusable.add(key)
                    downloads.left_out.add(reason)
                # An image without an address says nothing about the network.
                failures = failures + bool(key[2]) if reason else 0
                if failures == MAX_FAILURES_IN_A_ROW:
                    last = f"the last is {key[2]!r}, {reason}"
                    raise UserError(f"{failures} images in a row failed ({last}): check the network.")


def training_command(downloads: ImageDownloads, limit: int, heldout: int, flags: dict[str, object]) -> str:
    """One line: what was downloaded, what is left out, and the command that trains on the same cues."""
    sizes = [(downloads.folder / name).stat().st_size for name, *_ in downloads.used]
    flags = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "coco", **flags, "preset": "qlora"}
    flags |= {"prompts": (prompts := min(16, limit)), "steps": limit // prompts, "eval-cues": heldout}
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    cues = f"{limit:,} training and {heldout:,} held-out cues"
    images = f"{len(sizes):,} images, {sum(sizes) / 1e6:,.1f} MB"
    return f"{cues}: {images}; {downloads.left_out}; train with: python locus_mini.py {' '.join(words)}"
