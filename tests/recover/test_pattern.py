"""Recovery under 2:4 masks in closed form: the pattern holds, and the divergence falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.compact import materialise
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.plan.n_m import parse_pattern, project_mask, reduced_axes
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.closed_form.judging import divergence
from mm_edge.recover.closed_form.pattern import recover_pattern


class Net(nn.Module):
    """A convolution with BatchNorm, one with a bias, a hidden layer without a bias to move, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.hidden = nn.Linear(24, 32, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.norm(self.stem(x)).relu()).relu()
        found: torch.Tensor = self.head(self.hidden(x.mean((2, 3))).relu())
        return found


@pytest.fixture(scope="module")
def context() -> RecoveryContext:
    torch.manual_seed(0)
    raw = export_raw(Net().eval(), torch.zeros(1, 3, 12, 12))
    images = np.random.default_rng(0).standard_normal((80, 3, 12, 12), dtype=np.float32)
    return build_context(raw, read_structure(raw), images, also=tuple(reduced_axes(raw.model)))


def two_of_four(context: RecoveryContext) -> dict[str, BoolArray]:
    axes = reduced_axes(context.raw.model)
    arrays = {name: context.graph.arrays[name] for name in axes if name != "stem.weight"}
    return {name: project_mask(np.abs(array), parse_pattern("2:4"), axes[name]) for name, array in arrays.items()}


def kl(context: RecoveryContext, tensors: Arrays) -> float:
    graph = RunnableGraph(materialise(context.raw, context.structure, {}, tensors))
    return divergence(context, graph, Frontier(context.graph, context.images, context.held_back))


def test_it_keeps_the_pattern_and_most_of_the_answers(context: RecoveryContext) -> None:
    masks = two_of_four(context)
    found = recover_pattern(context, masks)
    assert found.layers == 3
    assert set(masks) == {"body.weight", "hidden.weight", "head.weight"}
    for name, mask in masks.items():
        assert not found.tensors[name][~mask].any()
    masked = {name: np.where(mask, context.graph.arrays[name], 0) for name, mask in masks.items()}
    assert kl(context, found.tensors) < 0.5 * kl(context, masked)
    assert {"body.bias", "head.bias"} <= set(found.tensors)


def test_masks_that_remove_nothing_change_nothing(context: RecoveryContext) -> None:
    whole = {name: np.ones_like(mask) for name, mask in two_of_four(context).items()}
    assert recover_pattern(context, whole).tensors == {}
