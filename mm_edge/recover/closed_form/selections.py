"""Selections: which channels of a group the closed form keeps, by the name users type with --select."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """One way to choose the channels that stay.

    Attributes:
        help: how they are chosen, in a few words, for --help.
    """

    help: str


SELECTIONS: dict[str, Selection] = {
    "signal": Selection("the channels with the highest scores"),
    "obs": Selection("chosen by optimal brain surgeon"),
    "auto": Selection("whichever of the two diverges less"),
}
