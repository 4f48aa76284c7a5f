"""Tuning for a smaller input: tuned at the given size, taken over, then distilled from larger pictures."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from recovery_cases import BUILDERS, Case, kl_as_it_is
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mm_edge.arrays import Arrays
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import apply_mask, mask_tensors, masked_model, materialise
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.quality.parity import compare, onnx_runner, require
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.training import acceptance, adapt, descent
from mm_edge.recover.training import distil as distilling
from mm_edge.recover.training import tune as tuning
from mm_edge.recover.training.acceptance import Tuned, mirrored, resized
from mm_edge.recover.training.adapt import adopt, tune_for
from mm_edge.recover.training.distil import distil
from mm_edge.recover.training.tune import tune

pytestmark = pytest.mark.slow

SMALL = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 60)
    monkeypatch.setattr(tuning, "CHECK", 20)
    # Random weights bear, and need, other rates than trained ones.
    monkeypatch.setattr(distilling, "STEPS", 80)
    monkeypatch.setattr(distilling, "RATE", 1e-2)
    for name, value in {"WARM_UP": 5, "CROPS": 96, "BATCH": 16}.items():
        monkeypatch.setattr(descent, name, value)


def _smaller(case: Case) -> tuple[RecoveryContext, Keep]:
    """Return the network of `case` on smaller pictures, and what it keeps there."""
    module = copy.deepcopy(case.module)
    if isinstance(module, VisionTransformer):
        module.set_input_size(img_size=(SMALL, SMALL))  # resamples the position table
    raw = export_raw(module, torch.zeros(1, 3, SMALL, SMALL))
    structure = read_structure(raw)
    images = descent.resize_images(torch.from_numpy(case.images), (SMALL, SMALL)).numpy()
    context = build_context(raw, structure, images, module=module)
    kept = {group.id: case.keep[group.leaf] for group in case.structure.groups}
    # The candidate is compared with the dense network at the size it was given at.
    own = replace(context, answers=case.context.answers)
    return own, {group.leaf: kept[group.id] for group in structure.groups}


def _masked(context: RecoveryContext, keep: Keep) -> Arrays:
    masks = mask_tensors(context.structure, keep)
    return {name: apply_mask(context.graph.arrays[name], mask) for name, mask in masks.items()}


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize("pruned", [True, False])
def test_answers_to_larger_pictures_are_learnt(name: str, pruned: bool) -> None:
    case = Case(name)
    own, keep = _smaller(case)
    keep = keep if pruned else {leaf: np.ones_like(kept) for leaf, kept in keep.items()}
    start = _masked(own, keep)
    told: list[tuple[int, int]] = []
    found = distil(own, case.context, keep, start, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 86) for done in range(1, 87)]  # six batches to cache, eighty steps
    assert found.better and found.kl_held_back < found.kl_before
    assert found.note.startswith("distilled 80 steps from larger pictures")
    views = resized(mirrored(case.context), own)
    assert kl_as_it_is(views, keep, found.tensors) == pytest.approx(found.kl_held_back, rel=1e-3)
    for name, mask in mask_tensors(own.structure, keep).items():
        assert not found.tensors[name][~mask.dense()].any(), name
    compact = materialise(own.raw, own.structure, keep, found.tensors)
    reference = masked_model(own.raw, {}, found.tensors)
    require(compare(onnx_runner(compact), onnx_runner(reference), own.images[:4], "noise"), "distilled")


def test_the_same_seed_gives_the_same_weights() -> None:
    case = Case("plain")
    own, keep = _smaller(case)
    first, second = (distil(own, case.context, keep, _masked(own, keep), seed=3) for _ in range(2))
    assert first.better
    for name, array in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[name], array)


def test_what_is_no_better_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "RATE", 30.0)
    case = Case("plain")
    own, keep = _smaller(case)
    start = _masked(own, keep)
    found = distil(own, case.context, keep, start)
    assert (found.better, found.note) == (False, "distilling dropped: no better on held-back images")
    assert found.tensors is start and found.kl_held_back == found.kl_before


class _Unpooled(nn.Module):
    """Classes at every position of the map, averaged: what the last layer reads has another shape at another size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.stem(x).relu()).mean((2, 3))
        return found


