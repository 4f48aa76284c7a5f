"""The ten strategies by hand, and that none leaves its ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.errors import UsageError
from mm_edge.plan.strategies import STRATEGIES, assign
from mm_edge.records import Assignment, Layer, SparsityRange
from mm_edge.run.request import make_request

ROLES = ["stem", "conv", "depthwise", "qkv", "attention_projection", "mlp", "classifier", "downsample"]


def make(roles: list[str], sizes: list[int] | None = None) -> tuple[list[Layer], dict[str, SparsityRange]]:
    sizes = sizes or [100] * len(roles)
    layers = [
        Layer(f"l{i}", "linear", role, (size,), i, 0, 1)
        for i, (role, size) in enumerate(zip(roles, sizes, strict=True))
    ]
    return layers, {layer.fqn: SparsityRange(0.2, 0.6, "test") for layer in layers}


def sparsities(name: str, roles: list[str], sizes: list[int] | None = None) -> list[float]:
    layers, ranges = make(roles, sizes)
    (found,) = assign([name], "magnitude", layers, ranges)
    assert found.strategy == name and list(found.sparsity) == [layer.fqn for layer in layers]
    return [round(rho, 9) for rho in found.sparsity.values()]


@pytest.mark.parametrize(
    ("name", "rho"),
    [
        ("min_conservative", 0.2),
        ("max_aggressive", 0.6),
        ("balanced", 0.4),
        ("lower_30th", 0.32),
        ("middle_50th", 0.4),
        ("upper_70th", 0.48),
        ("upper_90th", 0.56),
    ],
)
def test_fixed_shares(name: str, rho: float) -> None:
    assert sparsities(name, ["conv", "mlp"]) == [rho, rho]


def test_parameter_proportional() -> None:
    # Mean 1500 weights: a = 0.1 * 300 / 1500 = 0.02 and 0.1 * 2700 / 1500 = 0.18; ten times the mean reaches hi.
    assert sparsities("parameter_proportional", ["conv"] * 2, [300, 2700]) == [0.208, 0.272]
    assert sparsities("parameter_proportional", ["conv"] * 20, [1] * 19 + [10**6])[-1] == 0.6


def test_classifier_heavy() -> None:
    assert sparsities("classifier_heavy", ["stem", "conv", "conv", "conv", "conv", "mlp"]) == [0.2] * 4 + [0.6] * 2
    assert sparsities("classifier_heavy", ["classifier", "conv", "conv"]) == [0.6, 0.2, 0.6]


def test_feature_heavy() -> None:
    convolutional = ["stem", "conv", "conv", "depthwise", "mlp", "classifier"]
    assert sparsities("feature_heavy", convolutional) == [0.4, 0.4, 0.6, 0.6, 0.4, 0.4]
    transformer = ["patch_embedding", "qkv", "qkv", "attention_projection", "conv", "mlp"]
    assert sparsities("feature_heavy", transformer) == [0.4, 0.4, 0.6, 0.6, 0.4, 0.4]


def test_coinciding_formulas_are_one_assignment() -> None:
    layers, ranges = make(["conv", "classifier"])
    found = assign(tuple(STRATEGIES), "product", layers, ranges)
    assert len(STRATEGIES) == 10 and len(found) == 9
    assert [a.names for a in found if len(a.names) > 1] == [("balanced", "middle_50th")]
    assert isinstance(found[0], Assignment) and {a.signal for a in found} == {"product"}
    # Equal numbers alone are no reason to merge.
    flat = {fqn: SparsityRange(0.3, 0.3, "test") for fqn in ranges}
    assert len(assign(tuple(STRATEGIES), "product", layers, flat)) == 9
    assert assign(["middle_50th"], "product", layers, ranges)[0].names == ("middle_50th",)


@given(
    st.lists(
        st.tuples(st.sampled_from(ROLES), st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1)),
        min_size=1,
        max_size=12,
    )
)
def test_every_strategy_stays_inside_its_ranges(rows: list[tuple[str, int, float, float]]) -> None:
    layers, _ = make([row[0] for row in rows], [row[1] for row in rows])
    ranges = {layer.fqn: SparsityRange(min(row[2:]), max(row[2:]), "") for layer, row in zip(layers, rows, strict=True)}
    for found in assign(tuple(STRATEGIES), "gradient", layers, ranges):
        assert all(ranges[fqn].lo <= rho <= ranges[fqn].hi for fqn, rho in found.sparsity.items())
    assert assign(tuple(STRATEGIES), "gradient", layers, ranges) == assign(
        tuple(STRATEGIES), "gradient", layers, ranges
    )


def test_names_of_strategies() -> None:
    assert make_request(strategies="all").strategies == tuple(STRATEGIES)
    assert make_request(strategies="upper_70th, balanced,upper_70th").strategies == ("upper_70th", "balanced")
    with pytest.raises(UsageError) as unknown:
        make_request(strategies="balanced,ballanced")
    assert str(unknown.value) == "unknown strategy 'ballanced'; did you mean balanced?"
    with pytest.raises(UsageError) as empty:
        make_request(strategies="")
    assert str(empty.value) == (
        "no strategy given; allowed: all, min_conservative, max_aggressive, balanced, lower_30th, middle_50th, "
        "upper_70th, upper_90th, parameter_proportional, classifier_heavy, feature_heavy"
    )
