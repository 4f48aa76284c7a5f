"""A dense network and a pruned one run side by side: the smaller pruned network has the masked network's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recovery_cases import BUILDERS, Case

from mm_edge.arrays import Arrays
from mm_edge.graph.compact import apply_mask, mask_tensors
from mm_edge.recover.training import pair as module_under_test
from mm_edge.recover.training.pair import Pair, make_pair
from mm_edge.recover.training.shrink import Shrunk
from mm_edge.recover.training.traced import Traced


@pytest.fixture(scope="module", params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def _masked(case: Case, dense: Traced) -> Arrays:
    masks = mask_tensors(case.structure, case.keep)
    return {name: apply_mask(value.numpy(), masks.get(name)) for name, value in dense.state.items()}


def _pair(case: Case) -> tuple[Pair, Arrays]:
    dense = Traced(case.module, (3, 16, 16), 4)
    cuts = [at for at in range(1, len(dense.nodes) + 1) if len(dense.live(at)) == 1 and dense.can_cut(at)]
    values = tuple(dict.fromkeys(name for at in cuts for name in dense.live(at)))
    assert len(values) > 3
    masked = _masked(case, dense)
    return make_pair(case.context, dense, case.keep, masked, values), masked


@torch.no_grad()
def test_the_pruned_network_has_the_masked_networks_values(case: Case) -> None:
    pair, masked = _pair(case)
    assert pair.shrunk.kept
    smaller = [name for name in pair.pruned.state if pair.pruned.state[name].shape != pair.dense.state[name].shape]
    assert smaller and set(smaller) <= set(pair.shrunk.kept)
    images = torch.from_numpy(case.images[:4])
    state = {name: torch.from_numpy(np.array(array)) for name, array in masked.items()}
    names = tuple(pair.channels) or pair.dense.outputs
    wanted = pair.dense.run(state, {pair.dense.input: images}, (*names, *pair.dense.outputs))
    found = pair.pruned.run(pair.pruned.state, {pair.pruned.input: images}, (*names, *pair.dense.outputs))
    for name in found:
        torch.testing.assert_close(found[name], pair.counterpart(name, wanted[name]), rtol=1e-3, atol=1e-4)


def test_a_narrower_stream_is_compared_with_the_channels_it_kept() -> None:
    case = Case("plain")
    pair, _ = _pair(case)
    (stream,) = [group for group in case.structure.groups if "conv1" in group.id]
    axis, indices = pair.channels["add"]
    assert axis == 1
    assert indices.tolist() == np.flatnonzero(case.keep[stream.leaf]).tolist()


def test_without_smaller_shapes_the_pruned_network_is_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain")
    monkeypatch.setattr(module_under_test, "_find_indices", lambda *_: None)
    pair, masked = _pair(case)
    assert (pair.shrunk, pair.channels) == (Shrunk(), {})
    for name, array in masked.items():
        np.testing.assert_array_equal(pair.pruned.state[name].numpy(), array)
