"""A device that answers what a test tells it to."""

from __future__ import annotations

import dataclasses

from mm_edge.bench.target import load_target, resolve_host

HOST = dataclasses.replace(resolve_host(load_target("host")), threads=1)


class Scripted:
    """A device that answers what it is told to, and counts how often it was asked."""

    name = "the board"

    def __init__(self, reply: dict, source: str = "device") -> None:
        self.reply = reply
        self.source = source
        self.asked: list[tuple] = []

    def ask(self, command, files, options, timeout_s=1.0):
        self.asked.append((command, dict(files), dict(options)))
        return self.reply
