"""Nothing is asked twice: what is known stands on disk at once, and a killed run goes on where it was."""

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import UserError
from evaluation.heldout import at_a_time, recall
from models import model_folder
from policy import Policy
from prompts import PROMPTS, Encoded, Tools

LONGEST = 8192  # tokens of an answer to a benchmark, the paper's


class Journal(dict):
    """What is known, by key; whatever is added is a line of its file at once. First the settings."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        super().__init__()
        whole = b""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                whole = path.read_bytes()
                whole = whole[: whole.rfind(b"\n") + 1]  # a kill can tear the last line
            lines = [json.loads(line) for line in whole.splitlines()]
            begun, pairs = (lines[0] if lines else settings), [(str(key), value) for key, value in lines[1:]]
            differ = [name for name in settings | begun if settings.get(name) != begun.get(name)]
            differ = [f"{name}: {begun.get(name)}, not {settings.get(name)}" for name in differ]
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no journal of answers ({error}): give another --out.") from None
        if differ:
            raise UserError(
                f"{path} was begun with other settings ({', '.join(differ)}): give those, or another folder."
            )
        self.file = path.open("r+b" if path.exists() else "w+b")
        self.file.truncate(len(whole))
        self.file.seek(len(whole))
        for key, value in pairs:
            if value and value[0] is not None if isinstance(value, list) else value is not None:
                super().__setitem__(key, value)  # what memory was too small for is tried again
        if not lines:
            self.write(settings)

    def write(self, content: Any) -> None:
        self.file.write((json.dumps(content) + "\n").encode())
        self.file.flush()

    def __setitem__(self, key: str, value: Any) -> None:
        self.write([key, value])
        super().__setitem__(key, value)


@dataclass
class Run:
    """What every task needs."""

    policy: Policy
    args: argparse.Namespace
    known: Journal
    folder: Path

    @property
    def sides(self) -> list[tuple[str, Callable]]:
        """Each model as (name, context in which `policy` is that model): the base, then the adapted one."""
        both = [("before", self.policy.reference), ("after", nullcontext)]
        return both if self.args.adapter is not None else both[:1]

    @property
    def tools(self) -> Tools:
        """For pictures as large as the model's own settings allow, not as training limits them."""
        tools, size = self.policy.tools, self.policy.tools.image_processor.size
        pixels = (size["shortest_edge"], size["longest_edge"])
        return replace(tools, family=replace(tools.family, image_pixels=pixels))

    def ways(self, benchmark: bool = False) -> tuple[int, int]:
        """The longest answer in tokens, and how many prompts at a time."""
        family = self.policy.tools.family
        usual = LONGEST if benchmark and PROMPTS[family.template]["think"] else family.max_new_tokens
        return self.args.max_new_tokens or usual, self.args.batch or at_a_time(self.policy)

    def ask(
        self, name: str, items: Sequence[Encoded], keys: list | None = None, benchmark: bool = False
    ) -> list:
        return recall(self.policy, self.known, name, items, self.ways(benchmark), keys)


def fingerprint(path: Path) -> str:
    """Of a file or a folder's files: names, sizes and dates. What changed is not what was asked about."""
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    stats = [(f.name, f.stat()) for f in files if f.suffix not in (".md", ".jsonl")]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return f"{zlib.crc32(repr(stats).encode()):08x}"


def open_run(policy: Policy, args: argparse.Namespace) -> Run:
    """A run with its journal, in a folder beside the adapter; each choice of settings has one of its own."""
    settings = {name: str(value) for name, value in vars(args).items() if value is not None}
    settings = {name: value for name, value in settings.items() if name not in ("out", "card")}
    inputs = (model_folder(args.model), args.adapter, args.data, args.annotations, args.images, args.image)
    for path in inputs:
        if path is not None and Path(path).exists():
            settings[f"{path} as of"] = fingerprint(Path(path))
    name = f"{args.task}-{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
    folder = args.out or (args.adapter.parent if args.adapter else Path("runs") / "eval") / name
    return Run(policy, args, Journal(folder / "answers.jsonl", settings), folder)
