"""Block-wise tuning on small networks: parts of a module run alone, masks hold, only what is better is accepted."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from recovery_cases import BUILDERS, Case, kl_as_it_is

from mm_edge.arrays import Arrays
from mm_edge.graph.compact import apply_mask, mask_tensors, masked_model, materialise
from mm_edge.quality.parity import compare, onnx_runner, require
from mm_edge.recover.training import descent
from mm_edge.recover.training import tune as module_under_test
from mm_edge.recover.training.acceptance import mirrored
from mm_edge.recover.training.descent import crops
from mm_edge.recover.training.traced import Traced
from mm_edge.recover.training.tune import find_span, tune


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 60, "CHECK": 20}.items():
        monkeypatch.setattr(module_under_test, name, value)
    for name, value in {"WARM_UP": 5, "CROPS": 96, "BATCH": 16}.items():
        monkeypatch.setattr(descent, name, value)


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    """A network whose answers differ between images, so that pruning shows in them."""
    return Case(request.param)


def _masked(case: Case) -> Arrays:
    masks = mask_tensors(case.structure, case.keep)
    return {name: apply_mask(case.context.graph.arrays[name], mask) for name, mask in masks.items()}


def _in_place() -> torch.nn.Module:
    torch.manual_seed(0)
    network: torch.nn.Module = timm.create_model("test_resnet", num_classes=3)
    return network.eval()


@pytest.mark.parametrize("name", [*BUILDERS, "in place"])
def test_any_cut_leads_to_the_same_answer(name: str) -> None:
    torch.manual_seed(0)
    module = _in_place() if name == "in place" else BUILDERS[name]().eval()
    side = 32 if name == "in place" else 16
    traced = Traced(module, (3, side, side), 2)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(images)
        for position in filter(traced.can_cut, range(len(traced.nodes) + 1)):
            cut = traced.run(traced.state, {traced.input: images}, traced.live(position))
            assert sum(value.numel() for value in cut.values()) == 2 * traced.size(position)
            found = traced.run(traced.state, cut, traced.outputs)[traced.outputs[0]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tuning_brings_masked_weights_nearer_to_dense_and_masks_hold(case: Case) -> None:
    start = _masked(case)
    found = tune(case.context, case.keep, start)
    assert found.better and found.kl_held_back < found.kl_before
    views = mirrored(case.context)
    assert kl_as_it_is(views, case.keep, found.tensors) == pytest.approx(found.kl_held_back, rel=1e-3)
    assert kl_as_it_is(views, case.keep, start) >= found.kl_before > 0
    assert found.note.startswith("tuned ")
    masks = mask_tensors(case.structure, case.keep)
    changed = [name for name, array in found.tensors.items() if name not in start or (array != start[name]).any()]
    assert changed
    for name, mask in masks.items():
        assert not found.tensors[name][~mask.dense()].any(), name
        assert found.tensors[name].dtype == start[name].dtype
    compact = materialise(case.raw, case.structure, case.keep, found.tensors)
    reference = masked_model(case.raw, {}, found.tensors)
    require(compare(onnx_runner(compact), onnx_runner(reference), case.images[:4], "noise"), "tuned")


def test_the_same_seed_gives_the_same_weights() -> None:
    case = Case("plain")
    told: list[tuple[int, int]] = []
    first = tune(case.context, case.keep, _masked(case), seed=3)

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    second = tune(case.context, case.keep, _masked(case), seed=3, progress=tell)
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name], array)
    assert told == [(done, 66) for done in range(1, 67)]  # six batches to cache, sixty steps


def test_what_is_no_better_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "RATE", 30.0)
    case = Case("plain")
    start = _masked(case)
    found = tune(case.context, case.keep, start)
    assert not found.better
    assert found.tensors is start
    assert found.kl_held_back == found.kl_before
    assert found.note == "tuning dropped: no better on held-back images"


def test_what_judges_is_mirrored_and_answered_by_the_dense_network() -> None:
    case = Case("plain")
    views = mirrored(case.context)
    assert (len(views.images), views.fitted) == (len(case.context.held_back), ())
    with torch.no_grad():
        for row, number in enumerate(case.context.held_back):
            image = case.context.images[number][..., ::-1].copy()
            np.testing.assert_array_equal(views.images[row], image)
            expected = case.module(torch.from_numpy(image)[None])[0]
            np.testing.assert_allclose(views.answers[0][row, 0], expected, rtol=1e-3, atol=1e-4)


def test_nothing_pruned_nothing_is_tuned() -> None:
    case = Case("plain")
    found = tune(case.context, {}, {})
    assert (found.better, found.note) == (False, "tuning dropped: no layer of its reach reads what was pruned")


def test_the_tail_is_frozen_and_the_start_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("depthwise")
    traced = Traced(case.module, (3, 16, 16), 2)
    keep = {group.leaf: case.keep[group.leaf] for group in case.structure.groups if "expand" in group.id}
    span = find_span(case.context, traced, keep)
    assert span is not None
    assert traced.size(span.targets[-1]) == 8 * 16 * 16
    assert traced.readers["bn.bias"][0] < span.start <= traced.readers["expand.weight"][0]
    found = tune(case.context, keep, {})
    assert not {"stem.weight", "bn.weight", "bn.bias"} & set(found.tensors)
    for name in {"head.weight", "head.bias"} & set(found.tensors):  # at most rescaled
        dense = case.module.state_dict()[name].numpy()
        scale = float((found.tensors[name] * dense).sum() / (dense * dense).sum())
        np.testing.assert_allclose(found.tensors[name], scale * dense, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(descent, "CROP_CACHE_BYTES", 1)
    assert find_span(case.context, traced, keep) is None


def test_early_layers_with_large_maps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("depthwise")
    traced = Traced(case.module, (3, 16, 16), 2)
    assert traced.work(0, 2) == 2 * 8 * 16 * 16  # stem and its BatchNorm
    cheap = find_span(case.context, traced, case.keep)
    assert cheap is not None and cheap.start == traced.readers["stem.weight"][0]
    monkeypatch.setattr(descent, "STEP_VALUES", traced.work(cheap.start, cheap.targets[-1]) - 1)
    monkeypatch.setattr(descent, "STEP_SHARE", 0.0)
    later = find_span(case.context, traced, case.keep)
    assert later is not None and cheap.start < later.start < later.targets[-1] == cheap.targets[-1]
    assert traced.work(later.start, later.targets[-1]) <= descent.STEP_VALUES
    monkeypatch.setattr(descent, "STEP_SHARE", 1.0)
    assert find_span(case.context, traced, case.keep) == cheap


def test_crops_have_the_images_size_and_half_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "CROPS", 10)
    monkeypatch.setattr(descent, "BATCH", 4)
    images = np.stack([np.full((3, 8, 8), value, dtype=np.float32) for value in range(4)])
    smaller = np.ascontiguousarray(images[..., :6, :6])
    made = list(crops([images, smaller], torch.Generator().manual_seed(0), smallest=0.3, whole=0.2))
    assert [tuple(len(part) for part in batch) for batch in made] == [(4, 4), (4, 4), (2, 2)]
    large, small = (torch.cat([batch[size] for batch in made]) for size in (0, 1))
    assert large.shape == (10, 3, 8, 8) and small.shape == (10, 3, 6, 6)
    torch.testing.assert_close(large[..., :6, :6], small, rtol=0, atol=1e-4)  # the same picture at both sizes
    whole = [bool(torch.isclose(item, item.round(), atol=1e-4).all()) for item in large]
    assert all(whole[index] for index in (0, 2, 4, 6, 8))
    assert not all(whole)


def test_crops_at_another_size_show_the_same_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "CROPS", 8)
    monkeypatch.setattr(descent, "BATCH", 8)
    slope = np.linspace(0, 1, 32, dtype=np.float32)
    images = np.broadcast_to(slope, (2, 3, 32, 32)).copy()
    smaller = descent.resize_images(torch.from_numpy(images), (16, 16)).numpy()
    ((large, small),) = crops([images, smaller], torch.Generator().manual_seed(1), smallest=0.3, whole=0.0)
    spans = large[:, 0, 0].amax(dim=1) - large[:, 0, 0].amin(dim=1)
    assert float(spans.max()) < 1 and float(spans.max() - spans.min()) > 0.05  # parts, of several widths
    torch.testing.assert_close(descent.resize_images(large, (16, 16)), small, rtol=0, atol=0.03)
