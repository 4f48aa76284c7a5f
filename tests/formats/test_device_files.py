"""Files for the device: metadata, .ort, external data, preprocessing inside the model, unstructured zeros on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from timm.data import create_transform

from mm_edge.arrays import Array
from mm_edge.bench.target import load_target, resolve_host
from mm_edge.errors import JobError, ModelError, ParityError, UsageError
from mm_edge.formats.device_files import (
    add_metadata_,
    read_metadata,
    run_images,
    stored_bytes,
    write_model,
)
from mm_edge.formats.ort_file import convert_to_ort
from mm_edge.formats.preprocess import bake_preprocess
from mm_edge.formats.sparse_file import read_stored, store_smallest
from mm_edge.load.photos import normalise, pixels_of
from mm_edge.quality.parity import onnx_runner
from mm_edge.records import InputSpec, to_json

SIDE = 24
SPEC = InputSpec((3, SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)


def network(channels: int = 3, width: int = 48, sparsity: float = 0.0) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, mean: `width` classes; the second convolution has `sparsity` zeros."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((width, channels, 3, 3)) / 3,
        "w2": rng.standard_normal((width, width, 3, 3)) / 9,
    }
    order = np.argsort(np.abs(weights["w2"]), axis=None)
    weights["w2"].reshape(-1)[order[: int(sparsity * order.size)]] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "second"),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["y"], "flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def saved(path: Path, model: onnx.ModelProto | None = None) -> Path:
    write_model(model or network(), path)
    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)


def photograph(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth noise with sharp edges, uint8 (height, width, channels)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 9, channels), dtype=np.uint8)
    rows, columns = np.arange(height) * 9 // height, np.arange(width) * 9 // width
    noise = rng.integers(-20, 20, (height, width, channels))
    return np.clip(coarse[rows][:, columns].astype(int) + noise, 0, 255).astype(np.uint8)


def pipeline(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What the evaluation pipeline makes of the image, in uint8 (C, H, W)."""
    transform = create_transform(
        spec.shape, interpolation=spec.interpolation, crop_pct=spec.crop_pct, is_training=False, normalize=False
    )
    picture = Image.fromarray(image[:, :, 0]) if image.shape[2] == 1 else Image.fromarray(image)
    pixels: Array = transform(picture).numpy()
    return pixels


def normalised(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
    return ((pixels.astype(np.float32) / np.float32(255) - mean) / std)[None]


# ---- metadata


@pytest.mark.parametrize("form", ["onnx", "ort"])
def test_metadata_comes_back_from_either_format(tmp_path: Path, form: str) -> None:
    model = network()
    model.metadata_props.add(key="someone", value="else's")
    add_metadata_(model, SPEC, ("cat", "dög"), {"source": "w.pt"})
    add_metadata_(model, SPEC, ("cat", "dög"), {"source": "w2.pt"})
    path = saved(tmp_path / "m.onnx", model)
    if form == "ort":
        path = convert_to_ort(path, tmp_path, load_target("raspberry-pi-5"), images(2), "noise").ort
    found = read_metadata(path)
    assert found == {
        "labels": ["cat", "dög"],
        "input": to_json(SPEC),
        "opset": 20,
        "provenance": {"source": "w2.pt"},
    }
    if form == "onnx":
        assert {entry.key: entry.value for entry in onnx.load(path).metadata_props}["someone"] == "else's"


def test_a_model_without_metadata_has_none(tmp_path: Path) -> None:
    assert read_metadata(saved(tmp_path / "m.onnx")) == {}
    (tmp_path / "n.onnx").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load '.*n\.onnx'"):
        read_metadata(tmp_path / "n.onnx")


# ---- .ort


@pytest.mark.parametrize("target", ["host", "raspberry-pi-5"])
def test_ort_agrees_and_lists_its_operators(tmp_path: Path, target: str) -> None:
    path = saved(tmp_path / "m.onnx")
    made = convert_to_ort(path, tmp_path, resolve_host(load_target(target)), images(4), "noise")
    np.testing.assert_allclose(onnx_runner(made.ort)(images(1))[0], onnx_runner(path)(images(1))[0], rtol=1e-4)
    assert made.parity.top1_agreement == 1.0 and made.parity.inputs.count == 4
    assert made.file_bytes == made.ort.stat().st_size
    text = made.operators.read_text()
    assert "Conv" in text and str(tmp_path) not in text and "#" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, made.ort.name, made.operators.name])


def test_an_ort_file_for_another_machine_has_no_blocked_layout(tmp_path: Path) -> None:
    made = convert_to_ort(saved(tmp_path / "m.onnx"), tmp_path, load_target("raspberry-pi-5"), images(1), "noise")
    assert "nchwc" not in made.operators.read_text()


def test_an_ort_file_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.onnx")
    monkeypatch.setattr(
        "mm_edge.formats.ort_file.onnx_runner",
        lambda file: lambda x: [out * (1.01 if file.suffix == ".ort" else 1) for out in onnx_runner(file)(x)],
    )
    with pytest.raises(ParityError, match=r"m\.ort differs"):
        convert_to_ort(path, tmp_path, load_target("raspberry-pi-5"), images(2), "noise")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no")
    with pytest.raises(JobError, match=r"ONNX Runtime cannot convert '.*m\.onnx' to \.ort: .+"):
        convert_to_ort(tmp_path / "m.onnx", tmp_path, load_target("raspberry-pi-5"), images(1), "noise")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# ---- external data


