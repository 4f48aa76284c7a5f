"""Users' own .onnx files: what they look like, what stays open, and that artifacts of them are exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_files import Read, artifact, assert_exact_at_every_size, random_weights, read, write

from mm_edge.graph.export import constant_array
from mm_edge.runtime import open_session

F = np.float32
NET = "(float[{shape}] x) {{ a = Conv(x, w) b = Relu(a) y = Conv(b, v) }}"
KERNELS = {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def input_shape(proto: onnx.ModelProto) -> list[int | str]:
    return [size.dim_value or size.dim_param for size in proto.graph.input[0].type.tensor_type.shape.dim]


# --- sizes ----------------------------------------------------------------------------------------


def test_an_artifact_keeps_open_sizes_and_takes_others(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.onnx", NET.format(shape="N,3,H,W"), KERNELS), x=(1, 3, 8, 8))
    assert found.groups == ["w:0"]
    proto = assert_exact_at_every_size(found, {"x": (5, 3, 3, 17)})
    assert input_shape(proto) == ["N", 3, "H", "W"]
    assert found.raw.model.graph.inputs[0].shape == ir.Shape((1, 3, 8, 8))


def test_a_fixed_batch_stays_and_the_structure_is_read_at_one(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.onnx", NET.format(shape="7,3,4,4"), KERNELS))
    assert found.structure.macs() == 16 * (8 * 3 + 4 * 8)
    assert input_shape(assert_exact_at_every_size(found)) == [7, 3, 4, 4]


def test_a_batch_that_the_graph_holds_as_a_constant_is_read_as_it_is(tmp_path: Path) -> None:
    text = "(float[7,3,2,2] x) { a = Conv(x, w) f = Reshape(a, s) y = MatMul(f, v) }"
    found = read(write(tmp_path / "a.onnx", text, {"w": (8, 3, 1, 1), "v": (32, 5)}, {"s": ints(7, 32)}))
    assert found.groups == ["w:0"]
    assert input_shape(assert_exact_at_every_size(found)) == [7, 3, 2, 2]


def test_a_baked_size_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", NET.format(shape="10,3,32,32"), KERNELS, outputs="float[10,4,32,32] y")
    found = read(path, x=(1, 3, 6, 5))
    proto = assert_exact_at_every_size(found)
    assert input_shape(proto) == [1, 3, 6, 5]
    assert [size.dim_value for size in proto.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 6, 5]


@pytest.mark.parametrize("target", ["constant", "computed"])
def test_the_sizes_a_reshape_states_follow_the_widths_alone(tmp_path: Path, target: str) -> None:
    """The batch and the positions stay what the file computes; the channels become those that are kept."""
    if target == "constant":
        text = "(float[N,3,H,W] x) { a = Conv(x, w) r = Reshape(a, s) t = Transpose<perm=[0,2,1]>(r) y = MatMul(t, v) }"
    else:
        text = (
            "(float[N,3,H,W] x) { a = Conv(x, w) sh = Shape(a) n = Gather(sh, zero) c = Gather(sh, one)"
            " target = Concat<axis=0>(n, c, minus) r = Reshape(a, target) t = Transpose<perm=[0,2,1]>(r)"
            " y = MatMul(t, v) }"
        )
    constants = {"s": ints(0, 8, -1), "zero": ints(0), "one": ints(1), "minus": ints(-1)}
    found = read(write(tmp_path / "a.onnx", text, {"w": (8, 3, 1, 1), "v": (8, 5)}, constants), x=(1, 3, 4, 4))
    assert found.groups == ["w:0"]
    assert_exact_at_every_size(found, {"x": (3, 3, 2, 9)})


def test_a_dense_width_read_by_shape_stays_in_the_arithmetic(tmp_path: Path) -> None:
    """The scale of an attention is made of its dense width; it must not follow the kept one."""
    text = (
        "(float[N,T,6] x) { q = MatMul(x, w) sh = Shape(q) d = Gather(sh, two) f = Cast<to=1>(d) s = Sqrt(f)"
        " a = Div(q, s) y = MatMul(a, v) }"
    )
    path = write(tmp_path / "a.onnx", text, {"w": (6, 8), "v": (8, 5)}, {"two": ints(2)})
    assert_exact_at_every_size(read(path, x=(1, 4, 6)), {"x": (2, 9, 6)})


def test_a_grid_computed_from_sizes_is_left_to_the_artifact(tmp_path: Path) -> None:
    text = (
        "(float[N,3,H,W] x) { a = Conv(x, w) sh = Shape(a) h = Gather(sh, two) r = Range(zero, h, one)"
        " f = Cast<to=1>(r) u = Unsqueeze(f, last) b = Add(a, u) y = Conv(b, v) }"
    )
    constants = {"two": np.array(2), "zero": np.array(0), "one": np.array(1), "last": ints(1)}
    found = read(write(tmp_path / "a.onnx", text, KERNELS, constants), x=(1, 3, 4, 4))
    proto = artifact(found)
    assert "Range" in [node.op_type for node in proto.graph.node]


def test_two_inputs_of_any_rank(tmp_path: Path) -> None:
    text = "(float[N,3,H,W] x, float[N,6] c) { a = Conv(x, w) g = GlobalAveragePool(a) f = Flatten(g)"
    text += " e = MatMul(c, u) s = Add(f, e) y = MatMul(s, v) }"
    path = write(tmp_path / "a.onnx", text, {"w": (8, 3, 1, 1), "u": (6, 8), "v": (8, 5)})
    found = read(path, x=(1, 3, 4, 4))
    assert [(item.name, item.shape) for item in found.model.inputs] == [("x", (None, 3, None, None)), ("c", (None, 6))]
    assert found.groups == ["w:0"]
    assert_exact_at_every_size(found, {"x": (2, 3, 5, 5), "c": (2, 6)})


# --- weights --------------------------------------------------------------------------------------


def listed_as_inputs(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def as_constant_nodes(proto: onnx.ModelProto) -> None:
    nodes = [onnx.helper.make_node("Constant", [], [item.name], value=item) for item in proto.graph.initializer]
    rest = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


def behind_identity(proto: onnx.ModelProto) -> None:
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    for tensor in proto.graph.initializer:
        name, tensor.name = tensor.name, f"{tensor.name}_stored"
        proto.graph.node.append(onnx.helper.make_node("Identity", [tensor.name], [name]))
    proto.graph.node.extend(rest)


@pytest.mark.parametrize("change", [listed_as_inputs, as_constant_nodes, behind_identity])
def test_weights_are_found_however_they_are_stored(tmp_path: Path, change: object) -> None:
    path = write(tmp_path / "a.onnx", NET.format(shape="N,3,4,4"), KERNELS)
    proto = onnx.load(path)
    assert callable(change)
    change(proto)
    onnx.save(proto, path)
    found = read(path)
    assert len(found.groups) == 1
    written = assert_exact_at_every_size(found)
    assert [item.name for item in written.graph.input] == ["x"]
    assert {tuple(item.dims) for item in written.graph.initializer} == {(4, 3, 1, 1), (4, 4, 1, 1)}


def test_a_shared_weight_is_cut_once(tmp_path: Path) -> None:
    text = "(float[N,3,4,4] x) { a = Conv(x, w) b = Conv(a, u) c = Conv(b, u) y = Conv(c, v) }"
    found = read(write(tmp_path / "a.onnx", text, {**KERNELS, "u": (8, 8, 1, 1)}))
    assert found.groups == ["w:0"]
    assert_exact_at_every_size(found)


def test_external_data_is_written_into_the_artifact(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", NET.format(shape="N,3,4,4"), KERNELS)
    ir.save(ir.load(path), path, external_data="a.data", size_threshold_bytes=0)
    found = read(path)
    (tmp_path / "a.data").unlink()
    proto = artifact(found)
    assert not any(item.external_data for item in proto.graph.initializer)
    open_session(proto.SerializeToString())


@pytest.mark.parametrize(("kind", "code"), [("float16", 10), ("float64", 11)])
def test_other_precisions_are_worked_on_in_float32(tmp_path: Path, kind: str, code: int) -> None:
    typed = {"float16": "float16", "float64": "double"}[kind]
    text = f"({typed}[N,3,4,4] x) {{ a = Conv(x, w) k = Cast<to={code}>(a) b = Add(k, c) y = Conv(b, v) }}"
    constants = {name: array.astype(kind) for name, array in random_weights(KERNELS).items()}
    constants["c"] = np.zeros((), kind)
    found = read(write(tmp_path / "a.onnx", text, {}, constants, outputs=f"{typed}[] y"))
    assert found.model.warnings[0] == f"a.onnx is in {kind}; it is worked on and written in float32"
    assert found.groups == ["w:0"]
    proto = assert_exact_at_every_size(found)
    assert {item.data_type for item in proto.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


# --- operators ------------------------------------------------------------------------------------

HARDSWISH = "p = Add(a, three) q = Clip(p, zero, six) m = Mul(a, q) b = Div(m, six)"
SILU = "s = Sigmoid(a) b = Mul(a, s)"
GELU = "d = Div(a, root) e = Erf(d) p = Add(e, one) m = Mul(a, p) b = Mul(m, half)"


@pytest.mark.parametrize("activation", [HARDSWISH, SILU, GELU])
@pytest.mark.parametrize("opset", [11, 17])
def test_activations_written_out_keep_their_layer_prunable(tmp_path: Path, activation: str, opset: int) -> None:
    text = f"(float[N,3,H,W] x) {{ a = Conv(x, w) {activation} y = Conv(b, v) }}"
    numbers = {"three": 3, "zero": 0, "six": 6, "root": 2**0.5, "one": 1, "half": 0.5}
    constants = {name: np.array(value, F) for name, value in numbers.items()}
    found = read(write(tmp_path / "a.onnx", text, KERNELS, constants, opset), x=(1, 3, 4, 4))
    assert found.groups == ["w:0"]
    assert_exact_at_every_size(found)


def test_a_layer_norm_written_out_pins_what_it_averages_over(tmp_path: Path) -> None:
    text = (
        "(float[N,T,6] x) { a = MatMul(x, w) mean = ReduceMean<axes=[-1]>(a) c = Sub(a, mean) p = Pow(c, two)"
        " var = ReduceMean<axes=[-1]>(p) e = Add(var, eps) s = Sqrt(e) n = Div(c, s) h = MatMul(n, u) r = Relu(h)"
        " y = MatMul(r, v) }"
    )
    constants = {"two": np.array(2, F), "eps": np.array(1e-5, F)}
    path = write(tmp_path / "a.onnx", text, {"w": (6, 8), "u": (8, 16), "v": (16, 5)}, constants, opset=11)
    found = read(path, x=(1, 4, 6))
    assert found.groups == ["u:1"]
    assert "would still count the removed ones" in found.pins["w:1"]
    assert_exact_at_every_size(found)


@pytest.mark.parametrize("opset", [11, 17])
def test_a_split_and_concat_neck_with_resize(tmp_path: Path, opset: int) -> None:
    split = "p, q = Split<axis=1, split=[8,8]>(a)" if opset < 13 else "p, q = Split<axis=1>(a, halves)"
    text = (
        f"(float[N,3,H,W] x) {{ a = Conv(x, w) {split} m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(q)"
        ' r = Resize<mode="nearest">(m, none, scales) c = Concat<axis=1>(p, r) y = Conv(c, v) }'
    )
    constants: dict[str, np.ndarray] = {"scales": np.array([1, 1, 2, 2], F), "none": np.zeros(0, F)}
    constants |= {"halves": ints(8, 8)} if opset >= 13 else {}
    path = write(tmp_path / "a.onnx", text, {"w": (16, 3, 1, 1), "v": (4, 16, 1, 1)}, constants, opset)
    found = read(path, x=(1, 3, 4, 4))
    assert len(found.groups) == 2
    assert_exact_at_every_size(found, {"x": (1, 3, 6, 8)})


def test_softmax_before_opset_13_works_on_all_axes_from_its_own_on(tmp_path: Path) -> None:
    text = "(float[1,3,4,4] x) { a = Conv(x, w) s = Softmax<axis=1>(a) y = Conv(s, v) }"
    found = read(write(tmp_path / "a.onnx", text, KERNELS, opset=11))
    assert found.groups == []
    assert found.pins["w:0"] == "Softmax mixes every index of this axis"


def test_a_tail_of_top_k_costs_its_own_group_alone(tmp_path: Path) -> None:
    text = "(float[1,3,4,4] x) { a = Conv(x, w) b = Conv(a, v) f = Flatten(b) y, i = TopK(f, k) }"
    found = read(write(tmp_path / "a.onnx", text, KERNELS, {"k": ints(3)}))
    assert found.groups == ["w:0"]
    assert_exact_at_every_size(found)


def test_non_max_suppression_leaves_the_network_before_it_prunable(tmp_path: Path) -> None:
    text = (
        "(float[1,3,4,4] x) { a = Conv(x, w) b = Conv(a, v) r = Reshape(b, s) t = Transpose<perm=[0,2,1]>(r)"
        " q = ReduceMax<axes=[1], keepdims=1>(r) n = NonMaxSuppression(t, q, most) y = Cast<to=1>(n) }"
    )
    constants = {"s": ints(0, 4, -1), "most": ints(3)}
    found = read(write(tmp_path / "a.onnx", text, KERNELS, constants))
    assert found.groups == ["w:0"]
    artifact(found)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_recurrent_layer_keeps_its_gates_and_loses_features(tmp_path: Path, kind: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}[kind]
    text = (
        f"(float[N,3,1,W] x) {{ a = Conv(x, w) b = Relu(a) q = Squeeze(b, two) t = Transpose<perm=[2,0,1]>(q)"
        f" h = {kind}<hidden_size=5>(t, wx, wh) s = Squeeze(h, one) y = MatMul(s, v) }}"
    )
    weights = {"w": (8, 3, 1, 1), "wx": (1, gates * 5, 8), "wh": (1, gates * 5, 5), "v": (5, 4)}
    found = read(write(tmp_path / "a.onnx", text, weights, {"two": ints(2), "one": ints(1)}), x=(1, 3, 1, 6))
    assert found.groups == ["w:0"]
    assert found.pins["wx:1"] == f"{kind}: its gates read each other's results"
    assert_exact_at_every_size(found, {"x": (2, 3, 1, 11)})


BRANCHES = (
    "If(flag) <then_branch = t () => (float[1,8,4,4] p) { p = Mul(a, g) },"
    " else_branch = e () => (float[1,8,4,4] q) { q = Neg(a) }>"
)


def test_the_graphs_of_an_if_are_kept_whole(tmp_path: Path) -> None:
    """What they read from outside, weights included, keeps its width; the network behind them does not."""
    text = (
        "(float[1,3,4,4] x) { a = Conv(x, w) m = ReduceMax<keepdims=0>(x) flag = Greater(m, zero) b = "
        + BRANCHES
        + " c = Conv(b, u) y = Conv(c, v) }"
    )
    weights = {"w": (8, 3, 1, 1), "g": (1, 8, 1, 1), "u": (6, 8, 1, 1), "v": (4, 6, 1, 1)}
    found = read(write(tmp_path / "a.onnx", text, weights, {"zero": np.array(0, F)}))
    assert found.groups == ["u:0"]
    assert found.pins["w:0"] == "If: the graph inside it is kept whole"
    assert_exact_at_every_size(found)


def test_a_loop_is_kept_whole(tmp_path: Path) -> None:
    body = (
        "body = l (int64 i, bool k, float[1,8,4,4] p) => (bool kk, float[1,8,4,4] q) { kk = Identity(k) q = Add(p, a) }"
    )
    text = f"(float[1,3,4,4] x) {{ a = Conv(x, w) b = Loop(n, yes, a) <{body}> c = Conv(b, u) y = Conv(c, v) }}"
    weights = {"w": (8, 3, 1, 1), "u": (6, 8, 1, 1), "v": (4, 6, 1, 1)}
    found = read(write(tmp_path / "a.onnx", text, weights, {"n": np.array(2), "yes": np.array(True)}))
    assert found.groups == ["u:0"]
    assert found.pins["w:0"] == "Loop: the graph inside it is kept whole"
    assert_exact_at_every_size(found)


def test_an_unknown_operator_costs_its_own_group(tmp_path: Path) -> None:
    """ONNX's shape inference ends at another domain; the shapes behind it are read from one run."""
    text = (
        "(float[N,3,4,4] x) { a = Conv(x, w) b = com.microsoft.QuickGelu(a) c = Conv(b, u) d = Relu(c) y = Conv(d, v) }"
    )
    weights = {"w": (8, 3, 1, 1), "u": (6, 8, 1, 1), "v": (4, 6, 1, 1)}
    found = read(write(tmp_path / "a.onnx", text, weights))
    assert found.groups == ["u:0"]
    assert found.pins["w:0"] == "QuickGelu: operator QuickGelu has no rule"
    assert_exact_at_every_size(found)


