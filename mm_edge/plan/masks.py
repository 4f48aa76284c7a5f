"""Masks on single weights: in every layer the lowest scores are pruned, exactly as many as the sparsity asks for.

    pruned(l) = floor(rho(l) n(l) + 1/2),  lowest scores first, ties by index

A layer's scores are sorted once per signal (`rank_scores`); each strategy then costs one comparison with the
threshold, so ten strategies cost little more than one. Masks are nested: a higher sparsity prunes a superset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mm_edge.arrays import BoolArray, Float32Array
from mm_edge.errors import JobError
from mm_edge.records import Assignment, Layer


@dataclass(frozen=True)
class Ranking:
    """One layer's scores (the weight's shape) and the same values flat in ascending order."""

    score: Float32Array
    ascending: Float32Array


def rank(score: Float32Array) -> Ranking:
    """Sort one layer's scores."""
    return Ranking(score, np.sort(score, axis=None))


def rank_scores(layers: Iterable[Layer], scores: Mapping[str, Float32Array]) -> dict[str, Ranking]:
    """Sort one signal's scores of all `layers`, once for all strategies.

    Raises:
        JobError: a layer has no score; it must not stay dense in silence.
    """
    rankings = {}
    for layer in layers:
        if layer.fqn not in scores:
            raise JobError(f"layer '{layer.fqn}' has no score, so no mask can be made for it")
        rankings[layer.fqn] = rank(scores[layer.fqn])
    return rankings


def build_mask(ranking: Ranking, sparsity: float) -> BoolArray:
    """Return the mask (the weight's shape, True keeps) that prunes the lowest `sparsity` share, half rounded up."""
    pruned = min(math.floor(sparsity * ranking.ascending.size + 0.5), ranking.ascending.size)
    if pruned == 0:
        return np.ones(ranking.score.shape, dtype=np.bool_)
    threshold = ranking.ascending[pruned - 1]
    mask: BoolArray = np.asarray(ranking.score > threshold)
    equal = int(np.searchsorted(ranking.ascending, threshold, side="right")) - pruned
    if equal:
        ties = np.flatnonzero(ranking.score == threshold)
        mask.reshape(-1)[ties[len(ties) - equal :]] = True
    return mask


def build_masks(rankings: Mapping[str, Ranking], assignment: Assignment) -> dict[str, BoolArray]:
    """Return the mask of every layer in `assignment`, by fqn."""
    return {fqn: build_mask(rankings[fqn], sparsity) for fqn, sparsity in assignment.sparsity.items()}


@dataclass(frozen=True)
class BoundMasks:
    """Masks on the parameters of one module, on its device: cheap to apply after every step."""

    pairs: tuple[tuple[nn.Parameter, torch.Tensor], ...]

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights in place."""
        for parameter, pruned in self.pairs:
            # Not a product: a pruned weight that became infinite would leave NaN.
            parameter.masked_fill_(pruned, 0.0)


def bind_masks(module: nn.Module, masks: Mapping[str, BoolArray]) -> BoundMasks:
    """Return `masks` bound to the parameters of `module` they name.

    Raises:
        JobError: the module has no parameter of a mask's name and shape.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for fqn, mask in masks.items():
        if fqn not in parameters or tuple(parameters[fqn].shape) != mask.shape:
            raise JobError(f"mask '{fqn}' of shape {mask.shape} fits no parameter of the module")
    bound = [(parameters[fqn], torch.from_numpy(~mask).to(parameters[fqn].device)) for fqn, mask in masks.items()]
    return BoundMasks(tuple(bound))


def measure_sparsity(weights: Mapping[str, Float32Array], layers: Sequence[Layer]) -> float:
    """Return zero weights over all weights of `layers`; 0 without layers."""
    total = sum(weights[layer.fqn].size for layer in layers)
    zeros = sum(weights[layer.fqn].size - int(np.count_nonzero(weights[layer.fqn])) for layer in layers)
    return zeros / total if total else 0.0
