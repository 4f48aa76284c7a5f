"""Signals: how much each weight matters (E1-E3), by the name users type with --signals.

This module imports NumPy alone, so that the command line can name them without PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signal:
    """One way to score weights.

    Attributes:
        help: what it is, in a few words, for --help.
    """

    help: str
    needs_gradient: bool = True


SIGNALS: dict[str, Signal] = {
    "magnitude": Signal("the size of the weight", False),
    "gradient": Signal("the size of the loss's gradient by the weight"),
    "product": Signal("the product of both"),
}
