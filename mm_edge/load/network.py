"""What the loaders share: the user's options, and a network that has been built but not yet checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_edge.errors import ModelError, first_line
from mm_edge.load.weights import quiet_timm

INIT_SEED = 0

ImageShape = tuple[int, int, int]
# How far from 1 the length of an embedding may be.
UNIT_TOLERANCE = 1e-4
# Numbers of channels of pictures: grey and RGB.
COLOURS = (1, 3)


@dataclass(frozen=True)
class LoadOptions:
    """The user's options for loading a model; None where the user gave none.

    `input_size` is (channels, height, width); `mean` and `std` hold one value, or one per channel, of scaled pixels.
    `preprocess` names a preset; `scale`, `colours`, `resize` and `layout` are as in records.InputSpec.
    `inputs` holds (name, shape) of the inputs of an .onnx that have a shape of the user's. With `guess_sizes` open
    dimensions that nothing states get sizes that the network accepts; otherwise they are refused. With `only_run` the
    model is not pruned, so that it may be quantised.
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
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    guess_sizes: bool = False
    only_run: bool = False


@dataclass(frozen=True)
class ModelInput:
    """One input of a network, batch included.

    Attributes:
        name: its name in the graph.
        shape: its sizes; None where the network leaves one open, and every artifact with it.
        measured: the sizes at which it is read, planned and measured.
        other: other sizes that the network accepts, at which artifacts are verified too; `measured` where no size is
            open, or where no other sizes were found.
        dtype: NumPy's name of its type.
    """

    name: str
    shape: tuple[int | None, ...]
    measured: tuple[int, ...]
    other: tuple[int, ...]
    dtype: str = "float32"

    @property
    def channels_last(self) -> bool:
        """Whether it is a batch of images with the channels behind the positions (N, H, W, C)."""
        image = len(self.shape) == 4
        return image and self.measured[3] in COLOURS and self.measured[1] not in COLOURS

    @property
    def is_image(self) -> bool:
        """Whether it is a batch of floating-point images."""
        return len(self.shape) == 4 and self.dtype.startswith("float")

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width; of other inputs their last two sizes behind ones."""
        if len(self.measured) == 4:
            _, first, second, third = self.measured
            return (third, first, second) if self.channels_last else (first, second, third)
        last = (1, 1, *self.measured[1:])[-2:]
        return (1, last[0], last[1])


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


def output_shape(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the module's first output for zeros of `shapes`, one for each input.

    Raises:
        ModelError: the module fails on them, or returns no tensor.
    """
    return tuple(first_output(module, *shapes).shape)


def first_output(module: nn.Module, *shapes: tuple[int, ...]) -> torch.Tensor:
    """Return the module's first output for zeros of `shapes`, one for each input.

    Raises:
        ModelError: the module fails on them, or returns no tensor.
    """
    try:
        with torch.no_grad(), quiet_timm():
            output = module(*(torch.zeros(shape) for shape in shapes))
    except Exception as error:  # the network's own code may raise anything
        raise ModelError(
            f"the network does not accept {_describe(shapes)}: {first_line(error)}; set "
            f"{'--input-size C,H,W' if len(shapes) == 1 else '--input NAME=SHAPE for each of its inputs'}"
        ) from error
    while isinstance(output, (tuple, list, Mapping)) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the network returns a {type(output).__name__}; it must return a tensor of class scores")
    return output


def count_classes(output: torch.Tensor) -> int | None:
    """Return how many classes the network has whose first output is `output`; None for one that is no classifier.

    Class scores are (batch, classes) with at least two classes. Rows of length 1 with numbers below zero are
    embeddings; probabilities are never below zero.
    """
    if output.ndim != 2 or output.shape[1] < 2:
        return None
    lengths = torch.linalg.vector_norm(output.detach().double(), dim=1)
    is_unit = bool((lengths - 1).abs().max() < UNIT_TOLERANCE) and bool((output < 0).any())
    return None if is_unit else int(output.shape[1])


def _describe(shapes: Sequence[tuple[int, ...]]) -> str:
    words = "an input of shape" if len(shapes) == 1 else "inputs of the shapes"
    return f"{words} {', '.join(map(str, shapes))}"
