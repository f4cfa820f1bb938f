"""The peak GPU memory of each phase of a step, and which flag to lower where memory runs out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from files.errors import UserError
from training.settings import MEMORY, flag_of

LOWER = {  # phase: what to change if it does not fit
    "loading": "take a smaller --model, or --load-in-4bit",
    "rollout": "lower --rollout-batch, then --image-pixels, --max-new-tokens or --num-generations",
    "policy pass": "lower --micro-batch, give --gradient-checkpointing, then lower --image-pixels, "
    "--max-new-tokens or --num-generations",
    "optimizer": "lower --lora-rank",
}
# The messages of PyTorch, CUDA and cuBLAS, and of transformers while it converts weights to 4 bit.
OUT_OF_MEMORY = r"tried to allocate (\d[\d.]* \w+)|allocate memory|out of memory|alloc_failed"
OUT_OF_MEMORY += "|automatic conversion of the weights"
# On a GPU: the most bytes that were allocated in each phase, and as "reserved" the most that PyTorch has
# taken from the card for all of them, with the gaps between its blocks and memory that it keeps for reuse.
PEAKS: dict[str, int] = {}
METER = torch.cuda if torch.cuda.is_available() else None  # what measures the memory
OPEN: list[str] = []  # phases that have started and not ended, the innermost last


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Records the peak memory of a phase; UserError if memory runs out in it, with the flag to lower.

    Phases may nest: a peak counts for the innermost open phase.
    """
    record_peak()
    OPEN.append(name)
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not (match := re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)):
            raise
        amount = f", which asked for another {match[1]}" if match[1] else ""
        remedy = f"{LOWER[name]}; --resume accepts the flags {', '.join(map(flag_of, MEMORY))}"
        raise UserError(f"Out of memory in the phase '{name}'{amount}: {remedy}.") from None
    finally:
        record_peak()
        OPEN.pop()


def record_peak() -> None:
    """Adds the peaks since the last call, to the innermost open phase and overall, and measures anew."""
    if METER is not None:
        if OPEN:
            PEAKS[OPEN[-1]] = max(PEAKS.get(OPEN[-1], 0), METER.max_memory_allocated())
        PEAKS["reserved"] = max(PEAKS.get("reserved", 0), METER.max_memory_reserved())
        METER.reset_peak_memory_stats()
