"""Greedy replies, and a cache on disk: each reply is a line of its file at once, so none is generated twice.

A run that is killed repeats one batch at most.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from files.disk import continue_lines, read_lines
from files.errors import UserError
from files.pictures import UnusableImage
from policy import Policy, collate, decode_completions, rollout
from prompts import BoxFrame, EncodedPrompt

# The text, None where memory ran out or float16 overflowed, False where the image cannot be read; and the
# frame of its boxes.
Reply = tuple[str | bool | None, BoxFrame]


class ReplyCache(dict):
    """A dict whose entries are lines of a file: first the settings, then a [key, value] each."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Reads the entries of a killed run; UserError for a file of other settings or of another kind."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = read_lines(path)
            stored, *entries = lines or [settings]
            differing = [name for name in settings | stored if settings.get(name) != stored.get(name)]
            # Without the prompts that memory was too small for: they are tried again.
            entries = {str(key): v for key, v in entries if v and not (isinstance(v, list) and v[0] is None)}
            if differing:
                changes = ", ".join(f"{key}: {stored.get(key)}, not {settings.get(key)}" for key in differing)
                raise UserError(f"{path} is of other settings ({changes}): give those, or another folder.")
            super().__init__(entries)
            self.file = continue_lines(path, len(lines))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a file of replies ({error}): give another --out.") from None
        if not lines:
            self.file.write(json.dumps(settings) + "\n")

    def __setitem__(self, key: str, value: Any) -> None:
        self.file.write(json.dumps([key, value]) + "\n")
        super().__setitem__(key, value)


def cached_values(cache: dict, name: str, keys: Iterable, batch: int, compute: Callable) -> list:
    """The value of each `name/key`: the cached one, or a new one, which the cache then keeps.

    compute: from the indices of a batch (a range) to the batch's values; called where a value is missing.
    """
    keys = [f"{name}/{key}" for key in keys]
    for start in tqdm(range(0, len(keys), batch), desc=name, leave=False):
        indices = range(start, min(start + batch, len(keys)))
        if all(keys[i] in cache for i in indices):
            continue
        # A batch that lacks one value runs as a whole: in another batch, the last digits would differ.
        for i, value in zip(indices, compute(indices), strict=True):
            if keys[i] not in cache:
                cache[keys[i]] = value
    return [cache[key] for key in keys]


# ---------------------------------------------------------------- replies


def default_batch_size(policy: Policy) -> int:
    """Prompts per batch of replies; a few would leave a GPU idle between the starts of its kernels."""
    return 32 if policy.device.type == "cuda" else 128


def compute_in_halves(compute: Callable[[Sequence], list], batch: Sequence) -> Iterator[Any]:
    """The values of a batch from compute(batch); where memory runs out, from its halves, and so on.

    A half that is computed is not computed again. None for an item that is too large by itself.
    """
    with suppress(torch.OutOfMemoryError):  # an except block would keep the tensors that did not fit
        return iter(compute(batch))
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    # The second half runs once the values of the first have been taken.
    halves = (compute_in_halves(compute, half) for half in (batch[:middle], batch[middle:]))
    return chain.from_iterable(halves) if middle else iter([None])


def generate_replies(
    policy: Policy, prompts: Iterable[EncodedPrompt], max_new_tokens: int, batch: int | None = None
) -> Iterator[Reply]:
    """A greedy reply to each prompt, in their order, by the rollout's own loop.

    Where a batch does not fit into memory, it is halved, so only a prompt that is too large by itself gets no
    reply. Nor does one whose hidden states are not finite: that is no wrong reply.
    """

    def generate(chunk: list[EncodedPrompt]) -> list[str | None]:
        rollouts = rollout(policy, collate(policy, chunk), 1, max_new_tokens)
        texts, finite = decode_completions(policy, rollouts), rollouts.finite.tolist()  # B × 1, B
        return [text if is_finite else None for (text,), is_finite in zip(texts, finite)]

    prompts = iter(prompts)
    while chunk := list(islice(prompts, batch or default_batch_size(policy))):
        texts = compute_in_halves(generate, chunk)
        yield from ((text, prompt.frame) for text, prompt in zip(texts, chunk, strict=True))


def cached_generate(
    policy: Policy, cache: dict, name: str, prompts: Sequence, limits: tuple[int, int], keys: Sequence = ()
) -> list[Reply]:
    """A greedy reply to each prompt, kept in the cache as `name/key`; the keys are 0, 1, 2 … by default.

    limits: the longest reply in tokens, and the number of prompts per batch.
    """

    def compute(indices: range) -> Iterator[list]:
        readable = {}
        for i in indices:
            with suppress(UnusableImage):
                readable[i] = prompts[i]
        replies = generate_replies(policy, readable.values(), *limits)
        # Taken one by one, so that the cache has the replies of a half before the other half runs.
        rows = (next(replies) if i in readable else (False, BoxFrame(1, 1, 1, 1)) for i in indices)
        return ([text, *astuple(frame)] for text, frame in rows)

    rows = cached_values(cache, name, keys or range(len(prompts)), limits[1], compute)
    if num_errors := sum(text is None for text, *_ in rows):
        reason = "memory is too small, or hidden states are not finite"
        print(f"{name}: {num_errors} of {len(rows)} prompts have no reply: {reason}.", file=sys.stderr)
    return [(text, BoxFrame(*frame)) for text, *frame in rows]
