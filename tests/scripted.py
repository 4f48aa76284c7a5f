"""A device that answers what a test tells it to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm_edge.bench.target import load_target, resolve_host

HOST = dataclasses.replace(resolve_host(load_target("host")), threads=1)


class Scripted:
    """A device that gives its answers in turn, over and over, and keeps the requests."""

    name = "the board"

    def __init__(self, *replies: dict[str, Any], source: str = "device") -> None:
        self.replies = replies
        self.source = source
        self.asked: list[tuple[str, dict[str, Path], dict[str, Any]]] = []

    def ask(
        self, command: str, files: Mapping[str, Path], options: Mapping[str, Any], timeout_s: float = 1.0
    ) -> dict[str, Any]:
        self.asked.append((command, dict(files), dict(options)))
        return self.replies[(len(self.asked) - 1) % len(self.replies)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
