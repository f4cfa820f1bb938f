"""The seconds and the peak GPU memory of each phase of a step; which flag to lower where memory runs out."""

import re
import time
from collections import Counter
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
# The messages of PyTorch, CUDA and cuBLAS, and of transformers while it converts weights to 4 bit. The amount
# comes after "out of memory", so `.*` lets its alternative match from the start of the line.
OUT_OF_MEMORY = r".*tried to allocate (\d[\d.]* \w+)|allocate memory|out of memory|alloc_failed"
OUT_OF_MEMORY += "|automatic conversion of the weights"
# On a GPU: the most bytes that were allocated in each phase, and as "reserved" the most that PyTorch has
# taken from the card for all of them, with the gaps between its blocks and memory that it keeps for reuse.
PEAKS: dict[str, int] = {}
SECONDS: Counter = Counter()  # phase: its seconds since the last call of `step_metrics`
METER = torch.cuda if torch.cuda.is_available() else None  # what measures the memory
OPEN: list[str] = []  # phases that have started and not ended, the innermost last


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Records a phase's seconds and peak memory; UserError if memory runs out in it, with the flag to lower.

    Phases may nest: a peak counts for the innermost open phase, seconds for all that are open.
    """
    record_peak()
    # The memory of these two counts for the rollout that they are part of.
    OPEN.append({"vision": "rollout", "prefill": "rollout"}.get(name, name))
    SECONDS[name] -= time.perf_counter()
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not (match := re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE)):
            raise
        amount = f", which asked for another {match[1]}" if match[1] else ""
        remedy = f"{LOWER[OPEN[-1]]}; --resume accepts the flags {', '.join(map(flag_of, MEMORY))}"
        raise UserError(f"Out of memory in the phase '{name}'{amount}: {remedy}.") from None
    finally:
        record_peak()
        OPEN.pop()
        SECONDS[name] += time.perf_counter()


def record_peak() -> None:
    """Adds the peaks since the last call, to the innermost open phase and overall, and measures anew."""
    if METER is not None:
        METER.synchronize()  # what was launched in a phase is part of its seconds
        if OPEN:
            PEAKS[OPEN[-1]] = max(PEAKS.get(OPEN[-1], 0), METER.max_memory_allocated())
        PEAKS["reserved"] = max(PEAKS.get("reserved", 0), METER.max_memory_reserved())
        METER.reset_peak_memory_stats()


def step_metrics() -> dict[str, float]:
    """For metrics.jsonl: the seconds of each phase since the last call, and the GPU memory reserved now."""
    names = ("vision", "prefill", "rollout", "policy pass")
    vision, prefill, rollout, passes = (SECONDS.pop(name, 0.0) for name in names)
    seconds = {"vision": vision, "prefill": prefill, "decoding": rollout - vision - prefill, "passes": passes}
    reserved = METER.memory_reserved() / 1e9 if METER is not None else 0.0
    return {f"seconds/{name}": value for name, value in seconds.items()} | {"memory/reserved_gb": reserved}
