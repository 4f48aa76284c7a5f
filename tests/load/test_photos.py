"""Photos become inputs as stated: pixels counted by hand, and timm's own for classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_edge.errors import DataError
from mm_edge.load.photos import LONGEST_CROPPED, crop, normalise, pixels_of
from mm_edge.load.presets import PRESETS, RESIZES
from mm_edge.records import InputSpec, from_json, to_json

PLAIN: dict[str, Any] = {"interpolation": "bilinear"}


def spec_of(channels: int, height: int, width: int, **fields: Any) -> InputSpec:
    return InputSpec((channels, height, width), (0.0,) * channels, (1.0,) * channels, **{**PLAIN, **fields})


def photo(height: int, width: int, colour: tuple[int, int, int] = (10, 20, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def where(spec: InputSpec, image: Image.Image) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right (exclusive) of the part of the first channel that is no border of 114."""
    inside = pixels_of(spec)(image)[0] != 114
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("stretch", (5, 20), (0, 8, 0, 12)),
        # r = min(8 / 4, 12 / 12) = 1; four rows of border, two above
        ("letterbox", (4, 12), (2, 6, 0, 12)),
        # r = min(8 / 16, 12 / 16) = 0.5; 8 x 8 in a width of 12
        ("letterbox", (16, 16), (0, 8, 2, 10)),
        # r = 12 / 24 = 0.5; 5 of 8 rows: three of border, one above
        ("letterbox", (10, 24), (1, 6, 0, 12)),
        ("letterbox-corner", (16, 16), (0, 8, 0, 8)),
        # r = 0.5; floor(5.5) rows
        ("letterbox-corner", (11, 24), (0, 5, 0, 12)),
        # width ceil(8 * 10 / 16) = 5
        ("fit-height", (16, 10), (0, 8, 0, 5)),
        # width 8 * 40 / 4 = 80, squeezed to 12
        ("fit-height", (4, 40), (0, 8, 0, 12)),
        # one row at least
        ("letterbox", (1, 100), (3, 4, 0, 12)),
    ],
)
def test_where_the_photo_lies(resize: str, size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert where(spec_of(3, 8, 12, resize=resize, pad=114), photo(*size)) == expected


def test_stretching_averages_the_pixels_that_become_one() -> None:
    values = np.array([[0, 40], [80, 120]], np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    image = Image.fromarray(np.stack([values] * 3, axis=2))
    assert pixels_of(spec_of(3, 2, 2, resize="stretch", interpolation="nearest"))(image)[1].tolist() == [
        [0, 40],
        [80, 120],
    ]
    assert pixels_of(spec_of(1, 1, 1, resize="stretch"))(image).tolist() == [[[60]]]


@pytest.mark.parametrize("resize", RESIZES)
def test_every_resizing_gives_the_shape(resize: str) -> None:
    for channels in (1, 3):
        for size in ((7, 30), (30, 7), (8, 8)):
            for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
                made = pixels_of(spec_of(channels, 8, 8, resize=resize))(photo(*size).convert(mode))
                assert made.shape == (channels, 8, 8) and made.dtype == np.uint8


@pytest.mark.parametrize("resize", RESIZES)
def test_colours_are_in_the_order_stated(resize: str) -> None:
    made = {
        name: pixels_of(spec_of(3, 4, 4, resize=resize, colours=name))(photo(4, 4))[:, 0, 0].tolist()
        for name in ("RGB", "BGR")
    }
    assert made == {"RGB": [10, 20, 30], "BGR": [30, 20, 10]}


def test_scale_mean_std_and_layout() -> None:
    pixels = np.array([[[[10, 20]], [[30, 40]], [[50, 60]]]], np.uint8)  # (1, 3, 1, 2)
    spec = InputSpec((3, 1, 2), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), scale=0.5)
    assert normalise(pixels, spec).tolist() == [[[[2, 4.5]], [[3.25, 4.5]], [[2.75, 3.375]]]]
    last = InputSpec((3, 1, 2), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), scale=0.5, layout="NHWC")
    assert normalise(pixels, last).tolist() == [[[[2, 3.25, 2.75], [4.5, 4.5, 3.375]]]]
    assert last.array_shape == (1, 2, 3) and spec.array_shape == (3, 1, 2)


def test_the_default_scale_divides_by_255_to_the_bit() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    spec = InputSpec((1, 16, 16), (0.3,), (0.7,))
    expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.3)) / np.float32(0.7)
    assert np.array_equal(normalise(pixels, spec), expected)


def extremes(name: str) -> list[list[float]]:
    """Return what a preset makes of black and of white, per channel."""
    preset = PRESETS[name]
    spec = InputSpec((3, 1, 1), preset.mean, preset.std, scale=preset.scale)
    return [normalise(np.full((1, 3, 1, 1), value, np.uint8), spec).reshape(3).round(4).tolist() for value in (0, 255)]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("yolo", 0.0, 1.0),
        ("yolox", 0.0, 255.0),
        ("paddle-rec", -1.0, 1.0),
        ("minus-one-to-one", -1.0, 1.0),
        ("zero-to-one", 0.0, 1.0),
        ("raw", 0.0, 255.0),
    ],
)
def test_presets_reach_the_range_they_say(name: str, low: float, high: float) -> None:
    assert extremes(name) == [[low] * 3, [high] * 3]


def test_imagenets_presets() -> None:
    for name in ("imagenet", "imagenet-stretch", "paddle-det", "picodet"):
        low, high = extremes(name)
        assert low == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)
        assert high == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


def test_a_stored_specification_without_the_newer_fields_is_read() -> None:
    old = {"shape": [3, 8, 8], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 0.9}
    spec = from_json(InputSpec, old)
    assert spec == InputSpec((3, 8, 8), (0.5,), (0.5,), "bicubic", 0.9)
    assert (spec.layout, spec.colours, spec.scale, spec.resize, spec.assumed) == ("NCHW", "RGB", 1 / 255, "crop", ())
    assert from_json(InputSpec, to_json(spec)) == spec


def test_an_input_too_long_to_crop_photos_to_is_refused() -> None:
    """A file may state 16 x 1048576: the photo would be fitted to 1.2 million pixels both ways."""
    crop(InputSpec((3, 16, LONGEST_CROPPED), (0.0,) * 3, (1.0,) * 3))
    with pytest.raises(
        DataError, match=r"^photos cannot be cropped to 16 x 1048576: at most 16384 on the longer "
    ):
        crop(InputSpec((3, 16, 1 << 20), (0.0,) * 3, (1.0,) * 3))
