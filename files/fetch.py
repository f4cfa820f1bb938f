"""COCO's images from their addresses: only those that the first cues use, each checked before it is there."""

import errno
import json
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib import request
from urllib.error import HTTPError

from PIL import Image
from tqdm import tqdm

from files.pictures import LeftOut, Photos, Unfit, UserError, load_image, read, why_no_photo

SILENCE, LONGEST, MOST_BYTES = 30, 300, 50_000_000  # of one file: seconds without a byte, seconds, bytes
THREADS, REPEATS, IN_A_ROW = 8, 3, 16  # after so many failures in a row it is not the images
PAUSE = 1.0  # seconds before a file is asked for again, then doubled
NO_ADDRESS = "without an address"
NAMELESS = ("ENAMETOOLONG", "EISDIR", "ENOTDIR", "ENOTEMPTY", "EEXIST", "EINVAL", "ENOENT")
DECODING = threading.Lock()  # one at a time: a small file can hold 400 MB of pixels
OPENER = request.OpenerDirector()  # the usual one would open file: and ftp: too
for part in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
    OPENER.add_handler(getattr(request, f"{part}Handler")())
OPENER.add_handler(request.HTTPErrorProcessor())
OPENER.addheaders = [("User-Agent", "locus-mini")]

Key = tuple[str, tuple[int, int]]  # an image's name and annotated size


class Refused(Unfit):
    """Why asking again is of no use."""


@dataclass
class Wanted(Photos):
    """Stands in for Photos while cues are drawn: notes what they use; unfit is only what could not be had."""

    addresses: dict[Key, Any] = field(default_factory=dict)
    used: set[Key] = field(default_factory=set)  # by the last draw

    def open(self, name: str, size: tuple[int, int] | None = None) -> Image.Image | None:
        if (name, size) in self.unfit:
            return None
        self.used.add((name, size))
        return Image.new("1", (1, 1))


def begin(folder: Path, annotations: Path) -> Wanted:
    """A folder to put images in, and the address of each that COCO's instances JSON has."""

    def addresses(text: str) -> dict[Key, Any]:
        data = json.loads(text, object_hook=lambda d: None if "bbox" in d else d)
        good = [photo for photo in data["images"] if not why_no_photo(photo, {})]
        return {(p["file_name"], (p["width"], p["height"])): p.get("coco_url") for p in good}

    found = read("annotations", annotations, "COCO instances JSON", addresses)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another folder.") from None
    return Wanted(folder, LeftOut(f"images of {annotations}", len(found)), addresses=found)


def ask(url: Any) -> bytes:
    """What is at an address; Unfit says why it cannot be had."""
    if not isinstance(url, str) or not url:
        raise Refused(NO_ADDRESS)
    if not url.lower().startswith(("http://", "https://")):
        raise Refused("whose address is not of http or https")
    end, body = time.monotonic() + LONGEST, bytearray()
    try:
        with OPENER.open(url, timeout=SILENCE) as reply:
            length = reply.length or 0  # 0 where the server does not say
            while max(len(body), length) <= MOST_BYTES and (chunk := reply.read1(2**16)):
                body += chunk
                if time.monotonic() > end:
                    raise Unfit("too slow")
    except HTTPError as error:
        error.close()
        passing = error.code >= 500 or error.code in (408, 429)
        raise (Unfit if passing else Refused)(f"answered with HTTP {error.code}") from None
    except (OSError, HTTPException, ValueError, ArithmeticError):  # the latter two: no address, no such port
        raise Unfit("out of reach") from None
    if max(len(body), length) > MOST_BYTES:
        raise Refused(f"over {MOST_BYTES / 1e6:.0f} MB")
    if len(body) < length:
        raise Unfit("cut off")
    return bytes(body)


def check(path: Path, size: tuple[int, int]) -> None:
    with DECODING:
        load_image(path, size)


def put(path: Path, part: Path, size: tuple[int, int], body: bytes) -> None:
    """A picture in its place, once it is known to be whole and of its size; until then it is NAME.part."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(body)
            check(part, size)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and errno.errorcode.get(error.errno) not in NAMELESS:
            raise UserError(f"{part} cannot be written ({error.strerror}): make room or allow it.") from None
        raise Refused("whose name no file can have") from None


def get(wanted: Wanted, key: Key) -> tuple[Key, int, str]:
    """Sees to it that an image is there. Returns its key, how many bytes are new, and why it is not there."""
    (name, size), path = key, wanted.folder / key[0]
    try:
        check(path, size)
        return key, 0, ""
    except Unfit as why:
        reason = why
    for again in range(REPEATS + 1):
        time.sleep(again and PAUSE * 2 ** (again - 1))
        try:
            body = ask(wanted.addresses.get(key))
            put(path, wanted.folder / f"{name}.part", size, body)
            return key, len(body), ""
        except Unfit as why:
            reason = why
        if isinstance(reason, Refused):
            break
    return key, 0, str(reason)


def fetch(wanted: Wanted, draw: Callable[[], Any]) -> None:
    """Draws cues and gets what they use, again and again until they use only what is there."""
    there, size, failed = set(), 0, 0
    with ThreadPool(THREADS) as pool, tqdm(desc="images", unit=" files", total=0) as bar:
        while True:
            wanted.used.clear()
            draw()
            missing = {wanted.folder / key[0]: key for key in wanted.used - there}  # no file by two threads
            if not missing:
                return
            bar.total += len(missing)
            for key, new, why in pool.imap_unordered(lambda key: get(wanted, key), missing.values()):
                if why:
                    wanted.unfit.add(key)
                    wanted.left_out.add(why)
                else:
                    there.add(key)
                size += new
                failed = failed + (why != NO_ADDRESS) if why else 0
                if failed == IN_A_ROW:
                    at = f"{wanted.addresses[key]!r} is {why}"
                    raise UserError(
                        f"{failed} images in a row failed ({at}): see to the network, then start again."
                    )
                bar.set_postfix(MB=size // 10**6, left_out=len(wanted.unfit), refresh=False)
                bar.update()


def how_to_go_on(wanted: Wanted, limit: int, heldout: int, flags: dict[str, Any]) -> str:
    """One line: what is there, what is left out, and the command that trains on it by the same draws."""
    size = sum((wanted.folder / name).stat().st_size for name, _ in wanted.used) / 1e6
    flags = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "coco", **flags, "preset": "qlora"}
    flags |= {"prompts": (prompts := min(16, limit)), "steps": limit // prompts, "eval-cues": heldout}
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    what = f"{limit:,} training and {heldout:,} held-out cues: {len(wanted.used):,} images, {size:,.1f} MB"
    return f"{what}; {wanted.left_out}; go on with: python locus_mini.py {' '.join(given)}"
