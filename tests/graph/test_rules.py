"""One small graph per operator: what it couples, what it pins and why, and that the compact graph is exact."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_graphs import assert_exact, coupled, pin_of, structure_of, tiny

from mm_edge.graph.rules import OPERATOR_RULES

F = np.float32


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# --- weights meet activations -------------------------------------------------------------------


def test_conv_couples_its_outputs_to_bias_and_reader_and_pins_input_output_kernel_and_space() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) y = Conv(a, v)"
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 3, 3), "b": (8,), "v": (4, 8, 1, 1)}), 1)
    assert coupled(structure, "w:0", "b:0", "v:1")
    assert pin_of(structure, "w:1") == "input of the model"
    assert pin_of(structure, "v:0") == "output of the model"
    assert pin_of(structure, "w:2") == "kernel of a convolution"
    assert structure.macs() == 8 * 3 * 9 * 16 + 4 * 8 * 16


def test_depthwise_conv_carries_its_axis_through() -> None:
    body = "a = Conv(x, w) d = Conv<group=8, pads=[1,1,1,1]>(a, dw, b) y = Conv(d, v)"
    weights = {"w": (8, 3, 1, 1), "dw": (8, 1, 3, 3), "b": (8,), "v": (4, 8, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights), 1)
    assert coupled(structure, "w:0", "dw:0", "b:0", "v:1")
    assert structure.macs() == 16 * (8 * 3 + 8 * 9 + 4 * 8)


def test_depthwise_conv_with_a_multiplier_splits_its_outputs() -> None:
    body = "a = Conv(x, w) d = Conv<group=6>(a, dw) y = Conv(d, v)"
    structure = assert_exact(
        tiny("float[1,3,4,4] x", body, {"w": (6, 3, 1, 1), "dw": (12, 1, 1, 1), "v": (4, 12, 1, 1)}), 2
    )
    assert coupled(structure, "w:0", "dw:0/0", "v:1/0")
    assert coupled(structure, "dw:0/1", "v:1/1")


def test_grouped_conv_loses_whole_groups_and_widths_within_all_groups() -> None:
    body = "a = Conv(x, w) d = Conv<group=4>(a, gw) y = Conv(d, v)"
    weights = {"w": (16, 3, 1, 1), "gw": (24, 4, 1, 1), "v": (4, 24, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights), 3)
    assert coupled(structure, "w:0/0", "gw:0/0", "v:1/0")
    assert coupled(structure, "w:0/1", "gw:1")
    assert coupled(structure, "gw:0/1", "v:1/1")


@pytest.mark.parametrize("groups", [1, 4])
def test_transposed_conv_reads_axis_0_and_writes_axis_1(groups: int) -> None:
    body = f"a = Conv(x, w) d = ConvTranspose<group={groups}, strides=[2,2]>(a, t, b) y = Conv(d, v)"
    weights = {"w": (8, 3, 1, 1), "t": (8, 12 // groups, 2, 2), "b": (12,), "v": (4, 12, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights), 2 if groups == 1 else 3)
    assert structure.macs() == 16 * 8 * 3 + 16 * 8 * (12 // groups) * 4 + 64 * 4 * 12
    assert structure.table.leaves(structure.tensor_axes["b"][0]).__next__() == next(
        structure.table.leaves(structure.tensor_axes["v"][1])
    )


@pytest.mark.parametrize("flag", [0, 1])
def test_gemm_reads_its_weight_as_the_flag_says(flag: int) -> None:
    weights = {"w": (8, 6) if flag else (6, 8), "b": (8,), "v": (8, 4)}
    structure = assert_exact(tiny("float[1,6] x", f"a = Gemm<transB={flag}>(x, w, b) y = Gemm(a, v)", weights), 1)
    assert coupled(structure, f"w:{1 - flag}", "b:0", "v:0")
    assert structure.macs() == 6 * 8 + 8 * 4


def test_gemm_with_a_transposed_left_operand_is_exact() -> None:
    body = "a = MatMul(x, w) t = Transpose(a) b = Relu(t) y = Gemm<transA=1>(b, v)"
    structure = assert_exact(tiny("float[1,6] x", body, {"w": (6, 8), "v": (8, 4)}), 1)
    assert coupled(structure, "w:1", "v:0")


def test_matmul_contracts_the_last_axis_with_the_last_but_one_and_broadcasts_the_batch() -> None:
    structure = assert_exact(
        tiny("float[1,3,6] x", "a = MatMul(x, w) b = Add(a, c) y = MatMul(b, v)", {"w": (6, 8), "c": (8,), "v": (8, 4)})
    )
    assert coupled(structure, "w:1", "c:0", "v:0")
    assert structure.macs() == 3 * 6 * 8 + 3 * 8 * 4


def test_matmul_of_a_vector_couples_its_only_axis() -> None:
    body = "a = MatMul(x, w) t = Transpose<perm=[0,2,1]>(a) s = Transpose<perm=[0,2,1]>(t) y = MatMul(s, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8,)}), 1)
    assert coupled(structure, "w:1", "v:0")


def test_einsum_ties_letters_and_sums_over_those_the_result_lacks() -> None:
    body = 'a = Einsum<equation="bnc,cd->bnd">(x, w) y = Einsum<equation="bnd,ed->bne">(a, v)'
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (4, 8)}), 1)
    assert coupled(structure, "w:1", "v:1")
    assert structure.macs() == 3 * 6 * 8 + 3 * 8 * 4


def test_einsum_with_dots_pins_what_it_touches_with_its_equation() -> None:
    body = 'a = MatMul(x, w) y = Einsum<equation="...nd,de->...ne">(a, v)'
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}))
    assert pin_of(structure, "w:1") == "Einsum: equation '...nd,de->...ne' is not explicit"


# --- element-wise ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator",
    "Relu Gelu HardSwish Tanh Erf Abs Neg Sign LeakyRelu Elu Selu Celu Mish Softsign Sin Floor Ceil Round".split(),
)
def test_what_maps_zero_to_zero_lets_channels_go(operator: str) -> None:
    body = f"a = MatMul(x, w) r = {operator}(a) y = MatMul(r, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}), 1)
    assert coupled(structure, "w:1", "v:0")


@pytest.mark.parametrize("operator", "Sigmoid HardSigmoid Exp Cos Softplus Reciprocal".split())
def test_what_maps_zero_elsewhere_is_exact_because_the_reader_is_zero(operator: str) -> None:
    body = f"a = MatMul(x, w) o = Add(a, three) r = {operator}(o) y = MatMul(r, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, {"three": F(3)}), 1)
    assert coupled(structure, "w:1", "v:0")


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "PRelu"])
def test_two_operands_of_the_same_width_are_one_group(operator: str) -> None:
    body = f"a = MatMul(x, w) b = Relu(a) r = {operator}(b, c) y = MatMul(r, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)} | {"c": (8,)}), 1)
    assert coupled(structure, "w:1", "c:0", "v:0")


def test_an_axis_of_size_one_beside_a_wider_one_is_repeated_not_coupled() -> None:
    body = "a = MatMul(x, w) g = MatMul(x, u) r = Mul(a, g) y = MatMul(r, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "u": (6, 1), "v": (8, 4)}), 1)
    assert coupled(structure, "w:1", "v:0")


def test_comparison_and_where_couple_their_operands() -> None:
    body = "a = MatMul(x, w) m = Greater(a, c) r = Where(m, a, d) y = MatMul(r, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "c": (8,), "d": (8,), "v": (8, 4)}), 1)
    assert coupled(structure, "w:1", "c:0", "d:0", "v:0")


def test_trilu_pins_the_positions_it_reads() -> None:
    body = "a = MatMul(x, w) r = Trilu(a) y = MatMul(r, v)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}))
    assert pin_of(structure, "w:1") == "Trilu reads positions along this axis"


# --- normalisation and reduction ----------------------------------------------------------------


def test_batch_normalisation_follows_its_channel_with_all_four_parameters() -> None:
    body = "a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) r = Relu(n) y = Conv(r, v)"
    rng = np.random.default_rng(0)
    buffers = {"m": rng.normal(size=8).astype(F), "q": rng.uniform(0.5, 2, 8).astype(F)}
    weights = {"w": (8, 3, 1, 1), "s": (8,), "t": (8,), "v": (4, 8, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights, buffers=buffers), 1)
    assert coupled(structure, "w:0", "s:0", "t:0", "m:0", "q:0", "v:1")


@pytest.mark.parametrize("operator", ["LayerNormalization<axis=-1>", "RMSNormalization<axis=-1>"])
def test_normalisation_over_channels_pins_them(operator: str) -> None:
    body = f"a = MatMul(x, w) n = {operator}(a, s) y = MatMul(n, v)"
    opset = 23 if operator.startswith("RMS") else 20
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "s": (8,), "v": (8, 4)}, opset=opset))
    name = operator.split("<")[0]
    assert pin_of(structure, "w:1") == f"{name} averages over this axis"


def test_layer_normalisation_within_heads_lets_heads_go() -> None:
    body = """a = MatMul(x, w) h = Reshape(a, split) n = LayerNormalization<axis=-1>(h, s, t) m = Reshape(n, merge)
              y = MatMul(m, v)"""
    weights = {"w": (6, 12), "s": (3,), "t": (3,), "v": (12, 4)}
    constants = {"split": ints(1, 5, 4, 3), "merge": ints(1, 5, 12)}
    structure = assert_exact(tiny("float[1,5,6] x", body, weights, constants), 1)
    assert coupled(structure, "w:1/0", "v:0/0")
    assert pin_of(structure, "w:1/1") == "LayerNormalization averages over this axis"


def test_instance_normalisation_carries_channels_and_pins_space() -> None:
    body = "a = Conv(x, w) n = InstanceNormalization(a, s, t) y = Conv(n, v)"
    structure = assert_exact(
        tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "s": (8,), "t": (8,), "v": (4, 8, 1, 1)}), 1
    )
    assert coupled(structure, "w:0", "s:0", "t:0", "v:1")


def test_group_normalisation_loses_whole_groups() -> None:
    body = "a = Conv(x, w) n = GroupNormalization<num_groups=4>(a, s, t) y = Conv(n, v)"
    weights = {"w": (12, 3, 1, 1), "s": (12,), "t": (12,), "v": (4, 12, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights, opset=21), 1)
    assert coupled(structure, "w:0/0", "s:0/0", "t:0/0", "v:1/0")
    assert pin_of(structure, "w:0/1") == "GroupNormalization averages over this axis"


def test_group_normalisation_of_one_group_pins() -> None:
    body = "a = Conv(x, w) n = GroupNormalization<num_groups=1>(a, s, t) y = Conv(n, v)"
    weights = {"w": (12, 3, 1, 1), "s": (12,), "t": (12,), "v": (4, 12, 1, 1)}
    structure = structure_of(tiny("float[1,3,4,4] x", body, weights, opset=21))
    assert pin_of(structure, "w:0") == "GroupNormalization averages over this axis"


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax", "LpNormalization"])
def test_what_mixes_an_axis_pins_it_and_carries_the_others(operator: str) -> None:
    body = f"a = MatMul(x, w) n = {operator}<axis=-1>(a) y = MatMul(n, v)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}))
    assert pin_of(structure, "w:1") == f"{operator} mixes every index of this axis"
    body = f"a = MatMul(x, w) n = {operator}<axis=1>(a) y = MatMul(n, v)"
    assert coupled(assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}), 1), "w:1", "v:0")


def test_cumsum_pins_the_axis_it_runs_along() -> None:
    body = "a = MatMul(x, w) n = CumSum(a, two) y = MatMul(n, v)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, {"two": np.int64(2)}))
    assert pin_of(structure, "w:1") == "CumSum mixes every index of this axis"


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_over_channels_that_are_zero_when_removed_are_exact(operator: str, keepdims: int) -> None:
    """A mean still divides by the dense count: it is rescaled."""
    body = f"a = Conv(x, w) r = Relu(a) n = {operator}<keepdims={keepdims}>(r, one) y = Abs(n)"
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, {"one": ints(1)}), 1)
    assert coupled(structure, "w:0")


@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"])
def test_extremes_over_channels_pin_them_and_over_space_do_not(operator: str) -> None:
    body = f"a = Conv(x, w) n = {operator}(a, one) y = Abs(n)"
    structure = structure_of(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, {"one": ints(1)}))
    assert pin_of(structure, "w:0") == f"{operator} over this axis"
    body = f"a = Conv(x, w) n = {operator}(a, space) y = Conv(n, v)"
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, {"space": ints(2, 3)})
    assert coupled(assert_exact(raw, 1), "w:0", "v:1")


@pytest.mark.parametrize(
    "operator",
    [
        "MaxPool<kernel_shape=[2,2]>",
        "AveragePool<kernel_shape=[2,2]>",
        "LpPool<kernel_shape=[2,2]>",
        "GlobalAveragePool",
        "GlobalMaxPool",
    ],
)
def test_pooling_is_per_channel(operator: str) -> None:
    body = f"a = Conv(x, w) p = {operator}(a) y = Conv(p, v)"
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}), 1)
    assert coupled(structure, "w:0", "v:1")


# --- shape ------------------------------------------------------------------------------------------


def test_transpose_moves_axes() -> None:
    body = "a = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(a) y = MatMul(t, v)"
    assert coupled(assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (8, 4)}), 1), "w:0", "v:0")


def test_flatten_makes_channels_the_major_factor_of_the_features() -> None:
    body = "a = Conv(x, w) f = Flatten<axis=1>(a) y = Gemm(f, v)"
    structure = assert_exact(tiny("float[1,3,2,2] x", body, {"w": (8, 3, 1, 1), "v": (32, 4)}), 1)
    assert coupled(structure, "w:0", "v:0/0")
    assert pin_of(structure, "v:0/1") == "spatial axis of a convolution"


def test_reshape_into_heads_gives_heads_and_widths_of_their_own() -> None:
    body = "a = MatMul(x, w) h = Reshape(a, split) r = Relu(h) m = Reshape(r, merge) y = MatMul(m, v)"
    constants = {"split": ints(1, 5, 4, -1), "merge": ints(0, 5, -1)}
    structure = assert_exact(tiny("float[1,5,6] x", body, {"w": (6, 12), "v": (12, 4)}, constants), 2)
    assert coupled(structure, "w:1/0", "v:0/0")
    assert coupled(structure, "w:1/1", "v:0/1")


def test_reshapes_that_cut_differently_pin() -> None:
    body = "a = MatMul(x, w) h = Reshape(a, s1) r = Relu(h) m = Reshape(r, s2) y = MatMul(m, v)"
    constants = {"s1": ints(1, 5, 4, 3), "s2": ints(1, 5, 3, 4)}
    structure = structure_of(tiny("float[1,5,6] x", body, {"w": (6, 12), "v": (4, 2)}, constants))
    assert pin_of(structure, "w:1/0") == "two reshapes cut this axis at different places"
    assert not structure.groups


def test_channel_shuffle_couples_through_the_swap() -> None:
    body = """a = Conv(x, w) s = Reshape(a, s1) t = Transpose<perm=[0,2,1,3,4]>(s) r = Reshape(t, s2)
              d = Conv<group=12>(r, dw) y = Conv(d, v)"""
    weights = {"w": (12, 3, 1, 1), "dw": (12, 1, 1, 1), "v": (4, 12, 1, 1)}
    constants = {"s1": ints(1, 2, 6, 4, 4), "s2": ints(1, 12, 4, 4)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights, constants), 2)
    assert coupled(structure, "w:0/0", "dw:0/1", "v:1/1")
    assert coupled(structure, "w:0/1", "dw:0/0", "v:1/0")


def test_squeeze_and_unsqueeze_keep_the_order_of_wide_axes() -> None:
    body = """a = Conv(x, w) p = GlobalAveragePool(a) s = Squeeze(p, space) u = Unsqueeze(s, space) q = Conv(u, v)
              y = Squeeze(q, space)"""
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, {"space": ints(2, 3)})
    assert coupled(assert_exact(raw, 1), "w:0", "v:1")


def test_concat_is_a_sum_of_its_parts() -> None:
    body = "a = Conv(x, w) b = Conv(x, u) c = Concat<axis=1>(a, b) y = Conv(c, v)"
    structure = assert_exact(
        tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "u": (6, 3, 1, 1), "v": (4, 14, 1, 1)}), 2
    )
    assert coupled(structure, "w:0", "v:1/0")
    assert coupled(structure, "u:0", "v:1/1")


@pytest.mark.parametrize("explicit", [True, False])
def test_split_is_concats_opposite_with_or_without_its_sizes_written_out(explicit: bool) -> None:
    how = "<axis=1>(a, sizes)" if explicit else "<axis=1, num_outputs=2>(a)"
    body = f"a = Conv(x, w) p, q = Split{how} r = Relu(p) c = Concat<axis=1>(q, r) y = Conv(c, v)"
    constants = {"sizes": ints(6, 6)} if explicit else {}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (12, 3, 1, 1), "v": (4, 12, 1, 1)}, constants), 2)
    assert coupled(structure, "w:0/0", "v:1/1")
    assert coupled(structure, "w:0/1", "v:1/0")


def test_a_gated_split_couples_the_two_halves() -> None:
    body = "a = MatMul(x, w) p, q = Split<axis=2>(a, sizes) s = Sigmoid(q) g = Mul(p, s) y = MatMul(g, v)"
    raw = tiny("float[1,3,6] x", body, {"w": (6, 16), "v": (8, 4)}, {"sizes": ints(8, 8)})
    structure = assert_exact(raw, 1)
    assert coupled(structure, "w:1", "v:0")
    assert (
        structure.kept("w", {structure.groups[0].leaf: np.arange(8) < 3})[1].tolist() == ([True] * 3 + [False] * 5) * 2
    )


@pytest.mark.parametrize("end", [5, 2**63 - 1])
def test_slices_are_parts_of_a_sum(end: int) -> None:
    body = (
        "a = MatMul(x, w) p = Slice(a, zero, two, axis) q = Slice(a, two, end, axis) y = MatMul(p, v) z = MatMul(q, u)"
    )
    size = min(end, 8) - 2
    constants = {"zero": ints(0), "two": ints(2), "end": ints(end), "axis": ints(2)}
    structure = assert_exact(
        tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (2, 4), "u": (size, 4)}, constants), 2 if end > 8 else 3
    )
    assert coupled(structure, "w:1/0", "v:0")
    assert coupled(structure, "w:1/1", "u:0")


def test_a_slice_from_the_end_counts_backwards() -> None:
    body = "a = MatMul(x, w) p = Slice(a, start, end, axis) r = Relu(a) y = MatMul(p, v) z = MatMul(r, u)"
    constants = {"start": ints(-3), "end": ints(2**31 - 1), "axis": ints(-1)}
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (3, 4), "u": (8, 4)}, constants), 2)
    assert coupled(structure, "w:1/1", "v:0", "u:0/1")


def test_a_slice_with_a_stride_pins_only_its_own_axis() -> None:
    body = "a = Conv(x, w) p = Slice(a, zero, four, two, two) y = Conv(p, v)"
    constants = {"zero": ints(0), "four": ints(4), "two": ints(2)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, constants), 1)
    assert coupled(structure, "w:0", "v:1")
    constants = {"zero": ints(0), "four": ints(8), "two": ints(1), "step": ints(2)}
    body = "a = Conv(x, w) p = Slice(a, zero, four, two, step) y = Conv(p, v)"
    structure = structure_of(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 4, 1, 1)}, constants))
    assert pin_of(structure, "w:0") == "a slice with a stride"


def test_gather_pins_the_axis_it_picks_from_and_carries_the_others() -> None:
    body = "a = MatMul(x, w) p = Gather<axis=1>(a, first) y = MatMul(p, v)"
    raw = tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, {"first": np.int64(0)})
    assert coupled(assert_exact(raw, 1), "w:1", "v:0")
    body = "a = MatMul(x, w) p = Gather<axis=2>(a, picks) y = MatMul(p, v)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (3, 4)}, {"picks": ints(5, 1, 1)}))
    assert pin_of(structure, "w:1") == "a Gather picks indices of this axis by number"


def test_gather_nd_pins_what_it_addresses() -> None:
    body = "a = MatMul(x, w) t = Transpose<perm=[1,0,2]>(a) p = GatherND(t, picks) y = MatMul(p, v)"
    raw = tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, {"picks": ints(2, 0).reshape(2, 1)})
    assert coupled(assert_exact(raw, 1), "w:1", "v:0")


def test_expand_repeats_axes_of_size_one() -> None:
    body = "e = Expand(t, shape) a = MatMul(x, w) s = Concat<axis=1>(e, a) y = MatMul(s, v)"
    weights = {"t": (1, 1, 8), "w": (6, 8), "v": (8, 4)}
    structure = assert_exact(tiny("float[1,3,6] x", body, weights, {"shape": ints(1, 2, 8)}), 1)
    assert coupled(structure, "t:2", "w:1", "v:0")


def test_tile_repeats_a_whole_axis_as_the_minor_factor() -> None:
    body = "a = MatMul(x, w) t = Tile(a, counts) y = MatMul(t, v)"
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 4), "v": (12, 4)}, {"counts": ints(1, 2, 3)}), 1)
    assert coupled(structure, "w:1", "v:0/1")
    assert pin_of(structure, "v:0/0") == "repetitions of a Tile"


def test_padding_channels_adds_a_part_that_stays() -> None:
    body = "a = Conv(x, w) p = Pad(a, pads) y = Conv(p, v)"
    constants = {"pads": ints(0, 1, 1, 1, 0, 3, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 12, 1, 1)}, constants), 1)
    assert coupled(structure, "w:0", "v:1/1")
    assert (pin_of(structure, "v:1/0"), pin_of(structure, "v:1/2")) == ("padding", "padding")


def test_reflected_padding_pins_its_own_axis_only() -> None:
    body = 'a = Conv(x, w) p = Pad<mode="reflect">(a, pads) y = Conv(p, v)'
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, {"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)})
    assert coupled(assert_exact(raw, 1), "w:0", "v:1")
    raw = tiny(
        "float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 10, 1, 1)}, {"pads": ints(0, 1, 0, 0, 0, 1, 0, 0)}
    )
    assert pin_of(structure_of(raw), "w:0") == "reflect padding along this axis"


@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize_carries_channels(by: str) -> None:
    operands = '(a, "", two)' if by == "scales" else '(a, "", "", two)'
    body = f'a = Conv(x, w) p = Resize<mode="nearest">{operands} y = Conv(p, v)'.replace('""', "")
    two = np.array([1, 1, 2, 2], F) if by == "scales" else ints(1, 8, 8, 8)
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, {"two": two}), 1)
    assert coupled(structure, "w:0", "v:1")


def test_space_to_depth_puts_block_positions_in_front_of_the_channels() -> None:
    body = "a = Conv(x, w) s = SpaceToDepth<blocksize=2>(a) y = Conv(s, v)"
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (6, 3, 1, 1), "v": (4, 24, 1, 1)}), 1)
    assert coupled(structure, "w:0", "v:1/1")


@pytest.mark.parametrize(("mode", "channel"), [("DCR", "1"), ("CRD", "0")])
def test_depth_to_space_takes_block_positions_out_of_the_channels(mode: str, channel: str) -> None:
    body = f'a = Conv(x, w) s = DepthToSpace<blocksize=2, mode="{mode}">(a) y = Conv(s, v)'
    structure = assert_exact(tiny("float[1,3,4,4] x", body, {"w": (24, 3, 1, 1), "v": (4, 6, 1, 1)}), 1)
    assert coupled(structure, f"w:0/{channel}", "v:1")


def test_what_depends_on_order_pins_with_the_operator_s_name() -> None:
    body = "a = MatMul(x, w) t, i = TopK<axis=-1>(a, k) y = MatMul(t, v)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (2, 4)}, {"k": ints(2)}))
    assert pin_of(structure, "w:1") == "TopK: its result depends on the sizes or order of its operand's axes"


def test_an_operator_without_a_rule_pins_what_it_touches_and_nothing_else() -> None:
    body = "a = MatMul(x, w) b = Relu(a) c = MatMul(b, u) d = Det(c) y = Abs(d)"
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "u": (8, 3)}))
    assert "Det" not in OPERATOR_RULES
    assert pin_of(structure, "u:1") == "Det: operator Det has no rule"
    assert coupled(structure, "w:1", "u:0")
