"""A masked module made smaller: the same answers, the same gradients, and what its code does not allow stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from recovery_cases import Depthwise, Grouped, Plain
from torch import nn

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.plan.masks import bind_masks
from mm_edge.recover.training.shrink import Shrunk, Slices, group_slices, shrink_


class HardCoded(nn.Module):
    """Two hidden layers, one of which the code reshapes to 8 channels of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 12, 1), nn.Linear(12, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu().mean((2, 3))
        found: torch.Tensor = self.third(self.second(x).relu().reshape(-1, 8, 4).flatten(1))
        return found


class Tied(nn.Module):
    """One layer, used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 10)
        self.one = nn.Conv2d(8, 8, 1)
        self.two = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.two(self.one(self.stem(x).relu()).relu()).mean((2, 3)))
        return found


def prune(kind: Callable[[], nn.Module], third: int = 0) -> tuple[nn.Module, tuple[Slices, ...], Structure, Keep]:
    """Return a masked network without every third index of its groups, and what stays of each group."""
    torch.manual_seed(0)
    network = kind().eval()
    raw = export_raw(network, torch.zeros(1, 3, 8, 8))
    structure = read_structure(raw)
    keep: Keep = {group.leaf: np.arange(group.size) % 3 != third for group in structure.groups}
    masks = {name: mask.dense() for name, mask in mask_tensors(structure, keep).items()}
    bind_masks(network, masks).apply_()
    return network, group_slices(structure, keep, raw.parameters | raw.buffers), structure, keep


def inputs(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(item.shape) for name, item in module.state_dict().items() if item.ndim}


def expected_shapes(dense: nn.Module, groups: tuple[Slices, ...]) -> dict[str, tuple[int, ...]]:
    found = shapes(dense)
    for group in groups:
        for name, axes in group.items():
            sizes = [size if axis.all() else int(axis.sum()) for axis, size in zip(axes, found[name], strict=True)]
            found[name] = tuple(sizes)
            if isinstance(dense, Tied):
                found[name.replace("one.", "two.")] = found[name]
    return found


@pytest.mark.parametrize("kind", [Plain, Depthwise, Tied])
def test_every_group_goes_and_answers_and_gradients_are_those_of_the_masked_module(
    kind: Callable[[], nn.Module],
) -> None:
    masked, groups, _, _ = prune(kind)
    small = copy.deepcopy(masked)
    shrunk = shrink_(small, groups, inputs(2))
    assert groups and shapes(small) == expected_shapes(masked, groups)
    for module in (masked, small):
        module.train()
    torch.testing.assert_close(small(inputs()), masked(inputs()), rtol=1e-4, atol=1e-5)
    for module in (masked, small):
        module(inputs()).square().sum().backward()
    wanted, found = gradients(masked), gradients(small)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, shrunk.take(name, wanted[name]), rtol=1e-3, atol=1e-3)


def gradients(network: nn.Module) -> Arrays:
    return {name: item.grad.numpy() for name, item in network.named_parameters() if item.grad is not None}


def test_counted_by_hand() -> None:
    network, groups, _, _ = prune(Depthwise)
    shrink_(network, groups, inputs(2))
    assert isinstance(network, Depthwise)
    dw = network.dw
    assert (tuple(dw.weight.shape), dw.groups, dw.in_channels, dw.out_channels) == ((21, 1, 3, 3), 21, 21, 21)
    assert tuple(network.project.weight.shape) == (5, 21, 1, 1) and shapes(network)["bn2.running_mean"] == (21,)


def test_what_the_code_hard_codes_stays_and_the_rest_goes() -> None:
    network, groups, _, _ = prune(HardCoded)
    dense = copy.deepcopy(network)
    shrunk = shrink_(network, groups, inputs(2))
    assert shapes(network)["first.weight"] == (8, 3, 1, 1) and shapes(network)["second.weight"] == (32, 8)
    assert "third.weight" not in shrunk.kept
    torch.testing.assert_close(network(inputs()), dense(inputs()))


def test_grouped_convolutions_answer_the_same_whatever_could_go() -> None:
    network, groups, _, _ = prune(Grouped)
    dense = copy.deepcopy(network)
    shrink_(network, groups, inputs(2))
    assert shapes(network) != shapes(dense)
    torch.testing.assert_close(network(inputs()), dense(inputs()))


def test_an_answer_that_changes_is_noticed() -> None:
    """The slices drop channels that still hold weights."""
    network, groups, _, _ = prune(Plain)
    torch.manual_seed(1)
    whole = Plain().eval()
    assert shrink_(whole, groups, inputs(2)) == Shrunk({})
    assert shapes(whole) == shapes(Plain())
    assert shrink_(network, (), inputs(2)).kept == {}


def test_a_group_that_loses_all_keeps_one_index_of_zeros() -> None:
    torch.manual_seed(0)
    network = Plain().eval()
    raw = export_raw(network, torch.zeros(1, 3, 8, 8))
    structure = read_structure(raw)
    leaf = next(group.leaf for group in structure.groups if group.id.startswith("conv2.weight"))
    keep = {leaf: np.zeros(16, dtype=np.bool_)}
    bind_masks(network, {name: mask.dense() for name, mask in mask_tensors(structure, keep).items()}).apply_()
    wanted = network(inputs())
    shrunk = shrink_(network, group_slices(structure, keep, raw.parameters | raw.buffers), inputs(2))
    assert tuple(network.conv2.weight.shape) == (1, 16, 3, 3) and not network.conv2.weight.any()
    torch.testing.assert_close(network(inputs()), wanted)
    mask = shrunk.take("conv2.weight", mask_tensors(structure, keep)["conv2.weight"].dense())
    assert mask.shape == (1, 16, 3, 3) and not mask.any()


def test_put_is_the_inverse_of_take_where_something_stays() -> None:
    kept: Mapping[str, tuple[BoolArray, ...]] = {"w": (np.array([True, False, True]), np.array([False, True]))}
    shrunk, whole = Shrunk(kept), np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(shrunk.take("w", whole), [[1.0], [5.0]])
    back = shrunk.put("w", np.array([[10.0], [50.0]]), whole)
    np.testing.assert_array_equal(back, [[0, 10], [2, 3], [4, 50]])
    np.testing.assert_array_equal(whole, np.arange(6.0).reshape(3, 2))
    assert shrunk.take("other", whole) is whole and shrunk.put("other", whole, whole) is whole


def test_the_mode_and_the_statistics_are_given_back() -> None:
    network, groups, _, _ = prune(Plain)
    network.train()
    before = {name: item.clone() for name, item in network.named_buffers()}
    shrunk = shrink_(network, groups, inputs(2))
    assert network.training
    for name, item in network.named_buffers():
        np.testing.assert_array_equal(item.numpy(), shrunk.take(name, before[name].numpy()))
