"""Downloads the COCO images that the first cues use, each one checked before it gets its final name.

By urllib: httpx made this no shorter, and the package that transformers brings is httpx2 today, unpinned.
"""

import json
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image
from tqdm import tqdm

from files.coco import photo_problem, read
from files.errors import UserError
from files.pictures import LeftOut, Photos, UnusableImage, load_image

READ_TIMEOUT_SECONDS = 30  # without a byte
MAX_SECONDS = 300  # of one file
MAX_BYTES = 50_000_000  # of one file
RETRY_PAUSES = (0, 1, 2, 4)  # seconds before each attempt
THREADS = 8
IN_A_ROW = 16  # failures: then the network is at fault, not the images
NO_ADDRESS = "without an address"
INVALID_NAME_ERRORS = (EEXIST, EINVAL, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, ENOTEMPTY)
DECODING = threading.Lock()  # a small file can hold 400 MB of pixels, so only one is decoded at a time

Key = tuple[str, tuple[int, int]]  # an image's name and annotated size (width, height) in pixels


class PermanentFailure(UnusableImage):
    """Why an image cannot be downloaded, where a retry would not help."""


@dataclass
class ImageDownloads(Photos):
    """Takes the place of Photos while cues are drawn and records which images they use.

    `unfit` holds only the images that could not be downloaded, so that other cues are drawn instead.
    """

    addresses: dict[Key, Any] = field(default_factory=dict)
    used: set[Key] = field(default_factory=set)  # by the last draw

    def open(self, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
        """A blank image in place of the real one; None if its download failed."""
        if (name, size) in self.unusable:
            return None
        self.used.add((name, size))
        return Image.new("1", (1, 1))


def open_downloads(folder: Path, annotations: Path) -> ImageDownloads:
    """Creates the folder and reads the images' addresses from COCO's instances JSON; else UserError."""

    def parse(text: str) -> dict[Key, Any]:
        # Annotations, which fill most of the file, are dropped as soon as they are parsed.
        data = json.loads(text, object_hook=lambda entry: None if "bbox" in entry else entry)
        valid = [photo for photo in data["images"] if not photo_problem(photo, {})]
        return {(p["file_name"], (p["width"], p["height"])): p.get("coco_url") for p in valid}

    addresses = read("annotations", annotations, "COCO instances JSON", parse)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): give another folder.") from None
    return ImageDownloads(folder, LeftOut(f"images of {annotations}", len(addresses)), addresses=addresses)


def fetch_bytes(url: Any) -> bytes:
    """The content of an http or https address; PermanentFailure, or Unfit where a retry may help."""
    if not isinstance(url, str) or not url:
        raise PermanentFailure(NO_ADDRESS)
    if not url.lower().startswith(("http://", "https://")):  # urllib opens file: and ftp: too
        raise PermanentFailure("whose address is not of http or https")
    body, deadline = bytearray(), time.monotonic() + MAX_SECONDS
    try:
        request = Request(url, headers={"User-Agent": "locus-mini"})
        with urlopen(request, timeout=READ_TIMEOUT_SECONDS) as response:
            length = response.length or 0  # 0 where the server does not tell
            while max(len(body), length) <= MAX_BYTES and (chunk := response.read1(2**16)):
                body += chunk
                if time.monotonic() > deadline:
                    raise UnusableImage("too slow")
    except HTTPError as error:
        error.close()
        retry = error.code >= 500 or error.code in (408, 429)
        raise (UnusableImage if retry else PermanentFailure)(f"answered with HTTP {error.code}") from None
    except (
        OSError,
        HTTPException,
        ValueError,
        ArithmeticError,
    ):  # the latter two: an invalid address or port
        raise UnusableImage("out of reach") from None
    if max(len(body), length) > MAX_BYTES:
        raise PermanentFailure(f"over {MAX_BYTES / 1e6:.0f} MB")
    if len(body) < length:
        raise UnusableImage("cut off")
    return bytes(body)


def save_picture(folder: Path, key: Key, body: bytes) -> None:
    """Writes NAME.part and renames it if it is a whole picture of the annotated size.

    Unfit says why it is not, PermanentFailure that no file can have its name; UserError is for a disk error.
    """
    name, size = key
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
            raise UserError(f"{part} cannot be written ({error.strerror}): make room or allow it.") from None
        raise PermanentFailure("whose name no file can have") from None


def download_one(downloads: ImageDownloads, key: Key) -> tuple[Key, str]:
    """Downloads an image unless the folder has it. Returns its key and why it failed, empty if it did not."""
    name, size = key
    with suppress(UnusableImage), DECODING:
        load_image(downloads.folder / name, size)
        return key, ""
    for pause in RETRY_PAUSES:
        time.sleep(pause)
        try:
            save_picture(downloads.folder, key, fetch_bytes(downloads.addresses.get(key)))
            return key, ""
        except PermanentFailure as failure:
            return key, str(failure)
        except UnusableImage as failure:
            reason = str(failure)
    return key, reason


def download_images(downloads: ImageDownloads, draw: Callable[[], Any]) -> None:
    """Draws cues and downloads their images until no image is missing; UserError after IN_A_ROW failures."""
    checked: set[Key] = set()
    failures = 0
    # Not thread_map: on Ctrl-C or an error it waits for downloads in progress; ThreadPool's threads just end.
    with ThreadPool(THREADS) as pool:
        while True:
            downloads.used.clear()
            draw()
            # By path, so that no two threads write the same file.
            missing = {downloads.folder / key[0]: key for key in downloads.used - checked}.values()
            if not missing:
                return
            checked.update(missing)
            results = pool.imap_unordered(partial(download_one, downloads), missing)
            for key, reason in tqdm(results, "images", len(missing), unit=" files"):
                # An image without an address says nothing about the network.
                failures = failures + (reason != NO_ADDRESS) if reason else 0
                if reason:
                    downloads.unusable.add(key)
                    downloads.left_out.add(reason)
                if failures == IN_A_ROW:
                    example = f"{downloads.addresses[key]!r} is {reason}"
                    raise UserError(f"{failures} images in a row failed ({example}): check the network.")


def training_command(downloads: ImageDownloads, limit: int, heldout: int, flags: dict[str, Any]) -> str:
    """One line: what was downloaded, what is left out, and the command that trains on the same cues."""
    megabytes = sum((downloads.folder / name).stat().st_size for name, _ in downloads.used) / 1e6
    prompts = min(16, limit)
    flags = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "coco", **flags, "preset": "qlora"}
    flags |= {"prompts": prompts, "steps": limit // prompts, "eval-cues": heldout}
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    cues = f"{limit:,} training and {heldout:,} held-out cues"
    images = f"{len(downloads.used):,} images, {megabytes:,.1f} MB"
    return f"{cues}: {images}; {downloads.left_out}; go on with: python locus_mini.py {' '.join(given)}"
