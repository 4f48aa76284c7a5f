"""What is stated comes from the option, the preset, the file or timm; what nobody states is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_edge.errors import UsageError
from mm_edge.load.network import LoadOptions
from mm_edge.load.preprocessing import read_preprocessing
from mm_edge.load.presets import PRESETS, RESIZES
from mm_edge.records import InputSpec, to_json
from mm_edge.run.request import make_model_options

ALL = ("mean", "std", "scale", "colours", "resize")
SHAPE = (3, 8, 12)
TIMM = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.9}


def read(config: dict[str, Any] | None = None, timm: dict[str, Any] | None = None, **options: Any) -> InputSpec:
    return read_preprocessing(SHAPE, LoadOptions(**options), config or {}, timm or {})[0]


@pytest.mark.parametrize(
    ("options", "config", "assumed"),
    [
        ({}, {}, ALL),
        ({}, TIMM, ()),
        ({"preprocess": "yolo"}, {}, ()),
        ({"mean": (0.5,), "std": (0.5,)}, {}, ("colours", "resize")),
        ({"mean": (0.5,)}, {}, ("std", "scale", "colours", "resize")),
        ({"scale": 1.0, "resize": "stretch"}, {}, ("mean", "std", "colours")),
        ({"mean": (0.5,), "std": (0.5,), "scale": 1.0, "colours": "BGR", "resize": "stretch"}, {}, ()),
    ],
)
def test_what_nobody_states_is_named(options: dict[str, Any], config: dict[str, Any], assumed: tuple[str, ...]) -> None:
    spec, warnings = read_preprocessing(SHAPE, LoadOptions(**options), config, {})
    assert spec.assumed == assumed
    assert len(warnings) == bool(assumed)
    assert all(f"--{name}" in warnings[0] for name in assumed)


def test_the_warning_says_what_is_assumed_and_how_to_state_it() -> None:
    (text,) = read_preprocessing(SHAPE, LoadOptions(scale=0.5), {}, {})[1]
    assert text == (
        "preprocessing not stated, assumed: mean 0.485,0.456,0.406, std 0.229,0.224,0.225, colours RGB, resize crop; "
        "give --preprocess NAME, or --mean, --std, --colours, --resize"
    )


def test_options_come_before_presets_and_presets_before_files() -> None:
    assert read(TIMM).mean == (0.1, 0.2, 0.3)
    yolox = read(TIMM, preprocess="yolox")
    assert (yolox.mean, yolox.scale, yolox.colours, yolox.resize, yolox.pad, yolox.interpolation) == (
        (0.0, 0.0, 0.0),
        1.0,
        "BGR",
        "letterbox-corner",
        114,
        "bilinear",
    )
    mixed = read(TIMM, preprocess="yolox", colours="RGB", mean=(7.0,), scale=2.0)
    assert (mixed.mean, mixed.scale, mixed.colours, mixed.resize) == ((7.0,) * 3, 2.0, "RGB", "letterbox-corner")
    assert read(timm=TIMM).crop_pct == 0.9


@pytest.mark.parametrize(("stated", "taken"), [(0.5, 0.5), (1.0, 1.0), (1e-6, 0.875), (0.49, 0.875), (-1.0, 0.875)])
def test_a_crop_that_would_blow_photos_up_is_not_taken(stated: float, taken: float) -> None:
    """The short side is fitted to the input's divided by it: a millionth ended in a MemoryError."""
    assert read({**TIMM, "crop_pct": stated}).crop_pct == taken


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_states_everything_and_survives_an_artifact(name: str) -> None:
    spec = read(preprocess=name)
    assert spec.assumed == ()
    assert read(to_json(spec)) == spec


def test_what_an_artifact_only_assumed_stays_assumed() -> None:
    first, half = read(scale=1.0), read(mean=(0.5,), std=(0.5,))
    assert read(to_json(first)) == first
    assert read(to_json(half)) == half and half.assumed == ("colours", "resize")
    assert read(to_json(first), preprocess="yolo").assumed == ()


@pytest.mark.parametrize(
    "config",
    [
        {"scale": -1},
        {"scale": "x"},
        {"colours": 3},
        {"resize": ["crop"]},
        {"pad": 1000},
        {"layout": "x"},
        {"pad": True},
    ],
)
def test_values_of_a_file_that_cannot_be_used_are_left_out(config: dict[str, Any]) -> None:
    spec = read({**TIMM, **config})
    assert spec == read(TIMM)


def test_layout_by_the_option_reads_the_shape_again() -> None:
    assert read(layout="NHWC").shape == (12, 3, 8)  # the axes 3, 8, 12 as height, width and channels
    last = read_preprocessing((3, 8, 12), LoadOptions(), {}, {}, "NHWC")[0]
    assert (last.shape, last.layout, last.array_shape) == ((3, 8, 12), "NHWC", (8, 12, 3))
    assert read_preprocessing((3, 8, 12), LoadOptions(layout="NCHW"), {}, {}, "NHWC")[0].shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": "0"}, "--scale 0 leaves nothing of a pixel; give a number above 0 such as 1/255"),
        ({"scale": "1/0"}, "--scale '1/0' is not a number; write for example --scale 1/255"),
        ({"scale": "x"}, "--scale 'x' is not a number; write for example --scale 1/255"),
        ({"preprocess": "yolo5"}, "unknown --preprocess 'yolo5'; did you mean yolo or yolox?"),
        ({"colours": "RBG"}, "unknown --colours 'RBG'; did you mean RGB or BGR?"),
    ],
)
def test_options_that_cannot_be_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_model_options(**given)
    assert str(caught.value) == message


def test_scale_is_a_number_or_a_fraction() -> None:
    assert [make_model_options(scale=value).scale for value in ("1/255", "0.5", 2, 1.5)] == [1 / 255, 0.5, 2.0, 1.5]


def test_the_page_shows_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, preset in PRESETS.items():
        assert f"| `{name}` | {preset.help} |" in page
        assert preset.source in page
    assert all(f"| `{name}` |" in page for name in RESIZES)
