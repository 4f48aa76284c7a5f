"""Runs independent pieces of work side by side, and hands the results back in their order.

ONNX Runtime lets go of the interpreter while it runs, and at batch 1 two images on a core each take less time than one
image after the other on both: layers of a small network are too short to share. What comes out does not depend on how
many run at once.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mm_edge.bench.worker import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 8  # beyond it what waits in memory grows faster than the speed


def cores() -> int:
    """Return how many cores this process may use, MOST at most."""
    return min(MOST, len(usable_cores()))


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield work(item) of every item, in their order; at most `workers` results wait to be taken.

    What `work` raises is raised where its result would have come.
    """
    if workers < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def release_memory() -> None:
    """Return freed heap pages to the system, where the C library can (glibc); elsewhere nothing happens.

    glibc keeps what a backward pass freed for itself: 500 MB of activations after Swin-Tiny's gradients, which then
    count on top of everything the candidates need.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
