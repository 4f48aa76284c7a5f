"""int8 and fp16 on a small network: schemes by instruction set, ranges by hand, layers that cannot bear 8 bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mm_edge.arrays import Array, Float32Array
from mm_edge.bench.target import load_target, resolve_host
from mm_edge.errors import JobError, ModelError, UsageError
from mm_edge.formats.fp16 import convert_fp16
from mm_edge.formats.int8_graph import decoding_nodes, read_ready
from mm_edge.formats.quantize import (
    Extremes,
    calibrate,
    find_sensitive_layers,
    layer_names,
    quantise,
    quantise_dynamic,
    quantise_static,
)
from mm_edge.formats.schemes import scheme_for
from mm_edge.quality.divergences import error_per_image
from mm_edge.quality.evaluation import compare_logits, run_onnx, run_outputs

CHANNELS, CLASSES = 8, 5


def images(count: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), dtype=np.float32)


def conv_net(path: Path, outlier: float = 0.0, opset: int = 20) -> Path:
    """Conv, Relu, Conv, Relu, mean, Gemm.

    With an `outlier` channel 0 is always 0 behind its Relu, and meets weights `outlier` times larger than the others:
    they change nothing in fp32 and leave the others few of the 8-bit levels.
    """
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((CHANNELS, 3, 3, 3)) / 5,
        "b1": rng.standard_normal(CHANNELS) / 5,
        "w2": rng.standard_normal((CHANNELS, CHANNELS, 1, 1)) / 3,
        "b2": rng.standard_normal(CHANNELS) / 5,
        "w3": rng.standard_normal((CLASSES, CHANNELS)) * 4,
        "b3": rng.standard_normal(CLASSES),
    }
    if outlier:
        weights["w1"][0], weights["b1"][0] = 0, -0.001
        weights["w2"][:, 0] = outlier
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu1"),
        helper.make_node("Conv", ["b", "w2", "b2"], ["c"], "second"),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    return save(path, nodes, weights, [1, 3, 8, 8], opset)


def linear_net(path: Path) -> Path:
    """Two MatMul layers over the flattened image."""
    rng = np.random.default_rng(2)
    weights = {"w1": rng.standard_normal((192, 32)) / 14, "w2": rng.standard_normal((32, CLASSES))}
    nodes = [
        helper.make_node("Flatten", ["x"], ["a"], "flat"),
        helper.make_node("MatMul", ["a", "w1"], ["b"], "fc1"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "w2"], ["y"], "fc2"),
    ]
    return save(path, nodes, weights, [1, 3, 8, 8], 20)


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, Array], shape: list[int], opset: int) -> Path:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def logits(path: Path, inputs: np.ndarray) -> np.ndarray:
    return run_onnx(path, [(inputs, np.zeros(len(inputs), dtype=np.int64))], 1)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


VNNI, PLAIN, ARM, GPU = "x86_64-avx512-vnni", "x86_64-avx2", "raspberry-pi-4", "nvidia-a100"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (VNNI, ("U8S8", False, False, False, False)),
        (PLAIN, ("U8S8", False, False, True, False)),
        ("x86_64-avx512", ("U8S8", False, False, True, False)),
        (ARM, ("S8S8", True, False, False, False)),
        ("raspberry-pi-5", ("S8S8", True, False, False, False)),
    ],
)
def test_scheme_follows_the_instruction_set(target: str, expected: tuple[str | bool, ...]) -> None:
    assert dataclasses.astuple(scheme_for(load_target(target)))[:5] == expected


def test_a_provider_that_is_not_the_cpu_gets_symmetric_numbers() -> None:
    scheme = scheme_for(dataclasses.replace(load_target(GPU), provider="TensorrtExecutionProvider"))
    assert dataclasses.astuple(scheme)[:5] == ("S8S8", True, True, False, True)


def test_int8_is_refused_where_the_target_does_not_list_it() -> None:
    target = dataclasses.replace(load_target(VNNI), data_types=("fp32",), sources={"data_types": "no int8 kernels"})
    with pytest.raises(UsageError) as caught:
        scheme_for(target)
    assert str(caught.value) == (
        "int8 gains nothing on x86_64-avx512-vnni, which lists fp32 (no int8 kernels); use one of these"
    )


def test_fp16_is_refused_on_a_cpu_with_the_profiles_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fp16 gains nothing on raspberry-pi-5, which lists fp32, int8 .*25824"):
        convert_fp16(conv_net(tmp_path / "m.onnx"), tmp_path / "h.onnx", load_target("raspberry-pi-5"))
    assert not (tmp_path / "h.onnx").exists()


def test_fp16_keeps_the_interface_and_halves_the_weights(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    report = convert_fp16(model, tmp_path / "h.onnx", load_target(GPU))
    assert report.precision == "fp16"
    assert report.file_bytes == (tmp_path / "h.onnx").stat().st_size
    assert {array.dtype for name, array in initializers(tmp_path / "h.onnx").items() if name.startswith("w")} == {
        np.dtype(np.float16)
    }
    half = logits(tmp_path / "h.onnx", images(8))
    np.testing.assert_allclose(half, logits(model, images(8)), atol=0.05)


def test_extremes_are_those_of_each_image(tmp_path: Path) -> None:
    batch = images(3)
    extremes = calibrate(conv_net(tmp_path / "m.onnx"), [batch[:2], batch[2:]])
    column = extremes.names.index("x")
    np.testing.assert_array_equal(extremes.low[:, column], batch.min(axis=(1, 2, 3)))
    np.testing.assert_array_equal(extremes.high[:, column], batch.max(axis=(1, 2, 3)))
    assert set(extremes.names) == {"x", "a", "b", "c", "d", "e", "f", "y"}
    relu = extremes.names.index("b")
    assert (extremes.low[:, relu] >= 0).all()


def test_ranges_by_hand() -> None:
    extremes = Extremes(("t",), np.array([[-1.0], [-3.0]], np.float32), np.array([[2.0], [4.0]], np.float32))
    assert extremes.ranges("minmax") == {"t": (-3.0, 4.0)}
    assert extremes.ranges("mean") == {"t": (-2.0, 3.0)}


def test_without_images_there_are_no_ranges(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(conv_net(tmp_path / "m.onnx"), [])
    assert str(caught.value) == "int8 needs calibration images; give --data PATH, or ask for --precision fp32"


def test_an_activation_that_is_not_finite_is_named(tmp_path: Path) -> None:
    batch = images(2)
    batch[1, 0, 0, 0] = np.inf
    with pytest.raises(JobError, match="activation 'x' is not finite"):
        calibrate(conv_net(tmp_path / "m.onnx"), [batch])


@pytest.mark.parametrize("target", [VNNI, PLAIN, ARM, GPU])
def test_static_is_near_fp32_and_the_same_every_time(tmp_path: Path, target: str) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(16)]).ranges("minmax")
    scheme = scheme_for(load_target(target))
    report = quantise_static(model, tmp_path / "a.onnx", ranges, scheme)
    quantise_static(model, tmp_path / "b.onnx", ranges, scheme)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert (report.layers, report.fp32_layers, report.scheme) == (3, (), scheme.name)
    found = compare_logits(logits(tmp_path / "a.onnx", images(64, 9)), None, logits(model, images(64, 9)))
    assert found.kl_to_dense is not None and 0 < found.kl_to_dense < 0.02


def test_weights_are_signed_bytes_with_one_scale_per_channel(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(8)]).ranges("minmax")
    quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(VNNI)))
    stored = initializers(tmp_path / "q.onnx")
    weight, scale = stored["w2_quantized"], stored["w2_scale"]
    assert weight.dtype == np.int8 and scale.shape == (CHANNELS,)
    assert (np.abs(weight.reshape(CHANNELS, -1)).max(axis=1) == 127).all()
    np.testing.assert_allclose(weight * scale.reshape(-1, 1, 1, 1), initializers(model)["w2"], atol=scale.max() / 2)
    assert stored["x_zero_point"].dtype == np.uint8


def test_without_vnni_weights_use_seven_bits(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(8)]).ranges("minmax")
    quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(PLAIN)))
    assert np.abs(initializers(tmp_path / "q.onnx")["w2_quantized"].astype(int)).max() <= 64


@pytest.mark.parametrize("target", [VNNI, ARM])
def test_logits_are_not_rounded_to_eight_bits(tmp_path: Path, target: str) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(16)]).ranges("minmax")
    quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(target)))
    made = onnx.load(tmp_path / "q.onnx")
    (last,) = (node for node in made.graph.node if "y" in node.output)
    assert last.op_type == "Gemm"
    assert len(np.unique(logits(tmp_path / "q.onnx", images(200, 9)))) > 300  # 8 bits have 256 values
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    assert "QGemm" in {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node}  # still 8-bit arithmetic


def test_excluded_layers_keep_their_fp32_weights(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(8)]).ranges("minmax")
    report = quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(VNNI)), ["second"])
    stored = initializers(tmp_path / "q.onnx")
    np.testing.assert_array_equal(stored["w2"], initializers(model)["w2"])
    assert "w1_quantized" in stored and report.fp32_layers == ("second",)


def test_an_unknown_layer_is_refused(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"no layer of the model is called 'third'; quantize\.layer_names lists them"):
        quantise_static(model, tmp_path / "q.onnx", {}, scheme_for(load_target(VNNI)), ["third"])
    assert layer_names(model) == ("first", "second", "head")


def test_the_layer_that_cannot_bear_eight_bits_is_found(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx", outlier=100.0)
    ranges = calibrate(model, [images(16)]).ranges("minmax")
    found = find_sensitive_layers(model, ranges, scheme_for(load_target(VNNI)), images(32, 5), goal_kl=1e-6, most=1)
    assert found.fp32_layers == ("second",)
    assert found.kl_after < 0.7 * found.kl_before
    assert set(found.saved_kl) == {"first", "second", "head"}


def test_a_goal_that_is_met_leaves_every_layer_in_int8(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    ranges = calibrate(model, [images(16)]).ranges("minmax")
    found = find_sensitive_layers(model, ranges, scheme_for(load_target(VNNI)), images(32, 5), goal_kl=1.0)
    assert found.fp32_layers == () and found.kl_before == found.kl_after


def test_dynamic_takes_linear_layers_only(tmp_path: Path) -> None:
    model = linear_net(tmp_path / "m.onnx")
    report = quantise_dynamic(model, tmp_path / "q.onnx", scheme_for(load_target(VNNI)))
    assert (report.method, report.layers) == ("dynamic", 2)
    assert {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node} >= {"MatMulInteger"}
    found = compare_logits(logits(tmp_path / "q.onnx", images(64, 9)), None, logits(model, images(64, 9)))
    assert found.kl_to_dense is not None and 0 < found.kl_to_dense < 0.02


def test_dynamic_quantises_gemm_as_well(tmp_path: Path) -> None:
    report = quantise_dynamic(conv_net(tmp_path / "m.onnx"), tmp_path / "q.onnx", scheme_for(load_target(VNNI)))
    assert (report.layers, report.fp32_layers) == (1, ("first", "second"))
    assert "MatMulInteger" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


def test_quantise_takes_dynamic_where_static_loses(tmp_path: Path) -> None:
    model = linear_net(tmp_path / "m.onnx")
    # Calibrated on images a hundred times fainter than those it is judged on, static clips nearly everything.
    faint, bright = np.divide(images(8), 100, dtype=np.float32), images(16, 5)
    report = quantise(model, tmp_path / "q.onnx", load_target(VNNI), [faint], bright, most_fp32_layers=0)
    assert report.method == "dynamic" and report.kl_to_fp32 is not None and report.kl_to_fp32 < 0.02
    assert "static int8 diverges by" in report.notes[0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.onnx", "q.onnx"]


def test_quantise_reports_what_it_measured(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    report = quantise(model, tmp_path / "q.onnx", load_target(VNNI), [images(16)], images(32, 5))
    expected = compare_logits(logits(tmp_path / "q.onnx", images(32, 5)), None, logits(model, images(32, 5)))
    assert (report.method, report.ranges) == ("static", "minmax")
    assert (report.kl_to_fp32, report.agreement_top1) == (expected.kl_to_dense, expected.agreement_top1)


def test_an_old_opset_is_raised_first(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx", opset=11)
    ranges = calibrate(model, [images(8)]).ranges("minmax")
    quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(VNNI)))
    assert initializers(tmp_path / "q.onnx")["w1_scale"].shape == (CHANNELS,)


def test_a_shared_bias_is_split_before_the_quantiser_names_its_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    weights = {
        "w1": rng.standard_normal((CLASSES, 3, 3, 3)),
        "w2": rng.standard_normal((CLASSES, CLASSES, 1, 1)),
        "w3": rng.standard_normal((CLASSES, CLASSES)),
        "b": rng.standard_normal(CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["a"], "first"),
        helper.make_node("Conv", ["a", "w2", "b"], ["b0"], "second"),
        helper.make_node("GlobalAveragePool", ["b0"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flat"),
        helper.make_node("MatMul", ["d", "w3"], ["e"], "fc"),
        helper.make_node("Add", ["e", "b"], ["y"], "shift"),
    ]
    model = save(tmp_path / "m.onnx", nodes, weights, [1, 3, 8, 8], 20)
    # Without VNNI the sums of the VNNI scheme saturate, so the scheme is the one for the machine that runs the file.
    here = resolve_host(load_target("host"))
    report = quantise(model, tmp_path / "q.onnx", here, [images(16)], images(32, 5))
    assert report.layers == 3 and report.kl_to_fp32 is not None and report.kl_to_fp32 < 0.02


def padded_net(path: Path, sizes: list[int], value: float = 0.0) -> Path:
    """Pad, Conv of stride 2 with padding of its own, mean over the positions."""
    rng = np.random.default_rng(6)
    nodes = [
        helper.make_node("Pad", ["x", "sizes", "value"], ["p"], "pad"),
        helper.make_node("Conv", ["p", "w"], ["a"], "conv", strides=[2, 2], pads=[1, 0, 0, 0]),
        helper.make_node("ReduceMean", ["a", "axes"], ["y"], "mean", keepdims=0),
    ]
    save(path, nodes, {"w": rng.standard_normal((CLASSES, 3, 3, 3))}, [1, 3, 8, 8], 20)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), "sizes"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), "value"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def test_padding_and_means_run_in_eight_bits(tmp_path: Path) -> None:
    model = padded_net(tmp_path / "m.onnx", [0, 0, 0, 1, 0, 0, 1, 2])
    report = quantise(model, tmp_path / "q.onnx", load_target(VNNI), [images(16)], images(32, 5))
    made = onnx.load(tmp_path / "q.onnx")
    kinds = [node.op_type for node in made.graph.node]
    assert "Pad" not in kinds and "ReduceMean" not in kinds and "GlobalAveragePool" in kinds
    (conv,) = (node for node in made.graph.node if node.op_type == "Conv")
    assert next(list(item.ints) for item in conv.attribute if item.name == "pads") == [1, 1, 1, 2]
    assert report.kl_to_fp32 is not None and report.kl_to_fp32 < 0.02


@pytest.mark.parametrize(("sizes", "value"), [([0, 0, 1, 1, 0, 0, 1, 1], 0.5), ([0, 1, 1, 1, 0, -1, 1, 1], 0.0)])
def test_other_padding_stays(tmp_path: Path, sizes: list[int], value: float) -> None:
    model = padded_net(tmp_path / "m.onnx", sizes, value)
    ranges = calibrate(model, [images(8)]).ranges("minmax")
    quantise_static(model, tmp_path / "q.onnx", ranges, scheme_for(load_target(VNNI)))
    assert "Pad" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"m\.onnx is not an ONNX model"):
        layer_names(tmp_path / "m.onnx")


# ---- networks that are no classifiers


def detector(path: Path) -> Path:
    """Boxes of pixel size beside scores below 1, decoded by a distribution over distances, as in the YOLO family."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[N,3,8,8] x) => (float[N,2,64] y) {
        h = Conv<pads=[1,1,1,1]>(x, w) r = Relu(h)
        b = Conv(r, wb) c = Conv(r, wc)
        flat = Reshape(b, bins) t = Transpose<perm=[0,2,1,3]>(flat) soft = Softmax<axis=1>(t) d = Conv(soft, dfl)
        box = Reshape(d, row) pixels = Mul(box, stride)
        score = Reshape(c, row) probability = Sigmoid(score)
        y = Concat<axis=1>(pixels, probability)
    }"""
    proto = onnx.parser.parse_model(text)
    draw = np.random.default_rng(0).standard_normal
    weights: dict[str, Array] = {
        "w": draw((16, 3, 3, 3)).astype(np.float32),
        "wb": draw((4, 16, 1, 1)).astype(np.float32),
        "wc": (0.2 * draw((1, 16, 1, 1))).astype(np.float32),
        "dfl": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1),
        "bins": np.array([0, 1, 4, 64]),
        "row": np.array([0, 1, 64]),
        "stride": np.array(100, np.float32),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return path


def test_what_decodes_a_detector_stays_in_fp32(tmp_path: Path) -> None:
    model = detector(tmp_path / "m.onnx")
    decoding = [node.op_type for node in read_ready(model).graph.node if node.name in decoding_nodes(read_ready(model))]
    assert decoding == "Conv Conv Reshape Transpose Softmax Conv Reshape Mul Reshape Sigmoid Concat".split()
    report = quantise(model, tmp_path / "q.onnx", resolve_host(load_target("host")), [images(16)], images(16, 1))
    assert report.kl_to_fp32 is not None and report.kl_to_fp32 < 0.05 and report.agreement_top1 is None
    found = run_outputs(tmp_path / "q.onnx", [(images(8, 2), np.zeros(8, np.int64))], 1)["y"]
    dense = run_outputs(model, [(images(8, 2), np.zeros(8, np.int64))], 1)["y"]
    # One scale for the whole output would leave the scores, all below 1, two or three values.
    assert len(np.unique(found[:, 1].round(6))) > 100
    assert float(error_per_image(dense, found).mean()) < 0.05
    made = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert "QuantizeLinear" in made
