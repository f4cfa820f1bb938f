"""JSON and JSON-lines files that survive a crash, and fingerprints that show whether files have changed."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # Windows leaves them in folders of images


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk; does nothing on Windows.

    Windows has no such call for folders.
    """
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: object) -> None:
    """Writes content as JSON. Until the new file is complete and on the disk, `path` is the old one."""
    new_path = path.with_name(f"{path.name}.new")
    new_path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    # Without the first sync, a power cut could leave an empty file; the second makes the new name last.
    sync(new_path)
    new_path.replace(path)
    sync(path.parent)


def read_lines(path: Path, count: int | None = None) -> list[Any]:
    """The JSON values in the first `count` lines of a file, or in all complete ones; [] without a file.

    A kill can tear the last line, and a power cut damage those that were not on the disk yet.
    """
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()[:count]]


def continue_lines(path: Path, count: int) -> TextIO:
    """A file, new or old, open to add lines after its first `count` lines; what follows them is cut off."""
    file = path.open("a", buffering=1, encoding="utf-8", newline="\n")  # each line reaches it at once
    file.truncate(sum(map(len, path.read_bytes().splitlines(keepends=True)[:count])))
    return file


def fingerprint(parts: Iterable[bytes]) -> str:
    """The CRC-32 of all parts joined, as eight hexadecimal digits."""
    return f"{zlib.crc32(b''.join(parts)):08x}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, without what file managers and runs leave in them.

    These are hidden files and folders (.DS_Store, ._NAME), Thumbs.db, desktop.ini, and run folders.
    """
    for parent, folders, names in os.walk(folder):
        if Path(parent) != folder and is_run_folder(Path(parent), names):
            names, folders[:] = [], []  # nor is anything below it visited
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".") and name.lower() not in SYSTEM_FILES]
        yield from (Path(parent, name) for name in visible)


def is_run_folder(folder: Path, names: list[str]) -> bool:
    """Whether a folder with files of these names is that of a run: a new one may hold its settings alone."""
    has_task = "config.json" in names and b'"task":' in (folder / "config.json").read_bytes()
    return has_task or "metrics.jsonl" in names


def file_stats(path: Path) -> dict[str, bytes]:
    """Name, size and modification time of a file, or of each file in a folder, by its name below the folder.

    Model cards (.md) and reply caches (.jsonl) in a folder do not count: they change without the model. As
    `path` itself, such a file does. A link to a file that does not exist never counts.
    """
    files = sorted(visible_files(path)) if path.is_dir() else [path]
    counted = [f for f in files if f == path or ("." in f.name and f.suffix not in (".md", ".jsonl"))]
    stats = {f.relative_to(path).as_posix(): (f.name, f.stat()) for f in counted if f.exists()}
    return {key: repr((name, s.st_size, s.st_mtime_ns)).encode() for key, (name, s) in stats.items()}
