"""Recoveries: the ways to regain accuracy, by the name users type with --recover.

This module imports nothing heavy, so that the command line can name them without PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """One way to regain accuracy.

    Attributes:
        help: what it does, in a few words, for --help.
        from_moments: whether it starts with the closed form on calibration images.
        trains: whether it takes gradient steps, so that it needs a PyTorch module.
    """

    help: str
    from_moments: bool = False
    trains: bool = False


RECOVERIES: dict[str, Recovery] = {
    "none": Recovery("leaves the weights as pruning left them"),
    "bn": Recovery("re-estimates BatchNorm statistics on calibration images"),
    "closed-form": Recovery("chooses channels and solves weights on calibration images, without training", True),
    "tune": Recovery("the closed form, then some hundred gradient steps without labels for the front", True, True),
    "finetune": Recovery("the closed form, then trains the front under its masks", True, True),
}
