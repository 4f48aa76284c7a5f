"""Residual branches removed whole: which there are, that removing them is exact, and what is counted without them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from residual_net import Block, Residual, randomise_
from tiny_graphs import noise
from torch import nn

from mm_edge.arrays import Array
from mm_edge.errors import JobError
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors, masked_model, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import Branch, dead_tensors, find_branches
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.widths import allowed_widths
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.plan.counts import count_macs
from mm_edge.quality.parity import compare, onnx_runner
from mm_edge.recover.closed_form.branches import MeasuredBranch, allocate_rest, empty, measure_branches, offers
from mm_edge.recover.closed_form.context import build_context
from mm_edge.recover.closed_form.sensitivity import measure_sensitivities
from mm_edge.recover.closed_form.structured import recover_closed_form


@pytest.fixture(scope="module")
def small() -> tuple[RawGraph, Structure]:
    torch.manual_seed(0)
    module = Residual().eval()
    randomise_(module)
    raw = export_raw(module, torch.zeros(1, 3, 8, 8))
    return raw, read_structure(raw)


def assert_exact(raw: RawGraph, structure: Structure, keep: Keep, tolerance: float = 1e-4) -> None:
    """The compact graph must answer as the masked one, which must not answer as the dense one."""
    inputs = noise(raw)
    masked = onnx_runner(masked_model(raw, mask_tensors(structure, keep)))
    compact = materialise(raw, structure, keep)
    for model in (compact, deploy(materialise(raw, structure, keep))):
        found = compare(onnx_runner(model), masked, inputs, "noise")
        assert found.max_rel_err < tolerance and found.top1_agreement == 1.0
    assert compare(onnx_runner(raw.model.clone()), masked, inputs, "noise").max_rel_err > 1e-3


def test_branches_are_counted_by_hand(small: tuple[RawGraph, Structure]) -> None:
    raw, structure = small
    first, second = find_branches(raw.model, structure)
    assert (first.id, second.id) == ("first", "second")
    assert first.macs == 2 * 8 * 12 * 9 * 8 * 8
    assert second.macs == 2 * 16 * 20 * 9 * 4 * 4
    assert set(first.tensors) == {
        f"first.{name}"
        for name in ("wide.weight", "wide.bias", "norm.weight", "norm.bias", "narrow.weight", "narrow.bias")
    }


class NormedBlock(Block):
    """A block that ends with a BatchNorm, which an emptied branch feeds with zeros."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.last = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.last(self.narrow(torch.relu(self.norm(self.wide(x)))))
        return result


def test_a_branch_removed_from_a_narrower_stream_leaves_no_old_shape(caplog: pytest.LogCaptureFixture) -> None:
    """What an emptied branch puts out is computed at the new widths; onnx_ir logs a shape that does not fit."""

    class Normed(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.first = NormedBlock(8, 12)

    torch.manual_seed(0)
    module = Normed().eval()
    randomise_(module)
    raw = export_raw(module, torch.zeros(1, 3, 8, 8))
    structure = read_structure(raw)
    keep = {group.leaf: np.arange(group.size) % 4 > 0 for group in structure.groups}
    keep |= {leaf: np.zeros(12, dtype=bool) for leaf in keep if len(keep[leaf]) == 12}
    caplog.clear()
    assert_exact(raw, structure, keep)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("onnx_ir")] == []


@pytest.mark.parametrize("removed", [(0,), (1,), (0, 1)])
def test_removing_blocks_is_exact_and_counted(small: tuple[RawGraph, Structure], removed: tuple[int, ...]) -> None:
    raw, structure = small
    branches = [find_branches(raw.model, structure)[index] for index in removed]
    keep = empty(structure, branches)
    assert_exact(raw, structure, keep)
    compact = materialise(raw, structure, keep)
    assert sum(node.op_type == "Conv" for node in compact.graph) == 6 - 2 * len(removed)
    assert count_macs(raw, structure, keep) == structure.macs() - sum(item.macs for item in branches)
    gone = dead_tensors(raw.model, structure, keep)
    for item in branches:
        assert set(item.tensors) - gone == {f"{item.id}.narrow.bias"}  # the constant that stays


def test_a_constant_that_is_empty_from_the_start_does_not_refuse_a_branch() -> None:
    """A Resize names an empty region of interest; PP-OCR's text detector has six."""
    torch.manual_seed(0)
    module = Residual().eval()
    randomise_(module)
    raw = export_raw(module, torch.zeros(1, 3, 8, 8))
    graph = raw.model.graph
    for name, array in (("roi", np.zeros(0, np.float32)), ("scales", np.ones(4, np.float32))):
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name), **typed(array)))
    reader = next(node for node in graph if graph.inputs[0] in node.inputs)
    resize = ir.node(
        "Resize", [graph.inputs[0], graph.initializers["roi"], graph.initializers["scales"]], name="resize"
    )
    resize.outputs[0].name, resize.outputs[0].shape = "resized", graph.inputs[0].shape
    resize.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_before(reader, resize)
    reader.replace_input_with(0, resize.outputs[0])
    structure = read_structure(raw)
    branch = find_branches(raw.model, structure)[0]
    assert_exact(raw, structure, empty(structure, (branch,)))


