"""Coupled groups: which there are, what they own, what --keep and exactness (E8) pin and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_graphs import assert_exact, coupled, leaf_of, pin_of, structure_of, tiny
from torch import nn

from mm_edge.errors import UsageError
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import matches, read_structure

F = np.float32


def scalar(value: float) -> np.ndarray:
    return np.array(value, F)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# --- exactness: what removed indices must be ------------------------------------------------------


def test_a_sigmoid_gate_meets_an_activation_and_the_zero_activation_makes_it_exact() -> None:
    """Squeeze and excitation: the gate is 0.5 where removed, the activation it multiplies is zero."""
    body = """a = Conv(x, w) p = GlobalAveragePool(a) r = Conv(p, s1) q = Relu(r) t = Conv(q, s2) g = Sigmoid(t)
              m = Mul(a, g) n = ReduceSum<keepdims=0>(m, one) y = Abs(n)"""
    weights = {"w": (8, 3, 1, 1), "s1": (4, 8, 1, 1), "s2": (8, 4, 1, 1)}
    structure = assert_exact(tiny("float[1,3,4,4] x", body, weights, {"one": ints(1)}), 2)
    assert coupled(structure, "w:0", "s1:1", "s2:0")


@pytest.mark.parametrize(("feature", "pinned"), [("Relu(q)", False), ("Add(e, plus)", True)])
def test_features_of_q_and_k_that_are_not_zero_where_removed_pin_their_product(feature: str, pinned: bool) -> None:
    """Linear attention with relu keeps zeros; elu + 1 turns them into ones, which q.k would count."""
    body = f"""q = MatMul(x, wq) k0 = MatMul(x, wk) e = Elu(q) f = {feature} d = Elu(k0) k = Add(d, plus)
               t = Transpose<perm=[0,2,1]>(k) y = MatMul(f, t)"""
    raw = tiny("float[1,3,6] x", body, {"wq": (6, 8), "wk": (6, 8)}, {"plus": scalar(1)})
    if pinned:
        assert pin_of(structure_of(raw), "wq:1") == "a sum over it (MatMul_7) would still count the removed ones"
    else:
        assert coupled(assert_exact(raw, 1), "wq:1", "wk:1")


def test_a_mean_over_channels_is_rescaled_exactly() -> None:
    body = "a = Conv(x, w) r = Relu(a) m = ReduceMean<keepdims=1>(r, one) c = Concat<axis=1>(m, r) y = Conv(c, v)"
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (4, 9, 1, 1)}, {"one": ints(1)})
    assert coupled(assert_exact(raw, 1), "w:0", "v:1/1")


def test_a_mean_that_is_itself_the_output_is_rescaled_under_the_output_s_name() -> None:
    body = "a = Conv(x, w) r = Relu(a) y = ReduceMean<keepdims=0>(r, one)"
    assert coupled(assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, {"one": ints(1)}), 1), "w:0")


def test_a_mean_over_what_is_not_zero_where_removed_pins() -> None:
    body = "a = Conv(x, w) r = Sigmoid(a) y = ReduceMean(r, one)"
    structure = structure_of(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, {"one": ints(1)}))
    assert pin_of(structure, "w:0") == "a mean over it (ReduceMean_2) would still count the removed ones"


def test_hand_written_layer_normalisation_is_pinned_by_its_variance() -> None:
    """The mean can be rescaled; x - mean is no longer zero where removed, so its square cannot be summed."""
    body = """a = MatMul(x, w) m = ReduceMean(a, last) d = Sub(a, m) s = Mul(d, d) q = ReduceMean(s, last)
              r = Sqrt(q) n = Div(d, r) y = MatMul(n, v)"""
    structure = structure_of(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, {"last": ints(-1)}))
    assert pin_of(structure, "w:1") == "a mean over it (ReduceMean_4) would still count the removed ones"


def test_root_mean_square_normalisation_is_exact_by_rescaling() -> None:
    body = """a = MatMul(x, w) s = Pow(a, two) q = ReduceMean(s, last) e = Add(q, eps) r = Sqrt(e) n = Div(a, r)
              y = MatMul(n, v)"""
    constants = {"last": ints(-1), "two": scalar(2), "eps": scalar(1e-5)}
    assert coupled(assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 8), "v": (8, 4)}, constants), 1), "w:1", "v:0")


@pytest.mark.parametrize("exponent", [0.0, -0.5])
def test_powers_that_are_not_zero_at_zero_carry_no_zero(exponent: float) -> None:
    body = "a = Conv(x, w) b = Abs(a) c = Add(b, one) d = Pow(c, e) m = ReduceSum(d, axis) y = Abs(m)"
    constants = {"one": scalar(1), "e": scalar(exponent), "axis": ints(1)}
    structure = structure_of(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, constants))
    assert pin_of(structure, "w:0") == "a sum over it (ReduceSum_4) would still count the removed ones"


@pytest.mark.parametrize(
    ("operation", "name"),
    [("Div(a, c)", "Div_1"), ("Mod<fmod=1>(a, c)", "Mod_1"), ("Reciprocal(a)", "Reciprocal_1"), ("Log(a)", "Log_1")],
)
def test_what_is_undefined_at_zero_pins_indices_that_would_be_zero_there(operation: str, name: str) -> None:
    body = f"a = MatMul(x, w) d = {operation} y = MatMul(d, v)"
    weights = {"w": (6, 8), "v": (8, 4)} | ({"c": (8,)} if "c)" in operation else {})
    structure = structure_of(tiny("float[1,3,6] x", body, weights))
    operator = name.split("_")[0]
    assert pin_of(structure, "w:1") == f"{operator} ({name}) of removed indices, which are zero, is undefined"


def test_a_divisor_kept_from_zero_does_not_pin() -> None:
    body = """a = MatMul(x, w) h = Reshape(a, split) n = ReduceL2<keepdims=1>(h, last) c = Clip(n, eps) d = Div(h, c)
              m = Reshape(d, merge) y = MatMul(m, v)"""
    constants = {"last": ints(-1), "eps": scalar(1e-6), "split": ints(1, 3, 4, 3), "merge": ints(1, 3, 12)}
    structure = assert_exact(tiny("float[1,3,6] x", body, {"w": (6, 12), "v": (12, 4)}, constants), 2)
    assert coupled(structure, "w:1/0", "v:0/0")


def test_batch_normalisation_without_scale_and_shift_moves_zeros() -> None:
    """A removed channel is -mean / std behind it: harmless before a kernel column that is zero, not before a sum."""
    head = "a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) "
    constants = {"s": np.ones(8, F), "t": np.zeros(8, F)}
    buffers = {"m": np.arange(1, 9, dtype=F), "q": np.ones(8, F)}
    weights = {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}
    raw = tiny("float[1,3,4,4] x", head + "y = Conv(n, v)", weights, constants, buffers)
    assert coupled(assert_exact(raw, 1), "w:0", "v:1")
    body = head + "r = ReduceSum(n, one) y = Abs(r)"
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, constants | {"one": ints(1)}, buffers)
    assert pin_of(structure_of(raw), "w:0") == "a sum over it (ReduceSum_2) would still count the removed ones"


def test_a_clip_that_moves_zero_carries_no_zero() -> None:
    for low, high, fine in ((0.0, 6.0, True), (-1.0, 1.0, True), (0.5, 6.0, False)):
        body = "a = Conv(x, w) c = Clip(a, low, high) m = ReduceSum(c, one) y = Abs(m)"
        constants = {"low": scalar(low), "high": scalar(high), "one": ints(1)}
        raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, constants)
        assert (pin_of(structure_of(raw), "w:0") is None) == fine
        if fine:
            assert_exact(raw, 1)


def test_padding_with_ones_reaches_removed_channels_too() -> None:
    for value, fine in ((0.0, True), (1.0, False)):
        body = "a = Conv(x, w) p = Pad(a, pads, value) m = ReduceSum(p, one) y = Abs(m)"
        constants = {"pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "value": scalar(value), "one": ints(1)}
        raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, constants)
        assert (pin_of(structure_of(raw), "w:0") is None) == fine


def test_padding_with_minus_infinity_before_a_maximum_is_as_good_as_zero() -> None:
    body = """a = Conv(x, w) r = Relu(a) p = Pad(r, pads, value) q = MaxPool<kernel_shape=[3,3], strides=[2,2]>(p)
              m = ReduceSum(q, one) y = Abs(m)"""
    constants = {"pads": ints(0, 0, 1, 1, 0, 0, 0, 0), "value": scalar(-np.inf), "one": ints(1)}
    assert coupled(assert_exact(tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, constants), 1), "w:0")


def test_an_outer_product_with_itself_is_zero_only_in_rows_and_columns_that_both_sides_zero() -> None:
    """g[c, d] = x[c] * sigmoid(x)[d]: where d is removed it is x[c] / 2, and a sum over d counts it."""
    body = """a = Conv(x, w) p = GlobalAveragePool(a) r = Squeeze(p, three) c = Transpose(r) s = Sigmoid(r)
              g = Mul(c, s) m = ReduceSum<keepdims=0>(g, one) n = Unsqueeze(m, zero) k = Add(n, r) y = MatMul(k, v)"""
    constants = {"three": ints(2, 3), "one": ints(1), "zero": ints(0)}
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "v": (8, 4)}, constants)
    assert pin_of(structure_of(raw), "w:0") == "a sum over it (ReduceSum_6) would still count the removed ones"


def test_a_zero_in_the_contracted_axis_says_nothing_of_the_result() -> None:
    """r[d] = sum_c x[c] A[c, d], A = sigmoid(..): column d of A is not zero where removed."""
    body = """a = Conv(x, w) p = GlobalAveragePool(a) r = Squeeze(p, three) c = Transpose(r) o = MatMul(c, r)
              s = Sigmoid(o) n = MatMul(r, s) m = ReduceSum<keepdims=0>(n, one) y = Abs(m)"""
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1)}, {"three": ints(2, 3), "one": ints(1)})
    assert pin_of(structure_of(raw), "w:0") == "a sum over it (ReduceSum_7) would still count the removed ones"


def test_attention_loses_heads_and_widths_within_heads() -> None:
    body = """q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
              q1 = Reshape(q0, split) k1 = Reshape(k0, split) v1 = Reshape(v0, split)
              q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1)
              l = MatMul(q, k) t = Mul(l, scale) s = Softmax<axis=-1>(t) o = MatMul(s, v)
              u = Transpose<perm=[0,2,1,3]>(o) m = Reshape(u, merge) y = MatMul(m, wo)"""
    weights = {"wq": (6, 12), "wk": (6, 12), "wv": (6, 12), "wo": (12, 6)}
    constants = {"split": ints(1, 5, 4, 3), "merge": ints(1, 5, 12), "scale": scalar(0.5)}
    structure = assert_exact(tiny("float[1,5,6] x", body, weights, constants), 3)
    assert coupled(structure, "wq:1/0", "wk:1/0", "wv:1/0", "wo:0/0")
    assert coupled(structure, "wq:1/1", "wk:1/1")
    assert coupled(structure, "wv:1/1", "wo:0/1")
    heads = next(group for group in structure.groups if group.leaf == leaf_of(structure, "wo:0/0"))
    assert (heads.size, heads.inner) == (4, 3)


# --- groups and --keep ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        result: torch.Tensor = self.head((x + self.body(x)).mean((2, 3)))
        return result


@pytest.fixture(scope="module")
def block() -> RawGraph:
    return export_raw(Block(), torch.zeros(1, 3, 8, 8))


def test_a_group_is_named_by_its_first_weight_and_owns_every_slice(block: RawGraph) -> None:
    structure = read_structure(block)
    stream, hidden = structure.groups
    assert (stream.id, stream.size, stream.inner) == ("stem.weight:0", 8, 1)
    assert sorted((item.tensor, item.axis) for item in stream.slices) == [
        ("body.0.weight", 1),
        ("body.3.bias", 0),
        ("body.3.weight", 0),
        ("head.weight", 1),
        ("stem.bias", 0),
        ("stem.weight", 0),
    ]
    assert hidden.id == "body.0.weight:0"
    assert set(hidden.tensors) == {
        "body.0.weight",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "body.3.weight",
    }
    assert all(item.coordinates.tolist() == list(range(8)) for item in stream.slices)


def test_pinned_groups_say_why_and_kernel_positions_are_not_listed(block: RawGraph) -> None:
    pinned = {group.id: group.reason for group in read_structure(block).pinned}
    assert pinned == {"stem.weight:1": "input of the model", "head.weight:0": "output of the model"}


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("stem.weight", ["body.0.weight:0"]),
        ("stem", ["body.0.weight:0"]),
        ("body.0", []),
        ("body.1", ["stem.weight:0"]),
        ("*.bias", []),
    ],
)
def test_keep_pins_everything_a_pattern_names(block: RawGraph, pattern: str, left: list[str]) -> None:
    structure = read_structure(block, [pattern])
    assert [group.id for group in structure.groups] == left
    assert f"kept by --keep {pattern}" in {group.reason for group in structure.pinned}


def test_keep_that_matches_nothing_is_refused(block: RawGraph) -> None:
    with pytest.raises(UsageError) as caught:
        read_structure(block, ["stem", "blocks.7"])
    assert str(caught.value) == ("--keep 'blocks.7' matches no parameter; see the names with: mm-edge inspect MODEL")


def test_patterns_match_names_and_modules_but_not_parts_of_words() -> None:
    assert matches("layer1", "layer1.0.conv1.weight")
    assert matches("layer?.*.conv1", "layer1.0.conv1.weight")
    assert not matches("layer1", "layer10.0.conv1.weight")
    assert not matches("conv1", "layer1.0.conv1.weight")


def test_macs_by_hand_and_with_channels_removed(block: RawGraph) -> None:
    structure = read_structure(block)
    stream, hidden = structure.groups
    assert structure.macs() == 64 * (8 * 27 + 6 * 8 + 8 * 6) + 5 * 8
    assert structure.macs({stream.leaf: 4.0, hidden.leaf: 3.0}) == 64 * (4 * 27 + 3 * 4 + 4 * 3) + 5 * 4


def test_macs_against_a_count_of_every_multiplication_a_module_makes() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ConvTranspose2d(12, 6, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()
    counted = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Set weights and inputs to one: without a bias every multiplication adds one to the output's sum."""
        nonlocal counted
        with torch.no_grad():
            if isinstance(layer, nn.ConvTranspose2d):
                value = nn.functional.conv_transpose2d(
                    torch.ones_like(inputs[0]), torch.ones_like(layer.weight), stride=layer.stride, groups=layer.groups
                )
            elif isinstance(layer, nn.Conv2d):
                # Padding is multiplied too, so it holds ones as well.
                assert not isinstance(layer.padding, str)
                padded = nn.functional.pad(inputs[0], [layer.padding[1]] * 2 + [layer.padding[0]] * 2)
                value = nn.functional.conv2d(
                    torch.ones_like(padded), torch.ones_like(layer.weight), stride=layer.stride, groups=layer.groups
                )
            else:
                value = nn.functional.linear(torch.ones_like(inputs[0]), torch.ones_like(layer.get_parameter("weight")))
        counted += int(value.sum())

    hooks = [layer.register_forward_hook(count) for layer in net if hasattr(layer, "weight")]
    net(torch.zeros(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert read_structure(export_raw(net, torch.zeros(1, 3, 16, 16))).macs() == counted
