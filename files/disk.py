"""Files that are whole or not there, and fingerprints that tell whether something has changed."""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk. Windows has no such call for folders."""
    if os.name != "nt":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is the old one until it is the whole new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def fingerprint(parts: Iterable[bytes]) -> str:
    """The CRC-32 of some bytes, as eight hexadecimal digits."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def file_stats(path: Path) -> list[bytes]:
    """Names, sizes and dates of a file or of a folder's files, for `fingerprint`."""
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.suffix not in (".md", ".jsonl")]
    return [repr((name, stat.st_size, stat.st_mtime_ns)).encode() for name, stat in stats]
