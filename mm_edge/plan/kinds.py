"""Kinds of candidates: what is removed, by the name users type with --kinds.

This module imports nothing, so that the command line can name them without PyTorch.
"""

from __future__ import annotations

# What each kind removes, in a few words, for --help.
KINDS: dict[str, str] = {
    "structured": "whole channels, so that the network becomes narrower",
    "n:m": "two of every four weights (2:4), for targets with kernels for it",
    "unstructured": "single weights, so that the file compresses",
}
