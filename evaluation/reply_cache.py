"""No prompt is run twice: each reply is a line on disk at once, and a killed run continues after it."""

import json
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from files.errors import UserError
from policy import Policy, collate, decode_completions, rollout
from prompts import BoxFrame, EncodedPrompt


class ReplyCache(dict):
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


def default_batch_size(policy: Policy) -> int:
    """Prompts in a batch of answers: full images of a large model fill a GPU soon."""
    return 4 if policy.device.type == "cuda" else 128


def generate_replies(
    policy: Policy, items: Iterable[EncodedPrompt], max_new_tokens: int, batch: int | None = None
) -> Iterator[tuple[str | None, BoxFrame]]:
    """Greedy answers in the order of the prompts, by the rollout's own loop; None where memory ran out.

    What does not fit as a batch is asked one by one, so only a prompt that is too large by itself is lost.
    With each answer comes the frame of the boxes in it.
    """
    items = iter(items)
    while chunk := list(islice(items, batch or default_batch_size(policy))):
        said = None
        with suppress(torch.OutOfMemoryError):  # inside an except block it would hold what did not fit
            said = decode_completions(policy, rollout(policy, collate(policy, chunk), 1, max_new_tokens))
        if said is not None:
            yield from ((text, item.frame) for (text,), item in zip(said, chunk, strict=True))
            continue
        torch.cuda.empty_cache()
        one_by_one = generate_replies(policy, chunk, max_new_tokens, 1)
        yield from [(None, chunk[0].frame)] if len(chunk) == 1 else one_by_one


def cached_generate(
    policy: Policy,
    cache: MutableMapping,
    name: str,
    items: Sequence[EncodedPrompt],
    ways: tuple[int, int],
    keys=None,
) -> list[tuple[str | None, BoxFrame]]:
    """Answers to all the prompts, by `ways`: longest answer, prompts at a time. What `known` holds stays.

    A batch that is half known is asked as a whole: its figures hang, in the last digits, on its company.
    """
    names = [f"{name}/{key}" for key in keys or range(len(items))]
    for start in tqdm(range(0, len(names), ways[1]), desc=name, leave=False):
        some = range(start, min(start + ways[1], len(names)))
        if all(names[i] in cache for i in some):
            continue
        for i, (text, frame) in zip(
            some, generate_replies(policy, (items[i] for i in some), *ways), strict=True
        ):
            if names[i] not in cache:
                cache[names[i]] = [text, *astuple(frame)]
    return [(cache[key][0], BoxFrame(*cache[key][1:])) for key in names]