def test_weights_move_beside_a_model_that_is_too_large(tmp_path: Path) -> None:
    model = network()
    size = write_model(model, tmp_path / "big.onnx", external_over=10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert size == sum(p.stat().st_size for p in tmp_path.iterdir()) == stored_bytes(tmp_path / "big.onnx")
    assert (tmp_path / "big.onnx").stat().st_size < 10_000
    saved(tmp_path / "small.onnx", network())
    expected = onnx_runner(tmp_path / "small.onnx")(images(1))[0]
    np.testing.assert_array_equal(onnx_runner(tmp_path / "big.onnx")(images(1))[0], expected)
    assert stored_bytes(tmp_path / "small.onnx") == (tmp_path / "small.onnx").stat().st_size


# ---- preprocessing


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(61, 97), (100, 75), (24, 24), (18, 30), (33, 34)])
def test_baked_preprocessing_is_the_pipelines(
    tmp_path: Path, interpolation: str, crop_pct: float, size: tuple[int, int]
) -> None:
    spec = dataclasses.replace(SPEC, interpolation=interpolation, crop_pct=crop_pct)
    model = network()
    baked = bake_preprocess(model, spec)
    baked.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE]))
    answer, seen = run_images(saved(tmp_path / "b.onnx", baked))(photograph(*size))
    expected = normalised(pipeline(photograph(*size), spec), spec)
    levels = np.abs(seen - expected) * np.array(spec.std, np.float32).reshape(1, -1, 1, 1) * 255
    # Pillow and ONNX Runtime round their weights to 22 bits differently, which moves values that lie half-way.
    assert levels.max() < 2.5 and levels.mean() < 0.1
    reference = onnx_runner(saved(tmp_path / "m.onnx", model))(expected)[0]
    assert answer.argmax() == reference.argmax()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_baked_stretching_in_other_colours_scale_and_layout(tmp_path: Path, layout: str) -> None:
    plain = InputSpec((3, 16, SIDE), (100.0, 110.0, 120.0), (50.0, 50.0, 50.0), "bilinear", layout=layout)
    spec = dataclasses.replace(plain, resize="stretch", colours="BGR", scale=1.0)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *spec.array_shape])
    seen = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, *spec.array_shape])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [given], [seen])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    image = photograph(40, 30)
    (made,) = run_images(saved(tmp_path / "b.onnx", bake_preprocess(model, spec)))(image)
    expected = normalise(pixels_of(spec)(Image.fromarray(image))[None], spec)
    levels = np.abs(made - expected) * 50
    # The sides are reduced by different factors, one after the other and rounded in between.
    assert levels.max() < 1.5 and levels.mean() < 0.3


def test_one_channel_images(tmp_path: Path) -> None:
    spec = InputSpec((1, SIDE, SIDE), (0.3,), (0.35,))
    path = saved(tmp_path / "b.onnx", bake_preprocess(network(channels=1), spec))
    image = photograph(40, 30, channels=1)
    expected = onnx_runner(saved(tmp_path / "m.onnx", network(channels=1)))(normalised(pipeline(image, spec), spec))
    np.testing.assert_allclose(run_images(path)(image)[0], expected[0], rtol=0.02, atol=0.01)


def test_the_model_given_is_not_changed(tmp_path: Path) -> None:
    model = network()
    before = model.SerializeToString()
    baked = bake_preprocess(model, SPEC)
    assert model.SerializeToString() == before
    (feed,) = baked.graph.input
    assert feed.name == "image" and feed.type.tensor_type.elem_type == TensorProto.UINT8
    onnx.checker.check_model(baked, full_check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "lanczos"}, "knows bicubic and bilinear; this network was trained with lanczos"),
        ({"resize": "letterbox"}, "writes the resizings crop and stretch; this network's is letterbox"),
        ({"shape": (3, 32, 32)}, r"needs an fp32 input of shape \[1, 3, 32, 32\]; this model has \[1, 3, 24, 24\]"),
    ],
)
def test_what_cannot_be_baked_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match="--bake-preprocess " + message):
        bake_preprocess(network(), dataclasses.replace(SPEC, **change))


# ---- unstructured zeros on disk


@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_the_smallest_form_loads_and_answers_the_same(tmp_path: Path, sparsity: float) -> None:
    dense = saved(tmp_path / "dense.onnx")
    model = saved(tmp_path / "pruned.onnx", network(sparsity=sparsity))
    stored = store_smallest(model, dense, tmp_path / "out")
    assert stored.file_bytes == stored.path.stat().st_size == min(stored.sizes.values())
    assert stored.sizes["onnx"] == model.stat().st_size == stored.dense_sizes["onnx"]
    assert 0.2 < stored.saving < sparsity + 0.02
    session = onnxruntime.InferenceSession(read_stored(stored.path), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": images(1)})[0], onnx_runner(model)(images(1))[0])


def test_sparse_initialisers_pay_beyond_two_thirds_and_load(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense.onnx")
    half = store_smallest(saved(tmp_path / "half.onnx", network(sparsity=0.5)), dense, tmp_path)
    assert half.sizes["sparse"] == half.sizes["onnx"]
    most = store_smallest(saved(tmp_path / "most.onnx", network(sparsity=0.9)), dense, tmp_path)
    assert most.sizes["sparse"] < 0.5 * most.sizes["onnx"]


def test_the_saving_is_against_the_dense_model_in_the_same_form(tmp_path: Path) -> None:
    dense = saved(tmp_path / "dense.onnx")
    stored = store_smallest(saved(tmp_path / "same.onnx"), dense, tmp_path)
    assert stored.saving == 0.0  # compressing what has no zeros is no gain of pruning


def test_a_damaged_container_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.xz").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"m\.onnx\.xz' is damaged"):
        read_stored(tmp_path / "m.onnx.xz")
