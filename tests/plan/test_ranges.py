"""E4, E5 and the rule table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.errors import JobError
from mm_edge.plan.ranges import DEFAULT_ROLE_RANGES, FAMILY_ROLE_RANGES, apply_constraints, observed_ranges, rule_ranges
from mm_edge.records import Layer, SparsityRange


def layer(fqn: str, role: str = "conv", shape: tuple[int, ...] = (200, 100), index: int = 0, stage: int = 0) -> Layer:
    return Layer(fqn, "linear", role, shape, index, stage, 1)


def bounds(ranges: dict[str, SparsityRange]) -> dict[str, tuple[float, float]]:
    return {fqn: (found.lo, found.hi) for fqn, found in ranges.items()}


def test_resnet_rows_follow_the_stage_of_the_blocks() -> None:
    layers = [
        layer("stem", "stem", stage=0),
        layer("s1", stage=1),
        layer("s2", stage=2),
        layer("s3", stage=3),
        layer("s4", stage=4),
        layer("short", "downsample", stage=4),
        layer("fc", "classifier", stage=4),
    ]
    found = rule_ranges(layers, "ResNet")
    assert bounds(found) == {
        "stem": (0.0, 0.30),
        "s1": (0.30, 0.50),
        "s2": (0.40, 0.60),
        "s3": (0.50, 0.70),
        "s4": (0.75, 0.95),
        "short": (0.0, 0.20),
        "fc": (0.0, 0.30),
    }
    assert found["s2"].reason == "rule ResNet: conv, stage row 2" and found["fc"].reason == "rule ResNet: classifier"
    # Without a stem that shrinks the picture the same blocks stand one stage earlier.
    small = [layer("stem", "stem"), layer("s1", stage=0), layer("s2", stage=1)]
    assert bounds(rule_ranges(small, "ResNet"))["s2"] == (0.40, 0.60)


def test_swin_rows() -> None:
    layers = [
        layer("patch", "patch_embedding"),
        layer("qkv0", "qkv", stage=0),
        layer("proj1", "attention_projection", stage=1),
        layer("fc1", "mlp_fc1", stage=2),
        layer("fc2", "mlp_fc2", stage=3),
        layer("merge", "downsample", stage=3),
        layer("head", "classifier", stage=3),
    ]
    assert bounds(rule_ranges(layers, "SwinTransformer")) == {
        "patch": (0.0, 0.10),
        "qkv0": (0.10, 0.30),
        "proj1": (0.25, 0.45),
        "fc1": (0.40, 0.55),
        "fc2": (0.40, 0.55),
        "merge": (0.05, 0.20),
        "head": (0.0, 0.15),
    }


def test_vgg_rows_follow_the_size() -> None:
    layers = [
        layer("stem", "stem", (64, 3, 3, 3)),
        layer("a", "conv", (999, 100)),
        layer("b", "conv", (1000, 100)),
        layer("c", "conv", (1000, 500)),
        layer("hidden", "mlp_fc1"),
        layer("head", "classifier"),
    ]
    assert bounds(rule_ranges(layers, "VGG")) == {
        "stem": (0.40, 0.80),
        "a": (0.40, 0.80),
        "b": (0.50, 0.85),
        "c": (0.60, 0.90),
        "hidden": (0.30, 0.70),
        "head": (0.30, 0.70),
    }


def test_levit_rows_and_default_rows_where_a_family_has_none() -> None:
    layers = [layer(role, role) for role in ("attention_projection", "mlp_fc2", "depthwise", "downsample")]
    assert bounds(rule_ranges(layers, "LevitDistilled")) == {
        "attention_projection": (0.50, 0.80),
        "mlp_fc2": (0.0, 0.40),
        "depthwise": (0.10, 0.60),
        "downsample": (0.05, 0.20),
    }
    roles = (
        "stem",
        "patch_embedding",
        "downsample",
        "conv",
        "depthwise",
        "se",
        "qkv",
        "attention_projection",
        "mlp",
        "mlp_fc1",
        "mlp_fc2",
        "classifier",
        "unheard-of",
    )
    found = bounds(rule_ranges([layer(role, role) for role in roles], "MyNet"))
    assert found == {
        "stem": (0.0, 0.20),
        "patch_embedding": (0.0, 0.20),
        "downsample": (0.05, 0.20),
        "conv": (0.10, 0.60),
        "depthwise": (0.10, 0.60),
        "se": (0.10, 0.60),
        "unheard-of": (0.10, 0.60),
        "qkv": (0.20, 0.50),
        "attention_projection": (0.20, 0.50),
        "mlp": (0.30, 0.60),
        "mlp_fc1": (0.30, 0.60),
        "mlp_fc2": (0.30, 0.60),
        "classifier": (0.0, 0.30),
    }


def test_every_row_of_the_table_is_a_range() -> None:
    for table in (DEFAULT_ROLE_RANGES, *FAMILY_ROLE_RANGES.values()):
        for rule in table.values():
            assert rule.bounds and all(0.0 <= lo < hi <= 1.0 for lo, hi in rule.bounds)


def test_observed_by_hand() -> None:
    # Ten weights; layer a holds 4, layer b 6. MAG prunes the 7, 8, 9 smallest of 1..10.
    weights = {"a": np.array([[1, 2, 9, 10]], np.float32), "b": np.array([3, 4, 5, 6, 7, 8], np.float32)}
    layers = [layer("a", shape=(1, 4)), layer("b", shape=(6,))]
    found = observed_ranges(layers, weights)
    assert bounds(found) == {"a": (2 / 4, 3 / 4), "b": (5 / 6, 1.0)}
    assert found["a"].reason == "observed with MAG"


def test_observed_snip_and_grasp_by_hand() -> None:
    weights = {"a": np.ones(5, np.float32), "b": -np.ones(5, np.float32)}
    layers = [layer("a", shape=(5,)), layer("b", shape=(5,))]
    # MAG ties everywhere: by position layer a goes first -> a 1.0; b 0.4, 0.6, 0.8.
    # SNIP |w g|: a keeps its large gradients -> b all gone, a 0.4, 0.6, 0.8.
    grads = {"a": np.array([-6, 7, 8, 9, 10], np.float32), "b": np.array([1, -2, 3, 4, 5], np.float32)}
    snip = observed_ranges(layers, weights, grads)
    assert bounds(snip) == {"a": (0.4, 1.0), "b": (0.4, 1.0)}
    signed = {"a": np.array([-1, -2, -3, -4, 5], np.float32), "b": np.array([6, 7, 8, 9, 10], np.float32)}
    # Of w (H g), b gives -6 ... -10 and a -1.1 ... 5.5: b goes first, which by magnitude of the product it would not.
    only = observed_ranges(layers, {"a": weights["a"] * np.float32(1.1), "b": weights["b"]}, None, signed)
    assert only["b"] == SparsityRange(1.0, 1.0, "observed with MAG, GraSP")
    assert observed_ranges(layers, weights, grads, grads)["a"].reason == "observed with MAG, SNIP, GraSP"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 2**31))
def test_observed_counts_add_up(sizes: list[int], levels: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    layers = [layer(str(i), shape=(n,)) for i, n in enumerate(sizes)]
    weights = {str(i): generator.integers(-levels, levels + 1, n).astype(np.float32) for i, n in enumerate(sizes)}
    found = observed_ranges(layers, weights)
    total = sum(sizes)
    low = sum(found[x.fqn].lo * x.numel for x in layers)
    high = sum(found[x.fqn].hi * x.numel for x in layers)
    assert all(0.0 <= r.lo <= r.hi <= 1.0 for r in found.values())
    assert low == pytest.approx(np.floor(0.70 * total + 0.5)) and high == pytest.approx(np.floor(0.90 * total + 0.5))


def test_observed_refuses_a_missing_gradient() -> None:
    weights = {"a": np.ones(5, np.float32)}
    with pytest.raises(JobError) as caught:
        observed_ranges([layer("a", shape=(5,))], weights, {})
    assert str(caught.value) == "layer 'a' has no SNIP score: it is no parameter of the module; use --ranges rules"


def test_constraints_and_their_order() -> None:
    wide = SparsityRange(0.0, 0.9, "rule")
    layers = [
        layer("patch", "patch_embedding"),
        layer("tiny patch", "patch_embedding", (10, 10)),
        layer("tiny", shape=(10, 10)),
        layer("edge", shape=(100, 100)),
        layer("norm", "normalisation", (10, 10)),
        layer("plain"),
    ]
    ranges = {x.fqn: wide for x in layers}
    masks = apply_constraints(layers, ranges, structured=False)
    assert bounds(masks) == {
        "patch": (0.15, 0.30),
        "tiny patch": (0.10, 0.10),
        "tiny": (0.0, 0.10),
        "edge": (0.0, 0.9),
        "norm": (0.0, 0.0),
        "plain": (0.0, 0.9),
    }
    assert masks["tiny patch"].reason == "rule; patch embedding; fewer than 10,000 weights"
    assert masks["plain"] == wide
    channels = apply_constraints(layers, ranges, structured=True)
    assert bounds(channels) == {
        "patch": (0.15, 0.30),
        "tiny patch": (0.15, 0.30),
        "tiny": (0.0, 0.9),
        "edge": (0.0, 0.9),
        "norm": (0.0, 0.0),
        "plain": (0.0, 0.9),
    }


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["patch_embedding", "conv", "qkv"]),
    st.integers(1, 200),
    st.booleans(),
)
def test_constraints_keep_a_range_a_range(a: float, b: float, role: str, size: int, structured: bool) -> None:
    one = layer("x", role, (size, size))
    found = apply_constraints([one], {"x": SparsityRange(min(a, b), max(a, b), "")}, structured)["x"]
    assert 0.0 <= found.lo <= found.hi <= 1.0
