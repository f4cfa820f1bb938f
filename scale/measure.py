"""What measure_export.py and side_by_side.py share: a process for each measurement, and its peak memory."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from resource import RUSAGE_SELF, getrusage
from typing import Any


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """The result of a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> float:
    """The most memory that this process has used so far, in GB."""
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20
