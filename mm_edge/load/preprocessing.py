"""Decides what a network expects of a photo: every field of records.InputSpec.

Each field comes from the first that states it: the user's option, the user's preset, the file, timm's configuration of
the architecture. What nobody states is assumed, as classifiers have it, and named. Who states a mean or a std states
with it what timm means by one: RGB, pixels / 255 and the centre crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mm_edge.errors import ModelError
from mm_edge.load.network import ImageShape, LoadOptions
from mm_edge.load.photos import RESAMPLING
from mm_edge.load.presets import BYTE, COLOURS, IMAGENET_MEAN, IMAGENET_STD, LAYOUTS, PRESETS, RESIZES
from mm_edge.records import InputSpec

# The fields that an option of the same name states.
STATED_BY_OPTION = ("mean", "std", "scale", "colours", "resize")

# Pixels in 0..65535 and their deviations are far from it, and so is its inverse.
_LARGEST = 1e6

_Config = Mapping[str, Any]


# A photo's short side is fitted to the input's divided by the share that is kept: a share of a millionth would take
# terabytes. The least that timm states is 0.875.
LEAST_CROP = 0.5


def read_preprocessing(
    shape: ImageShape, options: LoadOptions, config: _Config, own_config: _Config, layout: str = "NCHW"
) -> tuple[InputSpec, tuple[str, ...]]:
    """Return the input specification of a network, and warnings for the user.

    Args:
        shape: channels, height and width of its input, read in `layout`.
        options: what the user states.
        config: what the file states; of an artifact of mm-edge, the fields of its InputSpec.
        own_config: timm's configuration of the architecture.
        layout: the order of the axes that the shape of the input suggests.

    Raises:
        ModelError: the user's mean or std does not fit the channels, or std is not above 0.
    """
    found_layout = options.layout or _known("layout", config, LAYOUTS) or layout
    shape = _read_in(shape, layout, found_layout)
    preset = asdict(PRESETS[options.preprocess]) if options.preprocess is not None else {}
    sources = (preset, _without_assumed(config), own_config)
    channels = shape[0]
    mean, mean_note = _per_channel("mean", channels, options.mean, sources, IMAGENET_MEAN)
    std, std_note = _per_channel("std", channels, options.std, sources, IMAGENET_STD)
    if any(value <= 0 for value in std):
        raise ModelError(f"--std {std} must be above 0 in every channel")
    spec = InputSpec(
        shape=shape,
        mean=mean,
        std=std,
        interpolation=_first(sources, "interpolation", lambda value: value in RESAMPLING) or "bicubic",
        crop_pct=float(_first(sources, "crop_pct", _is_crop) or 0.875),
        layout=found_layout,
        colours=options.colours or _first(sources, "colours", lambda value: value in COLOURS) or "RGB",
        scale=float(options.scale or _first(sources, "scale", lambda value: _is_number(value) and value > 0) or BYTE),
        resize=options.resize or _first(sources, "resize", lambda value: value in RESIZES) or "crop",
        pad=int(_first(sources, "pad", lambda value: isinstance(value, int) and 0 <= value <= 255) or 0),
        assumed=_assumed(channels, options, sources),
    )
    notes = tuple(dict.fromkeys(text for text in (mean_note, std_note) if text))
    crop_mode = own_config.get("crop_mode") if config.get("crop_mode") is None else config["crop_mode"]
    if crop_mode not in (None, "center") and spec.resize == "crop":
        notes += (f"timm evaluates this network with crop mode {crop_mode}; the centre crop is used",)
    return spec, (*_assumption(spec), *notes)


def _read_in(shape: ImageShape, layout: str, wanted: str) -> ImageShape:
    """Return (channels, height, width) of an input that was read in `layout` and has the `wanted` one."""
    if layout == wanted:
        return shape
    first, second, third = shape if layout == "NCHW" else (*shape[1:], shape[0])  # the axes as the network has them
    return (third, first, second) if wanted == "NHWC" else (first, second, third)


def _without_assumed(config: _Config) -> dict[str, Any]:
    """Return what the file states, without the fields that an earlier run only assumed."""
    names = _assumed_by(config)
    return {key: value for key, value in config.items() if value is not None and key not in names}


def _assumed_by(config: _Config) -> tuple[str, ...]:
    """Return the fields that an artifact of mm-edge says were assumed."""
    names = config.get("assumed")
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, (list, tuple)) else ()


def _assumed(channels: int, options: LoadOptions, sources: Sequence[_Config]) -> tuple[str, ...]:
    stated = {name for name in STATED_BY_OPTION if getattr(options, name) is not None}
    stated |= {key for source in sources for key, value in source.items() if value is not None}
    implied: set[str] = set()
    for source in sources:
        if any(_numbers(source.get(key)) for key in ("mean", "std")):
            implied |= {"scale", "colours", "resize"} - set(_assumed_by(source))
    implied |= {"scale"} if stated >= {"mean", "std"} else set()  # they are of pixels / 255
    implied |= {"colours"} if channels != 3 else set()
    return tuple(name for name in STATED_BY_OPTION if name not in stated | implied)


def _assumption(spec: InputSpec) -> tuple[str, ...]:
    """Return the sentence that names what is assumed, if anything is."""
    if not spec.assumed:
        return ()
    values = ", ".join(f"{name} {_shown(name, getattr(spec, name))}" for name in spec.assumed)
    options = ", ".join(f"--{name}" for name in spec.assumed)
    return (f"preprocessing not stated, assumed: {values}; give --preprocess NAME, or {options}",)


def _shown(name: str, value: Any) -> str:
    if name == "scale":
        return "1/255" if value == BYTE else f"{value:g}"
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def _known(key: str, config: _Config, choices: _Config) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) and value in choices else None


def _first(sources: Sequence[_Config], key: str, usable: Any) -> Any:
    """Return the first usable value of `key`; files may hold anything under it."""
    for source in sources:
        value = source.get(key)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and usable(value):
            return value
    return None


def _is_crop(value: Any) -> bool:
    return _is_number(value) and LEAST_CROP <= value <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(_float(value))


def _per_channel(
    key: str,
    channels: int,
    option: tuple[float, ...] | None,
    sources: Sequence[_Config],
    default: Sequence[float],
) -> tuple[tuple[float, ...], str | None]:
    """Resolve mean or std to one value per channel; the second part says where values had to be averaged."""
    if option is not None:
        if len(option) not in (1, channels) or not all(map(math.isfinite, option)):
            raise ModelError(
                f"--{key} has {len(option)} values; the input has {channels} channels: give 1 or {channels}"
            )
        return tuple(float(value) for value in option) * (channels // len(option)), None
    stated = next((found for source in sources if (found := _numbers(source.get(key)))), None)
    if stated is not None and not all(_is_usable(key, value) for value in stated):
        shown = ",".join(f"{value:g}" for value in stated[:4])
        raise ModelError(f"the file states the {key} {shown}, which no photo can have; give --{key}")
    values = stated or tuple(default)
    if len(values) == channels:
        return values, None
    average = sum(values) / len(values)
    text = f"mean and std are known for {len(values)} channels and the input has {channels}: their average is used"
    return (average,) * channels, text if stated and len(values) > 1 else None


def _is_usable(key: str, value: float) -> bool:
    """Whether a mean or std that a file states can be one, of pixels in any scale."""
    return math.isfinite(value) and abs(value) <= _LARGEST and (key != "std" or abs(value) >= 1 / _LARGEST)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (_float(value),)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
        return tuple(_float(item) for item in value)
    return None


def _float(value: float) -> float:
    """Return a number as float; a whole number beyond the range of floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
