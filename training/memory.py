"""Which phase of a step needs how much memory, and what to lower where it runs out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from files.errors import UserError

LOWER = {
    "loading": "take a smaller --model, or --load-in-4bit",
    "rollout": "lower --rollout-batch, then --image-pixels, --max-new-tokens or --num-generations",
    "policy pass": "lower --micro-batch, give --gradient-checkpointing, then lower --image-pixels, "
    "--max-new-tokens or --num-generations",
    "optimizer": "lower --lora-rank",
}
# As PyTorch, CUDA, cuBLAS and, while weights become 4-bit, transformers put it.
OUT_OF_MEMORY = r"tried to allocate (\d[\d.]* \w+)|allocate memory|out of memory|alloc_failed"
OUT_OF_MEMORY += "|automatic conversion of the weights"
PEAKS: dict[str, int] = {}  # bytes that each phase needed at most, on a GPU
METER: Any = torch.cuda if torch.cuda.is_available() else None
OPEN: list[str] = []  # phases at work, the innermost last


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the work whose peak is noted; UserError where its memory runs out, naming what to lower."""
    note()
    OPEN.append(name)
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not (asked := re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)):
            raise
        more = f", when it asked for {asked[1]} more" if asked[1] else ""
        raise UserError(
            f"Out of memory in the phase '{name}'{more}: {LOWER[name]}. A checkpoint stays, and --resume "
            "takes another --rollout-batch, --micro-batch and --gradient-checkpointing."
        ) from None
    finally:
        note()
        OPEN.pop()


def note() -> None:
    """What the innermost open phase has needed since the last note."""
    if METER is not None:
        if OPEN:
            PEAKS[OPEN[-1]] = max(PEAKS.get(OPEN[-1], 0), METER.max_memory_allocated())
        METER.reset_peak_memory_stats()