def test_an_older_opset_is_converted_up(tmp_path: Path) -> None:
    text = "(float[1,3,4,4] x) { a = Conv(x, w) b = Clip<min=0.0, max=6.0>(a) y = Conv(b, v) }"
    found = read(write(tmp_path / "a.onnx", text, KERNELS, opset=9))
    assert found.groups == ["w:0"]
    assert assert_exact_at_every_size(found).opset_import[0].version == 11


# --- names ----------------------------------------------------------------------------------------


def named(path: Path, names: list[str]) -> Path:
    proto = onnx.load(path)
    for node, name in zip(proto.graph.node, names, strict=True):
        node.name = name
    onnx.save(proto, path)
    return path


def names_of(found: Read) -> list[str]:
    return [node.name for node in artifact(found).graph.node]


def test_names_of_nodes_stay_and_missing_ones_are_made(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", NET.format(shape="N,3,4,4"), KERNELS)
    assert names_of(read(named(path, ["/stem/Conv", "/stem/act", "head"]))) == ["/stem/Conv", "/stem/act", "head"]
    assert names_of(read(named(path, ["stem", "", "Relu_1"]))) == ["stem", "Relu_1_1", "Relu_1"]


def test_a_convolution_keeps_its_name_when_a_normalisation_is_folded_into_it(tmp_path: Path) -> None:
    text = "(float[N,3,4,4] x) { a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) y = Conv(n, v) }"
    shapes = {**KERNELS, "s": (8,), "t": (8,), "m": (8,), "q": (8,)}
    found = read(named(write(tmp_path / "a.onnx", text, shapes), ["stem", "norm", "head"]))
    assert found.groups == ["w:0"]
    assert names_of(found) == ["stem", "head"]
    proto = assert_exact_at_every_size(found)
    assert [item.name for item in proto.graph.output] == ["y"]


def test_the_graph_that_artifacts_are_made_from_is_not_changed(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.onnx", NET.format(shape="N,3,H,W"), KERNELS), x=(1, 3, 4, 4))
    artifact(found)
    assert found.raw.given is not None
    array = constant_array(found.raw.given.graph.initializers["w"])
    assert array is not None and array.shape == (8, 3, 1, 1)
