"""Phase 3 by hand, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mm_edge.errors import JobError
from mm_edge.plan.masks import bind_masks, build_mask, build_masks, measure_sparsity, rank, rank_scores
from mm_edge.records import Assignment, Layer

scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 10, width=32), min_size=1, max_size=60)


def array(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def slow_mask(score: np.ndarray, pruned: int) -> np.ndarray:
    mask = np.ones(score.size, dtype=bool)
    mask[np.argsort(score.ravel(), kind="stable")[:pruned]] = False
    return mask.reshape(score.shape)


def test_lowest_go_and_ties_go_by_index() -> None:
    score = array([3, 1, 2, 1, 1, 5]).reshape(2, 3)
    ranking = rank(score)
    assert build_mask(ranking, 0.0).all() and not build_mask(ranking, 1.0).any()
    assert build_mask(ranking, 2 / 6).tolist() == [[True, False, True], [False, True, True]]
    assert build_mask(ranking, 4 / 6).tolist() == [[True, False, False], [False, False, True]]
    assert build_mask(ranking, 0.25).sum() == 4  # 1.5 weights: half rounds up
    assert build_mask(ranking, 0.24).sum() == 5


@given(scores, st.floats(0, 1))
def test_exact_count_and_the_same_as_a_stable_sort(values: list[float], sparsity: float) -> None:
    score = array(values)
    mask = build_mask(rank(score), sparsity)
    pruned = score.size - int(mask.sum())
    assert abs(pruned - sparsity * score.size) <= 0.5 + 1e-9
    assert np.array_equal(mask, slow_mask(score, pruned))
    assert np.array_equal(mask, build_mask(rank(score.copy()), sparsity))


@given(scores, st.floats(0, 1), st.floats(0, 1))
def test_masks_are_nested(values: list[float], one: float, other: float) -> None:
    ranking = rank(array(values))
    sparse, dense = build_mask(ranking, max(one, other)), build_mask(ranking, min(one, other))
    assert not (sparse & ~dense).any()


def network() -> tuple[nn.Module, list[Layer], dict[str, np.ndarray]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    parameters = {fqn: p.detach().numpy() for fqn, p in module.named_parameters() if p.ndim > 1}
    layers = [Layer(fqn, "conv", "conv", w.shape, i, 0, 1) for i, (fqn, w) in enumerate(parameters.items())]
    return module, layers, parameters


def test_from_scores_to_a_masked_module() -> None:
    module, layers, weights = network()
    bias = module.get_parameter("0.bias").detach().clone()
    rankings = rank_scores(layers, {fqn: np.abs(w) for fqn, w in weights.items()})
    masks = build_masks(rankings, Assignment("magnitude", ("balanced",), {"0.weight": 0.5, "2.weight": 0.25}))
    bind_masks(module, masks).apply_()
    assert [int((~masks[layer.fqn]).sum()) for layer in layers] == [108, 20]
    assert measure_sparsity(weights, layers) == pytest.approx(128 / 296)
    assert measure_sparsity(weights, layers[1:]) == 0.25 and measure_sparsity(weights, []) == 0.0
    assert torch.equal(module.get_parameter("0.bias"), bias)


def test_pruned_weights_become_zero_whatever_they_were() -> None:
    module, _, _ = network()
    with torch.no_grad():
        module.get_parameter("2.weight")[0, 0] = float("inf")
    mask = np.ones((10, 8), dtype=bool)
    mask[0, 0] = False
    bind_masks(module, {"2.weight": mask}).apply_()
    assert module.get_parameter("2.weight")[0, 0].item() == 0.0


def test_errors() -> None:
    module, layers, _ = network()
    with pytest.raises(JobError) as missing:
        rank_scores(layers, {})
    assert str(missing.value) == "layer '0.weight' has no score, so no mask can be made for it"
    with pytest.raises(JobError) as misfit:
        bind_masks(module, {"2.weight": np.ones((2, 2), dtype=bool)})
    assert str(misfit.value) == "mask '2.weight' of shape (2, 2) fits no parameter of the module"