def typed(array: Array) -> dict[str, Any]:
    return {"shape": ir.Shape(array.shape), "type": ir.TensorType(ir.DataType.FLOAT)}


def test_what_a_block_leaves_goes_into_the_bias_before_it(small: tuple[RawGraph, Structure]) -> None:
    raw, structure = small
    first, second = find_branches(raw.model, structure)
    compact = deploy(materialise(raw, structure, empty(structure, (first,))))
    assert sum(node.op_type == "Add" for node in compact.graph) == 1  # the second block's own
    # Before the second block stands a Relu: its constant stays an addition of one number per channel.
    compact = deploy(materialise(raw, structure, empty(structure, (second,))))
    sizes = [
        value.const_value.size
        for node in compact.graph
        if node.op_type == "Add"
        for value in node.inputs
        if value is not None and value.const_value is not None
    ]
    assert sizes == [16]


def test_width_and_depth_go_together(small: tuple[RawGraph, Structure]) -> None:
    raw, structure = small
    keep = {group.leaf: np.arange(group.size) % 2 == 0 for group in structure.groups}
    assert_exact(raw, structure, {**keep, **empty(structure, find_branches(raw.model, structure)[:1])})


def test_only_whole_branches_may_be_emptied(small: tuple[RawGraph, Structure]) -> None:
    raw, structure = small
    (stem,) = [group for group in structure.groups if "stem.weight" in group.tensors]
    with pytest.raises(JobError, match=r"^group stem.weight:0 would lose all of its 8 indices, and it is not"):
        materialise(raw, structure, {stem.leaf: np.zeros(stem.size, dtype=np.bool_)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "count", "first", "last"),
    [
        ("resnet50", 64, 12, "layer1.1", "layer4.2"),
        ("convnext_atto", 64, 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("vit_tiny_patch16_224", 64, 24, "blocks.0.attn", "blocks.11.mlp"),
    ],
)
def test_removing_blocks_of_real_networks_is_exact(name: str, side: int, count: int, first: str, last: str) -> None:
    model = load_model(f"timm:{name}", LoadOptions(input_size=(3, side, side)))
    assert model.module is not None
    randomise_(model.module)
    raw = export_raw(model.module, torch.zeros(1, 3, side, side))
    structure = read_structure(raw)
    branches = find_branches(raw.model, structure)
    assert (len(branches), branches[0].id, branches[-1].id) == (count, first, last)
    for removed in (branches[:1], branches[-1:], branches[::2]):
        assert_exact(raw, structure, empty(structure, removed))


def test_the_cheapest_blocks_by_divergence_per_multiply_add_are_offered_first() -> None:
    items = [
        MeasuredBranch(Branch(name, (), (), macs), kl)
        for name, macs, kl in (("a", 10.0, 0.2), ("b", 40.0, 0.2), ("c", 10.0, 0.1), ("d", 1.0, 0.4), ("e", 1.0, 0.5))
    ]
    assert [[item.id for item in found] for found in offers(items, lambda item: item.macs)] == [
        [],
        ["b"],
        ["b", "c"],
        ["b", "c", "a"],
    ]
    assert offers((), lambda item: item.macs) == [()]
    hopeless = [MeasuredBranch(Branch("a", (), (), 10.0), 5.0)]
    assert offers(hopeless, lambda item: item.macs) == [()]


def test_a_removed_block_is_recovered_like_any_pruning(small: tuple[RawGraph, Structure]) -> None:
    raw, structure = small
    images = np.random.default_rng(0).standard_normal((60, 3, 8, 8), dtype=np.float32)
    context = build_context(raw, structure, images)
    allowed = [allowed_widths(group, 2) for group in structure.groups]
    sensitivities = measure_sensitivities(context, allowed)
    measured = measure_branches(context, find_branches(raw.model, structure))
    assert [item.branch.id for item in measured] == ["first", "second"]
    assert all(math.isfinite(item.kl) and item.kl > 0 for item in measured)
    removed = [measured[1].branch]
    budget = 0.6 * structure.macs()
    keep = allocate_rest(structure, structure.mac_cost, sensitivities, removed, budget, allowed)
    assert count_macs(raw, structure, keep) <= budget
    assert not any(keep[leaf].any() for leaf in removed[0].leaves)
    counts = {leaf: int(kept.sum()) for leaf, kept in keep.items() if kept.any()}
    left = {leaf: item for leaf, item in sensitivities.items() if leaf in counts}
    found = recover_closed_form(context, keep, counts, sensitivities=left, walked=True)
    keep = {**keep, **found.keep}
    plain = onnx_runner(materialise(raw, structure, keep))
    recovered = onnx_runner(materialise(raw, structure, keep, found.tensors))
    dense = onnx_runner(raw.model.clone())
    fresh = np.random.default_rng(1).standard_normal((20, 3, 8, 8), dtype=np.float32)

    def error(run: object) -> float:
        return float(np.mean([np.square(run(x[None])[0] - dense(x[None])[0]).mean() for x in fresh]))  # type: ignore[operator]

    assert error(recovered) < 0.7 * error(plain)
    masked = onnx_runner(masked_model(raw, {}, found.tensors))
    assert compare(recovered, masked, fresh[:4], "noise").max_rel_err < 1e-4
