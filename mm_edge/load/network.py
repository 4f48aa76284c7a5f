"""What the loaders share: the user's options, and a network that has been built but not yet checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_edge.errors import ModelError, first_line
from mm_edge.load.weights import quiet_timm

INIT_SEED = 0

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class LoadOptions:
    """The user's options for loading a model; None where the user gave none.

    `input_size` is (channels, height, width); `mean` and `std` hold one value, or one per channel, of scaled pixels.
    `preprocess` names a preset; `scale`, `colours`, `resize` and `layout` are as in records.InputSpec.
    """

    arch: str | None = None
    input_size: ImageShape | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trust_pickle: bool = False
    preprocess: str | None = None
    scale: float | None = None
    colours: str | None = None
    resize: str | None = None
    layout: str | None = None


@dataclass(frozen=True)
class TimmBuild:
    """What `timm.create_model` was called with."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class BuiltNetwork:
    """A network that has been built but not yet checked, with what is known about it.

    Attributes:
        module: the network with its weights.
        name: what the report calls it.
        source: where it comes from, in words.
        config: what the file says of the input and the network.
        channels: input channels the weights take, None where unknown.
        side: input height and width inferred from the tensors, None where they were not inferred.
        path: the file of the weights, None for a Python module.
        labels: class names, () where unknown.
        warnings: sentences for the user.
        build: name and arguments of the timm network, None for any other.
    """

    module: nn.Module
    name: str
    source: str
    config: Mapping[str, Any]
    channels: int | None = None
    side: int | None = None
    path: Path | None = None
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    build: TimmBuild | None = None


def timm_config(module: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a network, {} for one that is not timm's."""
    config = getattr(module, "pretrained_cfg", None)
    return dict(config) if isinstance(config, Mapping) else {}


def parse_shape(value: Any) -> ImageShape | None:
    """Return `value` as (channels, height, width), or None where it is not three positive integers."""
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        return None
    return (value[0], value[1], value[2])


def as_module(value: Any) -> nn.Module:
    """Return `value`.

    Raises:
        TypeError: it is not a module.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"got a {type(value).__name__}, not a torch.nn.Module")
    return value


def output_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the module's first output for zeros of `shape` (N, C, H, W).

    Raises:
        ModelError: the module fails on them, or returns no tensor.
    """
    try:
        with torch.no_grad(), quiet_timm():
            output = module(torch.zeros(shape))
    except Exception as error:  # the network's own code may raise anything
        raise ModelError(
            f"the network does not accept an input of shape {shape}: {first_line(error)}; set --input-size C,H,W"
        ) from error
    while isinstance(output, (tuple, list, Mapping)) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the network returns a {type(output).__name__}; it must return a tensor of class scores")
    return tuple(output.shape)
