"""JSON files that no crash leaves half-written, and fingerprints that show whether files have changed."""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk; does nothing on Windows.

    Windows has no such call for folders.
    """
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Writes content as JSON. Until the new file is complete and on the disk, `path` is the old one."""
    new_path = path.with_name(f"{path.name}.new")
    new_path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    # Without the first sync, a power cut could leave an empty file; the second makes the new name last.
    sync(new_path)
    new_path.replace(path)
    sync(path.parent)


def fingerprint(parts: Iterable[bytes]) -> str:
    """The CRC-32 of all parts joined, as eight hexadecimal digits."""
    return f"{zlib.crc32(b''.join(parts)):08x}"


def file_stats(path: Path) -> list[bytes]:
    """Name, size and modification time of a file, or of each file in a folder, for `fingerprint`.

    Model cards (.md) and reply caches (.jsonl) in a folder do not count: they change without the model.
    """
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.suffix not in (".md", ".jsonl")]
    return [repr((name, stat.st_size, stat.st_mtime_ns)).encode() for name, stat in stats]
