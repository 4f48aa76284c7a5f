"""How a photo becomes an input: resizing, order of colours, normalisation and layout, with Pillow and NumPy.

    resize (load.presets.RESIZES) -> order of colours -> uint8 (C, H, W), kept in memory
    (v * scale - mean) / std, per channel -> float32 (N, C, H, W), or (N, H, W, C)

With (h, w) the size of a photo and (H, W) that of the input:

    letterbox          r = min(H / h, W / w); size (round(h r), round(w r)), half of the border at the left and above,
                       rounded down
    letterbox-corner   r as above; size (floor(h r), floor(w r)), at the upper left
    fit-height         size (H, min(W, ceil(H w / h))), at the left

Reducing a photo averages over the pixels that become one, as Pillow does. OpenCV's bilinear resizing does not average.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data import create_transform

from mm_edge.arrays import Float32Array
from mm_edge.errors import DataError
from mm_edge.load.presets import RESIZES
from mm_edge.records import InputSpec

Bytes = npt.NDArray[np.uint8]
# From a decoded photo of any mode to its pixels, uint8 (C, H, W).
Fit = Callable[[Image.Image], Bytes]
# From the size of a photo to the size it is resized to and its upper left corner in the input: h, w, top, left.
_Place = Callable[[int, int], tuple[int, int, int, int]]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def pixels_of(spec: InputSpec) -> Fit:
    """Return the function from a decoded photo of any mode to its pixels as `spec` has them, uint8 (C, H, W)."""
    fit: Fit = RESIZES[spec.resize].fitter(spec)
    reverse = spec.colours == "BGR" and spec.shape[0] == 3
    return lambda image: _ordered(fit(with_channels(image, spec.shape[0])), reverse)


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return the photo in grey for one channel, else in RGB."""
    return image.convert("L" if channels == 1 else "RGB")


def normalise(pixels: Bytes, spec: InputSpec) -> Float32Array:
    """Return pixels (N, C, H, W) as the network takes them: float32, in the layout of `spec`."""
    mean = np.asarray(spec.mean, dtype=np.float32).reshape(1, -1, 1, 1)
    std = np.asarray(spec.std, dtype=np.float32).reshape(1, -1, 1, 1)
    # Dividing by 255 is what timm does; multiplying by 1 / 255 differs in the last bit.
    scaled = pixels.astype(np.float32) / np.float32(1 / spec.scale)
    made = (scaled - mean) / std
    return np.ascontiguousarray(made.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else made, dtype=np.float32)


def _ordered(pixels: Bytes, reverse: bool) -> Bytes:
    return np.ascontiguousarray(pixels[::-1]) if reverse else pixels


# ---- one function for each entry of RESIZES


# The longer side of an input that photos are cropped to: 1 GiB of pixels before the centre is kept.
LONGEST_CROPPED = 1 << 14


def crop(spec: InputSpec) -> Fit:
    """Fit the short side to the size divided by crop_pct and keep the centre, through timm's own transform.

    Raises:
        DataError: the longer side of the input is above LONGEST_CROPPED. The fitted photo has about its square of
            pixels before the centre is kept.
    """
    height, width = spec.shape[1:]
    if max(height, width) > LONGEST_CROPPED:
        raise DataError(
            f"photos cannot be cropped to {height} x {width}: at most {LONGEST_CROPPED} on the longer side; give "
            "--resize stretch"
        )
    transform = create_transform(
        input_size=spec.shape,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        is_training=False,
        normalize=False,
    )
    return lambda image: np.asarray(transform(image).numpy())


def stretch(spec: InputSpec) -> Fit:
    """Fit both sides."""
    _, height, width = spec.shape
    return _placed(spec, lambda h, w: (height, width, 0, 0))


def letterbox(spec: InputSpec) -> Fit:
    """Fit the longer side and centre the photo in the border."""
    _, height, width = spec.shape

    def place(h: int, w: int) -> tuple[int, int, int, int]:
        ratio = min(height / h, width / w)
        size = max(1, round(h * ratio)), max(1, round(w * ratio))
        return *size, (height - size[0]) // 2, (width - size[1]) // 2

    return _placed(spec, place)


def letterbox_corner(spec: InputSpec) -> Fit:
    """Fit the longer side and put the photo at the upper left."""
    _, height, width = spec.shape

    def place(h: int, w: int) -> tuple[int, int, int, int]:
        ratio = min(height / h, width / w)
        return max(1, int(h * ratio)), max(1, int(w * ratio)), 0, 0

    return _placed(spec, place)


def fit_height(spec: InputSpec) -> Fit:
    """Fit the height and put the photo at the left; one that is too wide is squeezed to the width."""
    _, height, width = spec.shape
    return _placed(spec, lambda h, w: (height, min(width, math.ceil(height * w / h)), 0, 0))


def _placed(spec: InputSpec, place: _Place) -> Fit:
    """Return the function that resizes a photo to the size that `place` gives and pastes it into the border."""
    _, height, width = spec.shape
    resampling = RESAMPLING[spec.interpolation]

    def fit(image: Image.Image) -> Bytes:
        h, w, top, left = place(image.height, image.width)
        resized = image if image.size == (w, h) else image.resize((w, h), resampling)
        if (h, w) != (height, width):
            canvas = Image.new(image.mode, (width, height), (spec.pad,) * len(image.getbands()))
            canvas.paste(resized, (left, top))
            resized = canvas
        pixels = np.asarray(resized)
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(planes)

    return fit
