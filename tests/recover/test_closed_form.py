"""Closed-form recovery on small networks: exactness, masks, parity, and that it recovers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recovery_cases import BUILDERS, Case, Plain, kl_as_it_is
from torch import nn
from torch.optim.swa_utils import update_bn

from mm_edge.arrays import Float64Array
from mm_edge.errors import UsageError
from mm_edge.graph.compact import mask_tensors, masked_model, materialise
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.graph.widths import allowed_widths
from mm_edge.quality.parity import compare, onnx_runner, require
from mm_edge.recover.closed_form.batchnorm import has_batch_norm, reestimate_batch_norm_
from mm_edge.recover.closed_form.consumers import Shift, read_consumers, read_product_path
from mm_edge.recover.closed_form.context import build_context
from mm_edge.recover.closed_form.judging import divergence
from mm_edge.recover.closed_form.moments import Moments
from mm_edge.recover.closed_form.sensitivity import (
    allocate,
    from_arrays,
    measure_sensitivities,
    select_by_sensitivity,
    to_arrays,
)
from mm_edge.recover.closed_form.solve import fit, screen
from mm_edge.recover.closed_form.structured import recover_closed_form


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def plain() -> Case:
    return Case("plain")


@pytest.mark.parametrize("select", ["signal", "obs", "auto"])
def test_masks_hold_and_compact_equals_masked(case: Case, select: str) -> None:
    found = recover_closed_form(case.context, case.keep, case.counts, select=select)
    masks = mask_tensors(case.structure, found.keep)
    assert set(masks) <= set(found.tensors)
    for name, mask in masks.items():
        assert not found.tensors[name][~mask.dense()].any(), name
    for leaf, kept in found.keep.items():
        assert kept.sum() == case.counts[leaf]
    compact = materialise(case.raw, case.structure, found.keep, found.tensors)
    reference = masked_model(case.raw, {}, found.tensors)
    require(compare(onnx_runner(compact), onnx_runner(reference), case.images[:4], "noise"), "recovered")


def test_tensors_fit_the_module(case: Case) -> None:
    found = recover_closed_form(case.context, case.keep, case.counts)
    state = case.module.state_dict()
    for name, array in found.tensors.items():
        assert tuple(state[name].shape) == array.shape
        assert array.dtype == np.float32


def test_recovery_beats_masking_and_the_walk_beats_screening_held_back(case: Case) -> None:
    masks = mask_tensors(case.structure, case.keep)
    pruned = RunnableGraph(masked_model(case.raw, masks))
    frontier = Frontier(case.context.graph, case.images, case.context.held_back)
    before = divergence(case.context, pruned, frontier)
    screened = recover_closed_form(case.context, case.keep, case.counts, select="signal", walked=False)
    walked = recover_closed_form(case.context, case.keep, case.counts, select="signal")
    assert walked.kl_held_back is not None and screened.kl_held_back is not None
    assert walked.kl_held_back <= screened.kl_held_back < before
    assert {leaf: kept.tolist() for leaf, kept in walked.keep.items()} == {
        leaf: kept.tolist() for leaf, kept in case.keep.items()
    }


def test_screening_one_selection_after_another_leaves_no_trace(case: Case) -> None:
    other = {leaf: kept[::-1].copy() for leaf, kept in case.keep.items()}
    expected = screen(build_context(case.raw, case.structure, case.images), other)
    screen(case.context, case.keep)
    found = screen(case.context, other)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6)


@pytest.mark.parametrize("walked", [False, True])
def test_the_held_back_divergence_is_that_of_what_was_fitted_without_those_images(case: Case, walked: bool) -> None:
    found = recover_closed_form(case.context, case.keep, case.counts, walked=walked)
    found_kl = kl_as_it_is(case.context, found.keep, found.fitted)
    assert found_kl == pytest.approx(found.kl_held_back, rel=1e-3, abs=1e-8)  # a scale of nearly one is not applied


def test_nothing_pruned_nothing_changes(plain: Case) -> None:
    found = recover_closed_form(plain.context, {}, {})
    assert found.tensors == {}
    assert found.kl_held_back == pytest.approx(0.0, abs=1e-9)


def test_a_duplicated_input_channel_is_recovered_exactly() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(12, 8), nn.Linear(8, 5)
    module = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).eval()
    with torch.no_grad():
        first.weight[7] = first.weight[2]
        first.bias[7] = first.bias[2]
    raw = export_raw(module, torch.zeros(1, 3, 2, 2))
    structure = read_structure(raw)
    images = np.random.default_rng(0).standard_normal((400, 3, 2, 2), dtype=np.float32)
    context = build_context(raw, structure, images)
    (group,) = structure.groups
    keep = np.ones(8, dtype=np.bool_)
    keep[7] = False
    tensors = screen(context, {group.leaf: keep}, {"3.weight": 1e-7})
    expected = second.weight.detach().numpy().copy()
    expected[:, 2] += expected[:, 7]
    expected[:, 7] = 0
    np.testing.assert_allclose(tensors["3.weight"], expected, atol=1e-4)
    np.testing.assert_allclose(tensors["3.bias"], second.bias.detach().numpy(), atol=1e-4)
    found = recover_closed_form(context, {}, {group.leaf: 7}, select="obs")
    assert not (found.keep[group.leaf][2] and found.keep[group.leaf][7])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (4, 2)])
def test_a_transposed_convolution_makes_up_for_a_channel_that_the_others_determine(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3)
    second = nn.ConvTranspose2d(6, 4, kernel, stride, padding=kernel // 2 - stride // 2)
    module = nn.Sequential(first, second).eval()
    with torch.no_grad():
        for tensor in (first.weight, first.bias):
            assert tensor is not None
            tensor[5] = 0.7 * tensor[1] - 1.2 * tensor[3]
    raw = export_raw(module, torch.zeros(1, 3, 9, 9))
    structure = read_structure(raw)
    context = build_context(raw, structure, np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32))
    (group,) = structure.groups
    keep = {group.leaf: np.arange(6) != 5}
    tensors = screen(context, keep, {"1.weight": 1e-6})
    expected = second.weight.detach().numpy().copy()
    expected[1] += 0.7 * expected[5]
    expected[3] -= 1.2 * expected[5]
    expected[5] = 0
    np.testing.assert_allclose(tensors["1.weight"], expected, atol=1e-3)
    assert second.bias is not None
    np.testing.assert_allclose(tensors["1.bias"], second.bias.detach().numpy(), atol=1e-3)
    found = recover_closed_form(context, keep, {group.leaf: 5}, select="signal")
    assert found.kl_held_back is not None and found.kl_held_back < 1e-4


@pytest.mark.parametrize("ridge", [0.01, 0.3, np.inf])
def test_the_ridge_pulls_to_the_dense_weights(ridge: float) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((1, 4, 6))
    inputs = generator.standard_normal((200, 6)) + 1.0
    outputs = inputs @ weight[0].T
    moments = _moments(inputs, outputs)
    solved, shift = fit(weight, moments, ridge)
    np.testing.assert_allclose(solved, weight, atol=1e-12)
    np.testing.assert_allclose(shift, 0, atol=1e-12)


def test_an_infinite_ridge_moves_the_mean_only() -> None:
    generator = np.random.default_rng(0)
    weight, inputs = generator.standard_normal((1, 2, 3)), generator.standard_normal((50, 3))
    outputs = inputs @ weight[0].T + np.array([1.0, -2.0])
    solved, shift = fit(weight, _moments(inputs, outputs), np.inf)
    np.testing.assert_array_equal(solved, weight)
    np.testing.assert_allclose(shift[0], [1.0, -2.0])


def _moments(inputs: Float64Array, outputs: Float64Array) -> Moments:
    h, y = inputs - inputs.mean(0), outputs - outputs.mean(0)
    covariance, cross = ((part / len(h))[None] for part in (h.T @ h, h.T @ y))
    return Moments(inputs.mean(0)[None], covariance, cross, outputs.mean(0)[None], outputs.var(0)[None])


@pytest.mark.parametrize("ridge", [0.01, np.inf])
def test_outputs_are_given_back_their_spread_and_keep_their_mean(ridge: float) -> None:
    """The wanted output is half predictable: solved it spreads too little, restored as it should; the mean holds."""
    generator = np.random.default_rng(0)
    weight, inputs = generator.standard_normal((1, 2, 3)), generator.standard_normal((4000, 3)) + 1.0
    outputs = inputs @ weight[0].T + np.sqrt((weight[0] ** 2).sum(axis=1)) * generator.standard_normal((4000, 2)) + 5.0
    moments = _moments(inputs, outputs)
    for share, expected in ((0.0, 0.5), (0.5, 0.5**0.5), (1.0, 1.0)):
        solved, shift = fit(weight, moments, ridge, share)
        found = inputs @ solved[0].T + shift[0]
        np.testing.assert_allclose(found.var(axis=0) / outputs.var(axis=0), expected, rtol=0.05)
        np.testing.assert_allclose(found.mean(axis=0), outputs.mean(axis=0), rtol=1e-9)


def test_the_gain_is_bounded() -> None:
    generator = np.random.default_rng(0)
    weight, inputs = np.full((1, 1, 3), 1e-6), generator.standard_normal((100, 3))
    solved, _ = fit(weight, _moments(inputs, 10 * inputs[:, :1]), np.inf, 1.0)
    np.testing.assert_allclose(solved, 2 * weight)


def test_products_are_followed_to_the_residual_addition(plain: Case) -> None:
    graph = plain.context.graph
    by_weight = {item.weight: item for item in read_consumers(plain.raw, graph)}
    path = read_product_path(graph, by_weight["conv3.weight"])
    assert path.skip is not None and isinstance(plain.module, Plain)
    bn = plain.module.bn3
    assert bn.running_mean is not None and bn.running_var is not None
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    np.testing.assert_allclose(path.scale, scale, rtol=1e-5)
    np.testing.assert_allclose(path.offset, (bn.bias - bn.running_mean * scale).detach(), rtol=1e-5, atol=1e-6)
    assert read_product_path(graph, by_weight["conv2.weight"]).skip is None
    assert by_weight["conv3.weight"].shift == Shift("bn3.running_mean", -1.0)
    assert by_weight["head.weight"].shift == Shift("head.bias", 1.0)


def test_batch_norm_is_re_estimated_as_torch_does() -> None:
    batches = torch.randn(4, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours, torchs = Case("plain").module, Case("plain").module
    assert has_batch_norm(ours) and not has_batch_norm(nn.Linear(2, 2))
    reestimate_batch_norm_(ours, [*batches, batches[0, :1]])  # one image alone is left out
    update_bn(batches, torchs)
    for name, tensor in torchs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_dropout_is_off_while_batch_norm_is_re_estimated() -> None:
    batches = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    norm, alone = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    reestimate_batch_norm_(nn.Sequential(nn.Dropout(0.5), norm), batches)
    reestimate_batch_norm_(alone, batches)
    for name, tensor in alone.state_dict().items():
        np.testing.assert_array_equal(norm.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_an_unknown_selection_is_refused(plain: Case) -> None:
    with pytest.raises(UsageError, match="unknown selection 'best'; allowed: signal, obs, auto"):
        recover_closed_form(plain.context, plain.keep, plain.counts, select="best")


@pytest.mark.slow
def test_allocation_meets_the_budget_with_the_measured_costs(case: Case) -> None:
    allowed = [allowed_widths(group, 1) for group in case.structure.groups]
    measured = measure_sensitivities(case.context, allowed)
    assert measured
    for item in measured.values():
        size = len(item.surgeon.removed)
        assert item.kl(size) == 0
        for point in item.points:
            assert item.kl(point.count) == pytest.approx(max(point.kl, 1e-6), rel=1e-6)
    for fraction in (0.9, 0.7):
        counts = allocate(case.structure.mac_cost, measured, fraction * case.structure.macs(), allowed)
        macs = case.structure.macs({leaf: float(count) for leaf, count in counts.items()})
        assert macs <= fraction * case.structure.macs()
        for leaf, kept in select_by_sensitivity(measured, counts).items():
            assert kept.sum() == counts[leaf]
    stored = from_arrays(case.structure, to_arrays(case.structure, measured))
    assert list(stored) == list(measured)
    assert allocate(case.structure.mac_cost, stored, 0.7 * case.structure.macs(), allowed) == counts
    first, again = select_by_sensitivity(measured, counts), select_by_sensitivity(stored, counts)
    assert all(np.array_equal(mask, again[leaf]) for leaf, mask in first.items())
    assert [item.points for item in stored.values()] == [item.points for item in measured.values()]
