"""Kinds of candidates: what is removed, by the name users type with --kinds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of candidate.

    Attributes:
        help: what is removed, in a few words, for --help.
    """

    help: str


KINDS: dict[str, Kind] = {
    "structured": Kind("whole channels, so that the network becomes narrower"),
    "n:m": Kind("two of every four weights (2:4), for targets with kernels for it"),
    "unstructured": Kind("single weights, so that the file compresses"),
}
