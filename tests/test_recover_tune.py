"""Block-wise tuning on small networks: parts of a module run alone, masks hold, it is kept only where better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from recovery_cases import BUILDERS, Case, kl_as_it_is

from mm_edge.graph.compact import apply_mask, mask_tensors, masked_model, materialise
from mm_edge.parity import compare, onnx_runner, require
from mm_edge.recover import tune as module_under_test
from mm_edge.recover.traced import Traced
from mm_edge.recover.tune import adopt, crops, find_span, mirrored, tune


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 60, "CHECK": 20, "WARM_UP": 5, "CROPS": 96, "BATCH": 16}.items():
        monkeypatch.setattr(module_under_test, name, value)


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    """A network whose answers differ between images, so that pruning shows in them."""
    return Case(request.param)


def _masked(case: Case) -> dict[str, np.ndarray]:
    masks = mask_tensors(case.structure, case.keep)
    return {name: apply_mask(case.context.network.arrays[name], mask) for name, mask in masks.items()}


def _in_place() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


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
            found = traced.run(traced.state, cut, (traced.output,))[traced.output]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tuning_brings_masked_weights_nearer_to_dense_and_masks_hold(case: Case) -> None:
    start = _masked(case)
    found = tune(case.context, case.module, case.keep, start)
    assert found.better and found.kl_held_back < found.kl_before
    views = mirrored(case.context)
    assert kl_as_it_is(views, case.keep, found.tensors) == pytest.approx(found.kl_held_back, rel=1e-3)
    assert kl_as_it_is(views, case.keep, start) >= found.kl_before > 0
    assert found.note.startswith("tuned ")
    masks = mask_tensors(case.structure, case.keep)
    changed = [name for name, array in found.tensors.items() if not np.array_equal(array, start.get(name))]
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
    first = tune(case.context, case.module, case.keep, _masked(case), seed=3)

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    second = tune(case.context, case.module, case.keep, _masked(case), seed=3, progress=tell)
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name], array)
    assert told == [(done, 66) for done in range(1, 67)]  # six batches to cache, sixty steps


def test_what_is_no_better_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "RATE", 30.0)
    case = Case("plain")
    start = _masked(case)
    found = tune(case.context, case.module, case.keep, start)
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
            np.testing.assert_allclose(views.logits[row], expected, rtol=1e-3, atol=1e-4)


def test_what_was_tuned_elsewhere_is_taken_where_it_is_better_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain")
    start = _masked(case)
    tuned = tune(case.context, case.module, case.keep, start)
    assert tuned.better
    strange = {**tuned.tensors, "pos_embed": np.ones((1, 2), np.float32)}
    here = {**start, "pos_embed": np.ones((1, 3), np.float32)}
    found = adopt(case.context, case.context, case.keep, here, replace(tuned, tensors=strange))
    assert found.better and found.note.startswith(tuned.note)
    assert found.kl_held_back <= tuned.kl_held_back * 1.001 and found.kl_before == pytest.approx(tuned.kl_before)
    assert found.tensors["pos_embed"] is here["pos_embed"]
    monkeypatch.setattr(module_under_test, "SHARES", (0.5,))
    half = adopt(case.context, case.context, case.keep, here, tuned)
    assert half.better and half.note == f"{tuned.note}; taken over to this size, 50% of the way"
    moved = max(start, key=lambda name: float(abs(tuned.tensors[name] - start[name]).max()))
    assert not np.array_equal(tuned.tensors[moved], start[moved])
    np.testing.assert_allclose(half.tensors[moved], (start[moved] + tuned.tensors[moved]) / 2, atol=1e-6)
    worse = {name: 0 * array for name, array in tuned.tensors.items()}
    dropped = adopt(case.context, case.context, case.keep, here, replace(tuned, tensors=worse))
    assert (dropped.better, dropped.note) == (False, "tuning dropped: no better on held-back images")
    assert dropped.tensors is here and dropped.kl_held_back == dropped.kl_before
    not_tried = adopt(case.context, case.context, case.keep, here, replace(tuned, better=False, note="why"))
    assert (not_tried.better, not_tried.note) == (False, "why") and not_tried.tensors is here


def test_nothing_pruned_nothing_is_tuned() -> None:
    case = Case("plain")
    found = tune(case.context, case.module, {}, {})
    assert (found.better, found.note) == (False, "tuning dropped: no layer of its reach reads what was pruned")


def test_the_tail_is_frozen_and_the_start_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("depthwise")
    traced = Traced(case.module, (3, 16, 16), 2)
    keep = {group.leaf: case.keep[group.leaf] for group in case.structure.groups if "expand" in group.id}
    span = find_span(case.context, traced, keep)
    assert span is not None
    assert traced.size(span.targets[-1]) == 8 * 16 * 16
    assert traced.readers["bn.bias"][0] < span.start <= traced.readers["expand.weight"][0]
    found = tune(case.context, case.module, keep, {})
    assert not {"stem.weight", "bn.weight", "bn.bias"} & set(found.tensors)
    for name in {"head.weight", "head.bias"} & set(found.tensors):  # at most rescaled
        dense = case.module.state_dict()[name].numpy()
        scale = float((found.tensors[name] * dense).sum() / (dense * dense).sum())
        np.testing.assert_allclose(found.tensors[name], scale * dense, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(module_under_test, "CACHE_BYTES", 1)
    assert find_span(case.context, traced, keep) is None


def test_dear_early_maps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("depthwise")
    traced = Traced(case.module, (3, 16, 16), 2)
    assert traced.work(0, 2) == 2 * 8 * 16 * 16  # stem and its BatchNorm
    cheap = find_span(case.context, traced, case.keep)
    assert cheap is not None and cheap.start == traced.readers["stem.weight"][0]
    monkeypatch.setattr(module_under_test, "STEP_VALUES", traced.work(cheap.start, cheap.targets[-1]) - 1)
    monkeypatch.setattr(module_under_test, "STEP_SHARE", 0.0)
    later = find_span(case.context, traced, case.keep)
    assert later is not None and cheap.start < later.start < later.targets[-1] == cheap.targets[-1]
    assert traced.work(later.start, later.targets[-1]) <= module_under_test.STEP_VALUES
    monkeypatch.setattr(module_under_test, "STEP_SHARE", 1.0)
    assert find_span(case.context, traced, case.keep) == cheap


def test_crops_have_the_images_size_and_half_are_mixed() -> None:
    images = np.stack([np.full((3, 8, 8), value, dtype=np.float32) for value in range(4)])
    made = torch.cat(list(crops(images, 10, 4, torch.Generator().manual_seed(0))))
    assert made.shape == (10, 3, 8, 8)
    whole = [bool(torch.isclose(item, item.round(), atol=1e-4).all()) for item in made]
    assert all(whole[index] for index in (0, 2, 4, 6, 8))
    assert not all(whole)
