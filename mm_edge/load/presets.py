"""How a photo becomes an input: what can be stated by name with --resize, --colours, --layout and --preprocess.

With v the value of a pixel in 0..255 after resizing, the network is given (v * scale - mean) / std, per channel.

This module imports nothing heavy, so that the command line can name the choices without PyTorch or Pillow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm_edge.deferred import Deferred

BYTE = 1 / 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Resize:
    """One way to give a photo the height and width of the input.

    Attributes:
        help: what it does, in a few words, for --help.
        fitter: takes a records.InputSpec and returns a function from a Pillow image to its pixels, uint8 (C, H, W).
    """

    help: str
    fitter: Callable[..., Any]


@dataclass(frozen=True)
class Named:
    """A name that needs no more than a sentence.

    Attributes:
        help: what it means, in a few words, for --help.
    """

    help: str


RESIZES: dict[str, Resize] = {
    "crop": Resize("the short side is fitted, the centre is kept", Deferred("mm_edge.load.photos:crop")),
    "stretch": Resize("both sides are fitted, proportions change", Deferred("mm_edge.load.photos:stretch")),
    "letterbox": Resize("the whole photo in the middle of a border", Deferred("mm_edge.load.photos:letterbox")),
    "letterbox-corner": Resize(
        "the whole photo at the upper left, a border below or right", Deferred("mm_edge.load.photos:letterbox_corner")
    ),
    "fit-height": Resize(
        "the height is fitted, a border at the right; wider photos are squeezed",
        Deferred("mm_edge.load.photos:fit_height"),
    ),
}

COLOURS: dict[str, Named] = {"RGB": Named("red first"), "BGR": Named("blue first, as OpenCV reads files")}

LAYOUTS: dict[str, Named] = {"NCHW": Named("channels first"), "NHWC": Named("channels last")}


@dataclass(frozen=True)
class Preset:
    """How a family of networks takes photos.

    Attributes:
        help: which networks, in a few words, for --help.
        source: where that is stated.
        mean, std, scale, colours, resize, pad, interpolation, crop_pct: as in records.InputSpec; mean and std hold one
            value for each of three channels, and their average is used for one channel.
    """

    help: str
    source: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = BYTE
    colours: str = "RGB"
    resize: str = "stretch"
    pad: int = 0
    interpolation: str = "bilinear"
    crop_pct: float = 0.875


PRESETS: dict[str, Preset] = {
    "imagenet": Preset(
        "classifiers of timm and torchvision",
        "torchvision's reference transforms: short side / 0.875, centre crop, ImageNet's mean and std",
        IMAGENET_MEAN,
        IMAGENET_STD,
        resize="crop",
        interpolation="bicubic",
    ),
    "imagenet-stretch": Preset(
        "segmenters and DETR-like detectors with ImageNet's mean and std",
        "torchvision's and Hugging Face's image processors, at one fixed size",
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
    "yolo": Preset(
        "YOLOv5 to YOLO11 of Ultralytics",
        "Ultralytics' LetterBox and predictor: RGB, pixels / 255, border of 114",
        NO_MEAN,
        NO_STD,
        resize="letterbox",
        pad=114,
    ),
    "yolox": Preset(
        "YOLOX of Megvii, not its legacy models",
        "YOLOX's data_augment.preproc: BGR, pixels as they are, border of 114 below and right",
        NO_MEAN,
        NO_STD,
        scale=1.0,
        colours="BGR",
        resize="letterbox-corner",
        pad=114,
    ),
    "paddle-det": Preset(
        "text detectors of PaddleOCR",
        "PaddleOCR's predict_det.py: BGR, ImageNet's mean and std in the order they are printed",
        IMAGENET_MEAN,
        IMAGENET_STD,
        colours="BGR",
    ),
    "paddle-rec": Preset(
        "text recognisers of PaddleOCR",
        "PaddleOCR's resize_norm_img: BGR to [-1, 1], height fitted, the rest of the width 0 after normalising",
        HALF,
        HALF,
        colours="BGR",
        resize="fit-height",
        pad=128,
    ),
    "paddle-cls": Preset(
        "classifiers of a text line's direction of PaddleOCR",
        "PaddleOCR's ClsResizeImg: as for its recognisers",
        HALF,
        HALF,
        colours="BGR",
        resize="fit-height",
        pad=128,
    ),
    "rapidocr-det": Preset(
        "text detectors of PaddleOCR as RapidOCR feeds them",
        "RapidOCR's config.yaml: BGR, mean and std 0.5",
        HALF,
        HALF,
        colours="BGR",
    ),
    "picodet": Preset(
        "PicoDet of PaddleDetection",
        "PaddleDetection's picodet_320_reader.yml: bicubic without keep_ratio, ImageNet's mean and std",
        IMAGENET_MEAN,
        IMAGENET_STD,
        interpolation="bicubic",
    ),
    "minus-one-to-one": Preset(
        "SSD, MobileNet and face networks that take [-1, 1]",
        "TensorFlow's object detection and slim: pixels * 2 / 255 - 1, both sides fitted",
        HALF,
        HALF,
    ),
    "zero-to-one": Preset(
        "networks that take [0, 1], such as RT-DETR",
        "pixels / 255, both sides fitted",
        NO_MEAN,
        NO_STD,
    ),
    "raw": Preset(
        "networks that take pixels in 0..255",
        "nothing is done but resizing, both sides fitted",
        NO_MEAN,
        NO_STD,
        scale=1.0,
    ),
}
