"""Compares the tensors of a file with those of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

# Name of a tensor, its shape in the file and its shape in the model; None where it is absent.
Misfit = tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]


def find_misfits(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[Misfit]:
    """Return every tensor that differs between file and model, in the model's order, then those in the file alone."""
    found: list[Misfit] = []
    for name, expected in state.items():
        if name not in tensors:
            if not name.endswith("num_batches_tracked"):
                found.append((name, None, tuple(expected.shape)))
        elif tensors[name].shape != expected.shape:
            found.append((name, tuple(tensors[name].shape), tuple(expected.shape)))
    found.extend((name, tuple(tensor.shape), None) for name, tensor in tensors.items() if name not in state)
    return found


def describe_misfits(misfits: list[Misfit]) -> str:
    """Return the first three misfits in words, and how many more there are."""
    parts = []
    for name, in_file, in_model in misfits[:3]:
        if in_file is None:
            parts.append(f"{name} {in_model} is missing from the file")
        elif in_model is None:
            parts.append(f"{name} {in_file} is in the file alone")
        else:
            parts.append(f"{name} is {in_file} in the file and {in_model} in the model")
    more = [f"and {len(misfits) - 3} more"] if len(misfits) > 3 else []
    return "; ".join(parts + more)


def fill_(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load `tensors` into `module`, in place; names that `module` lacks are ignored."""
    module.load_state_dict(dict(tensors), strict=False)


def precision_warnings(tensors: Iterable[torch.Tensor], name: str) -> tuple[str, ...]:
    """Return a warning where the tensors of the file `name` hold floating-point types other than float32."""
    narrow = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"})
    return (f"{name} holds {' and '.join(narrow)} weights; converted to float32",) if narrow else ()
