"""2:4 layer by layer: which layers of a file keep the pattern, and what a device's answer becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mm_edge.arrays import Float32Array
from mm_edge.bench.pattern import PatternLayer, time_pattern_layers
from mm_edge.bench.session import measure_products, run_options
from mm_edge.bench.target import load_target
from mm_edge.bench.transport import LocalTransport
from mm_edge.errors import BenchError
from mm_edge.plan.n_m import parse_pattern, pattern_layers

A100 = load_target("nvidia-a100")
LAYERS = [
    PatternLayer("window", "Conv", None, 4, 64),
    PatternLayer("point", "Conv", 64, 64, 128),
    PatternLayer("token", "MatMul", 64, 128, 96),
]


def save_network(path: Path) -> Path:
    """A 3x3 and a 1x1 convolution, a product of tokens and a classifier; all but the last keep 2:4."""
    generator = np.random.default_rng(0)

    def sparse(*shape: int, axis: int) -> Float32Array:
        moved = generator.standard_normal(np.moveaxis(np.empty(shape), axis, -1).shape)
        return np.moveaxis(np.where(np.arange(moved.shape[-1]) % 4 < 2, moved, 0), -1, axis).astype(np.float32)

    weights = {
        "window": sparse(64, 4, 3, 3, axis=1),
        "point": sparse(128, 64, 1, 1, axis=1),
        "token": sparse(128, 96, axis=0),
        "head": generator.standard_normal((96, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "window"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "point"], ["b"]),
        helper.make_node("Reshape", ["b", "flat"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["d", "token"], ["e"]),
        helper.make_node("MatMul", ["e", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64, 10])],
        [
            *(numpy_helper.from_array(array, name) for name, array in weights.items()),
            numpy_helper.from_array(np.array([1, 128, 64]), "flat"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


class Gpu(LocalTransport):
    """Stands for a device with a GPU: every sparse product takes half of the dense one's time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def ask(self, command: str, files: Any, options: Any, timeout_s: float = 60) -> dict[str, Any]:
        assert command == "products"
        self.asked = options["products"]
        runs, count = options["runs"], len(options["products"])
        return {"gpu": "made up", "dense_ns": [[20_000] * runs] * count, "sparse_ns": [[10_000] * runs] * count}


class Lying(Gpu):
    """A device whose answer is wrong in some fields."""

    def __init__(self, wrong: dict[str, Any]) -> None:
        super().__init__()
        self._wrong = wrong

    def ask(self, command: str, files: Any, options: Any, timeout_s: float = 60) -> dict[str, Any]:
        return {**super().ask(command, files, options), **self._wrong}


def test_layers_that_keep_the_pattern_with_their_sizes(tmp_path: Path) -> None:
    assert pattern_layers(save_network(tmp_path / "net.onnx"), parse_pattern("2:4")) == LAYERS


def test_each_layer_has_its_times_or_its_reason() -> None:
    device = Gpu()
    rows, why = time_pattern_layers(LAYERS, A100, device)
    assert why is None
    assert device.asked == [[64, 64, 128], [64, 128, 96]]
    assert [(row.dense_us, row.sparse_us, row.speedup, row.speedup_ci) for row in rows[1:]] == [(20, 10, 2, (2, 2))] * 2
    assert rows[0].speedup is None
    assert rows[0].reason == "a convolution over a window: TensorRT has sparse kernels for it, PyTorch has none"


@pytest.mark.slow
def test_a_machine_without_a_gpu_says_so() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU here")
    rows, why = time_pattern_layers(LAYERS, A100, LocalTransport())
    assert rows == []
    assert why is not None
    assert why.startswith("2:4 was not measured layer by layer: ")
    assert why.endswith("layer times need a CUDA GPU that PyTorch can use, and there is none")


def test_what_a_device_sends_is_checked() -> None:
    rows, why = time_pattern_layers(LAYERS, A100, Lying({"sparse_ns": [[-1], [-1]]}))
    assert (rows, why) == (
        [],
        "2:4 was not measured layer by layer: this machine sent product_ns that are not times; the answer was refused",
    )
    with pytest.raises(BenchError, match="sent no samples for the 1 products"):
        measure_products([(8, 64, 32)], A100, transport=Lying({"dense_ns": None}))


def test_only_targets_with_the_pattern_ask_tensorrt_for_it() -> None:
    assert run_options(A100)["provider_options"] == {"trt_fp16_enable": "1", "trt_sparsity_enable": "1"}
    assert run_options(load_target("raspberry-pi-5"))["provider_options"] == {}
