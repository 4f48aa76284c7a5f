"""Ten strategies, each a sparsity per layer inside its range (E6 and its neighbours).

    at(a) = lo + a (hi - lo)

    min_conservative        at(0)           balanced, middle_50th   at(0.5)
    max_aggressive          at(1)           lower_30th, upper_70th, upper_90th   at(0.3), at(0.7), at(0.9)
    parameter_proportional  at(min(1, 0.1 n / mean n)), n = weights in the layer (E6)
    classifier_heavy        at(1) for the classifier and the last third of the layers, at(0) elsewhere
    feature_heavy           at(1) for the feature extractors in the last two thirds, at(0.5) elsewhere

Source: arXiv 2603.20280.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mm_edge.deferred import Deferred  # noqa: F401  for entries whose function lies in another module
from mm_edge.records import Assignment, Layer, SparsityRange

CONVOLUTION_ROLES = frozenset({"conv", "deep_stem", "depthwise", "downsample", "se", "stem"})
ATTENTION_ROLES = frozenset({"qkv", "attention_projection"})


@dataclass(frozen=True)
class Spot:
    """Where one layer stands among the others.

    Attributes:
        role: the layer's role.
        depth: share of the layers before it in graph order, in [0, 1).
        relative_size: its weights over the mean of all layers.
        extracts: whether it is a feature extractor: attention where the network has any, else a convolution.
    """

    role: str
    depth: float
    relative_size: float
    extracts: bool


def min_conservative(spot: Spot) -> float:
    """The low end."""
    return 0.0


def max_aggressive(spot: Spot) -> float:
    """The high end."""
    return 1.0


def balanced(spot: Spot) -> float:
    """The middle."""
    return 0.5


def lower_30th(spot: Spot) -> float:
    """30 % of the range above its low end."""
    return 0.3


def upper_70th(spot: Spot) -> float:
    """70 % of the range above its low end."""
    return 0.7


def upper_90th(spot: Spot) -> float:
    """90 % of the range above its low end."""
    return 0.9


def parameter_proportional(spot: Spot) -> float:
    """E6: further the larger the layer."""
    return min(1.0, 0.1 * spot.relative_size)


def classifier_heavy(spot: Spot) -> float:
    """The high end for the classifier and the last third, the low end elsewhere."""
    return 1.0 if spot.role == "classifier" or spot.depth >= 2 / 3 else 0.0


def feature_heavy(spot: Spot) -> float:
    """The high end for feature extractors in the last two thirds, the middle elsewhere."""
    return 1.0 if spot.extracts and spot.depth >= 1 / 3 else 0.5


@dataclass(frozen=True)
class Strategy:
    """One way to place layers inside their ranges.

    Attributes:
        help: where layers are placed, in a few words, for --help.
        share: how far up its range [lo, hi] a layer is placed, in [0, 1]. Strategies with one function here coincide
            by formula: they make one assignment, which carries all their names.
    """

    help: str
    share: Callable[[Spot], float]


STRATEGIES: dict[str, Strategy] = {
    "min_conservative": Strategy("the low end of every range", min_conservative),
    "max_aggressive": Strategy("the high end of every range", max_aggressive),
    "balanced": Strategy("the middle of every range", balanced),
    "lower_30th": Strategy("30 % of the way up", lower_30th),
    "middle_50th": Strategy("the middle of every range", balanced),
    "upper_70th": Strategy("70 % of the way up", upper_70th),
    "upper_90th": Strategy("90 % of the way up", upper_90th),
    "parameter_proportional": Strategy("further up the more weights a layer has", parameter_proportional),
    "classifier_heavy": Strategy("the high end for the classifier and the last third of layers", classifier_heavy),
    "feature_heavy": Strategy("the high end for feature extractors in the last two thirds", feature_heavy),
}


def assign(
    strategies: Sequence[str], signal: str, layers: Sequence[Layer], ranges: Mapping[str, SparsityRange]
) -> tuple[Assignment, ...]:
    """Return one assignment per distinct formula among `strategies`, in the order given, for masks made by `signal`."""
    merged: dict[Callable[[Spot], float], list[str]] = {}
    for name in strategies:
        merged.setdefault(STRATEGIES[name].share, []).append(name)
    spots = _spots(layers)
    return tuple(
        Assignment(
            signal,
            tuple(names),
            {layer.fqn: _at(ranges[layer.fqn], share(spots[layer.fqn])) for layer in layers},
        )
        for share, names in merged.items()
    )


def _at(bounds: SparsityRange, share: float) -> float:
    """lo + share (hi - lo), never outside [lo, hi] by rounding."""
    return min(max(bounds.lo + share * (bounds.hi - bounds.lo), bounds.lo), bounds.hi)


def _spots(layers: Sequence[Layer]) -> dict[str, Spot]:
    total = sum(layer.numel for layer in layers)
    extractors = ATTENTION_ROLES if any(layer.role in ATTENTION_ROLES for layer in layers) else CONVOLUTION_ROLES
    return {
        layer.fqn: Spot(
            role=layer.role,
            depth=position / len(layers),
            relative_size=layer.numel * len(layers) / total if total else 0.0,
            extracts=layer.role in extractors,
        )
        for position, layer in enumerate(layers)
    }
