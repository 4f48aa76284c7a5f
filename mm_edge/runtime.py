"""Opens ONNX Runtime sessions, and runs independent pieces of work in parallel.

ONNX Runtime releases Python's lock while it runs. At batch 1 two images on one core each take less time than two images
one after the other on both cores, because the layers of a small network are too short to divide. So a session has one
thread by default and several images run at once. The results do not depend on how many run at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime

from mm_edge.errors import ModelError, first_line

Item = TypeVar("Item")
Output = TypeVar("Output")

MOST = 8  # With more, the results that wait in memory grow faster than the speed.
ERRORS, FATAL = 3, 4  # What ONNX Runtime writes on stderr: errors without warnings, or fatal errors alone.


def open_session(model: Path | bytes, threads: int = 1, *, severity: int = ERRORS) -> Any:
    """Return an ONNX Runtime session on the CPU.

    Args:
        model: a file, or a serialised ModelProto.
        threads: threads that share the work of one operator; 0 takes every core.
        severity: the least serious message that ONNX Runtime writes on stderr, `ERRORS` or `FATAL`.

    Raises:
        ModelError: ONNX Runtime cannot load the model; its own exception is the cause.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = severity
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception types have no common base
        raise ModelError(f"ONNX Runtime cannot load {model_name(model)}: {first_line(error)}") from error


def model_name(model: Path | bytes) -> str:
    """Return what a message calls the model: its file, or "the model" for one in memory."""
    return f"'{model}'" if isinstance(model, Path) else "the model"


def cores() -> int:
    """Return how many cores this process may use, MOST at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, usable)


def in_order(work: Callable[[Item], Output], items: Iterable[Item], workers: int) -> Iterator[Output]:
    """Yield work(item) of every item, in their order; at most `workers` results wait to be taken.

    What `work` raises is raised where its result would have come.
    """
    if workers < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Output]] = deque()
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
