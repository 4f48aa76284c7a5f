"""Kernels named from the graph that ran, and fallbacks explained by their shapes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bench_models import save_convs
from onnx import TensorProto, helper, numpy_helper
from scripted import HOST, Scripted

from mm_edge.bench import audit
from mm_edge.bench.target import this_machine
from mm_edge.bench.transport import LocalTransport
from mm_edge.errors import BenchError

AVX512 = {"isa": "x86_64", "flags": ["avx2", "avx512f"]}
AVX2 = {"isa": "x86_64", "flags": ["avx2"]}
ARM = {"isa": "aarch64", "flags": ["asimd"]}


def conv(domain: str = "", groups: int = 1, kind: str = "Conv") -> onnx.NodeProto:
    return helper.make_node(kind, ["x", "w"], ["y"], name="c", domain=domain, group=groups)


@pytest.mark.parametrize(
    ("node", "shape", "info", "reason"),
    [
        (conv(), (64, 33, 3, 3), AVX512, "33 input channels are not a multiple of 4"),
        (conv(), (64, 11, 3, 3), AVX2, "11 input channels are not a multiple of 4"),
        (conv(), (64, 11, 3, 3), AVX512, "not explained by its shapes"),  # below the block, read as they are
        (conv(groups=30), (30, 1, 3, 3), AVX512, "30 output channels of a grouped convolution are not a multiple of 4"),
        (conv(groups=32), (32, 1, 3, 3), AVX512, "not explained by its shapes"),
        (
            conv(groups=4),
            (32, 8, 3, 3),
            AVX512,
            "8 input and 8 output channels a group are not both multiples of 16",
        ),
        (conv(groups=4), (32, 8, 3, 3), AVX2, "not explained by its shapes"),
        (conv(), (64, 32, 3), AVX512, "only 2-dimensional convolutions have NCHWc kernels"),
        (conv(audit.NCHWC_DOMAIN), (40, 32, 3, 3), AVX512, "40 output channels fill 48 lanes"),
        (conv(audit.NCHWC_DOMAIN), (40, 32, 3, 3), AVX2, None),
        (conv(), (64, 33, 3, 3), ARM, None),
        (conv(kind="QLinearConv"), (33, 33, 3, 3), AVX512, None),
        (helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), (33, 33), AVX512, None),
    ],
)
def test_reasons(node: onnx.NodeProto, shape: tuple[int, ...], info: dict[str, Any], reason: str | None) -> None:
    assert audit._explain(node, shape, True, False, info) == reason


def test_other_reasons() -> None:
    assert audit._explain(conv(), (64, 32, 3, 3), False, False, AVX512) == "its weights are not constant"
    reason = audit._explain(conv(), (64, 32, 3, 3), True, True, AVX512)
    assert reason is not None and reason.startswith("runs in fp32 on dequantised int8")


def test_kernels_of_a_real_model(tmp_path: Path) -> None:
    machine = this_machine()
    saved = tmp_path / "kept" / "m.optimised.onnx"
    model = save_convs(tmp_path / "m.onnx", 33)
    found = audit.audit_model(model, HOST, machine, transport=LocalTransport(), save_to=saved)
    assert len(found.kernels) == 3
    assert sum(use.share for use in found.kernels) + found.other_share == pytest.approx(1)
    assert [use.share for use in found.kernels] == sorted((use.share for use in found.kernels), reverse=True)
    assert onnx.load(saved, load_external_data=False).graph.node
    assert saved.stat().st_size < model.stat().st_size  # without the weights
    if audit.block_size(machine) is None:
        pytest.skip("the NCHWc kernels are x86's")
    by_shape = {use.weight_shape[:2]: use for use in found.kernels if use.kernel == "plain"}
    assert by_shape[(33, 33)].reason == "33 input channels are not a multiple of 4"
    aligned = audit.audit_model(save_convs(tmp_path / "a.onnx", 32), HOST, machine, transport=LocalTransport())
    assert {(use.kernel, use.reason) for use in aligned.kernels} == {("NCHWc", None)}


def test_quantised_and_depthwise_kernels_are_told_apart() -> None:
    nchwc = conv(audit.NCHWC_DOMAIN, groups=32)
    assert audit._kernel(nchwc, (32, 1, 3, 3)) == "NCHWc depthwise"
    assert audit._kernel(conv(kind="QLinearConv"), (32, 1, 3, 3)) == "QLinear"
    assert audit._kernel(conv(), (32, 1, 3, 3)) == "plain"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "AAAA"}, "the board sent a graph that is not ONNX"),
        ({"graph": None}, "the board sent a graph that is not ONNX"),
        ({"nodes": "none"}, "the board sent no list of nodes"),
        ({"nodes": [{"name": "c", "dur_us": -1, "input_shapes": []}]}, "the board sent a node that is not one"),
        ({"nodes": [{"name": "c", "dur_us": 1, "input_shapes": [["x"]]}]}, "the board sent a node that is not one"),
    ],
)
def test_a_lying_device_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    weight = numpy_helper.from_array(np.zeros((1, 1), np.float32), "w")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="c")], "g", [value], [], [weight])
    good = base64.b64encode(helper.make_model(graph).SerializeToString()).decode()
    reply = {"graph": good, "nodes": [{"name": "c", "dur_us": 1, "input_shapes": [[1, 1], [1, 1]]}], **changes}
    with pytest.raises(BenchError, match=message):
        audit.audit_model(tmp_path / "m.onnx", HOST, AVX512, transport=Scripted(reply))
