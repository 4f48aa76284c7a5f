"""Decides what a network expects of its input: mean, standard deviation, interpolation and crop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mm_edge.errors import ModelError
from mm_edge.load.network import ImageShape, LoadOptions
from mm_edge.records import InputSpec


def read_preprocessing(
    shape: ImageShape, options: LoadOptions, config: Mapping[str, Any], own_config: Mapping[str, Any]
) -> tuple[InputSpec, tuple[str, ...]]:
    """Return the input specification of a network for inputs of `shape`, and warnings for the user.

    Each value comes from the first that states it: `options`, the file's `config`, timm's `own_config`, ImageNet.

    Raises:
        ModelError: the user's mean or std does not fit the channels, or std is not above 0.
    """
    channels = shape[0]
    mean, mean_warning = _per_channel("mean", channels, options.mean, config, own_config, IMAGENET_DEFAULT_MEAN)
    std, std_warning = _per_channel("std", channels, options.std, config, own_config, IMAGENET_DEFAULT_STD)
    if any(value <= 0 for value in std):
        raise ModelError(f"--std {std} must be above 0 in every channel")
    known = {**own_config, **{key: value for key, value in config.items() if value is not None}}
    crop_pct, interpolation = known.get("crop_pct"), known.get("interpolation")
    warnings = tuple(dict.fromkeys(text for text in (mean_warning, std_warning) if text))
    if known.get("crop_mode") not in (None, "center"):
        warnings += (f"timm evaluates this network with crop mode {known['crop_mode']}; the centre crop is used",)
    spec = InputSpec(
        shape=shape,
        mean=mean,
        std=std,
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest", "lanczos") else "bicubic",
        crop_pct=float(crop_pct) if isinstance(crop_pct, (int, float)) and 0 < crop_pct <= 1 else 0.875,
    )
    return spec, warnings


def _per_channel(
    key: str,
    channels: int,
    option: tuple[float, ...] | None,
    config: Mapping[str, Any],
    own_config: Mapping[str, Any],
    default: Sequence[float],
) -> tuple[tuple[float, ...], str | None]:
    """Resolve mean or std to one value per channel; the second part is a warning where it had to be assumed."""
    if option is not None:
        if len(option) not in (1, channels) or not all(map(math.isfinite, option)):
            raise ModelError(
                f"--{key} has {len(option)} values; the input has {channels} channels: give 1 or {channels}"
            )
        return tuple(float(value) for value in option) * (channels // len(option)), None
    stated = _numbers(config.get(key)) or _numbers(own_config.get(key))
    warning = None if stated else "preprocessing unknown: ImageNet mean and std assumed; set --mean and --std"
    values = stated or tuple(default)
    if len(values) == channels:
        return values, warning
    average = sum(values) / len(values)
    text = f"mean and std are known for {len(values)} channels and the input has {channels}: their average is used"
    return (average,) * channels, warning or (None if len(values) == 1 else text)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value),)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
        return tuple(float(item) for item in value)
    return None