def test_what_differs_in_shape_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "unpooled", _Unpooled)
    case = Case("unpooled")
    own, keep = _smaller(case)
    found = distil(own, case.context, keep, _masked(own, keep))
    assert found.better


@pytest.mark.parametrize("name", ["plain", "vit"])
def test_a_candidate_is_tuned_at_the_given_size_then_distilled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name)
    own, keep = _smaller(case)
    start = _masked(own, keep)
    told: list[tuple[int, int]] = []
    found = tune_for(own, case.context, keep, start, progress=lambda done, total: told.append((done, total)))
    first, second = found.note.split("; taken over")
    assert first.startswith("tuned ") and "; distilled 80 steps from larger pictures" in second
    assert told[-1][0] == told[-1][1] and [done for done, _ in told] == sorted(done for done, _ in told)
    monkeypatch.setattr(adapt, "tune", lambda *args, **more: Tuned({}, 1.0, 1.0, False, "not tuned"))
    taught = tune_for(own, case.context, keep, start)
    assert taught.better and taught.note.startswith("not tuned; distilled 80 steps")
    monkeypatch.setattr(distilling, "RATE", 30.0)
    neither = tune_for(own, case.context, keep, start)
    assert (neither.better, neither.note) == (False, "not tuned; distilling dropped: no better on held-back images")
    assert neither.tensors is start


def test_a_whole_network_is_distilled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(adapt, "tune")
    case = Case("plain")
    own, keep = _smaller(case)
    whole = {leaf: np.ones_like(kept) for leaf, kept in keep.items()}
    found = tune_for(own, case.context, whole, {})
    assert found.better and found.note.startswith("distilled 80 steps")


def test_at_the_given_size_nothing_is_distilled() -> None:
    case = Case("plain")
    found = tune_for(case.context, case.context, case.keep, _masked(case.context, case.keep))
    assert found.better and "distilled" not in found.note


def test_without_a_module_nothing_can_be_trained() -> None:
    context = replace(Case("plain").context, module=None)
    with pytest.raises(ValueError, match="training needs the dense module: pass it to build_context as module="):
        tune_for(context, context, {}, {})


def test_what_was_tuned_is_taken_over_where_it_is_better_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("plain")
    start = _masked(case.context, case.keep)
    tuned = tune(case.context, case.keep, start)
    assert tuned.better
    strange = {**tuned.tensors, "pos_embed": np.ones((1, 2), np.float32)}
    here = {**start, "pos_embed": np.ones((1, 3), np.float32)}
    found = adopt(case.context, case.context, case.keep, here, replace(tuned, tensors=strange))
    assert found.better and found.note.startswith(tuned.note)
    assert found.kl_held_back <= tuned.kl_held_back * 1.001 and found.kl_before == pytest.approx(tuned.kl_before)
    assert found.tensors["pos_embed"] is here["pos_embed"]
    monkeypatch.setattr(acceptance, "SHARES", (0.5,))
    half = adopt(case.context, case.context, case.keep, here, tuned)
    assert half.better and half.note == f"{tuned.note}; taken over, 50% of the way"
    moved = max(start, key=lambda name: float(abs(tuned.tensors[name] - start[name]).max()))
    assert not np.array_equal(tuned.tensors[moved], start[moved])
    np.testing.assert_allclose(half.tensors[moved], (start[moved] + tuned.tensors[moved]) / 2, atol=1e-6)
    worse = {name: 0 * array for name, array in tuned.tensors.items()}
    dropped = adopt(case.context, case.context, case.keep, here, replace(tuned, tensors=worse))
    assert (dropped.better, dropped.note) == (False, "tuning dropped: no better on held-back images")
    assert dropped.tensors is here and dropped.kl_held_back == dropped.kl_before
    not_tried = adopt(case.context, case.context, case.keep, here, replace(tuned, better=False, note="why"))
    assert (not_tried.better, not_tried.note) == (False, "why") and not_tried.tensors is here
