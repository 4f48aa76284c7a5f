"""LayerNormalization that loses channels still agrees with the masked model, which normalises over all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mm_edge.graph.compact import mask_tensors, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.reading import NormEdit
from mm_edge.quality.parity import compare, onnx_runner, torch_runner


class Block(nn.Module):
    """A residual stream of 24 channels with a norm before a hidden layer of 40, as in a transformer's second half."""

    def __init__(self, bias: bool, eps: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, stride=4)
        self.norm = nn.LayerNorm(24, eps=eps, bias=bias)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.last = nn.LayerNorm(24, eps=eps, bias=bias)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        result: torch.Tensor = self.head(self.last(x).mean(1))
        return result


def build(bias: bool, eps: float) -> Block:
    torch.manual_seed(0)
    net = Block(bias, eps).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def drop_half(structure: Structure) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(0)
    keep = {}
    for group in structure.groups:
        kept = np.zeros(group.size, dtype=np.bool_)
        kept[generator.permutation(group.size)[: group.size // 2]] = True
        keep[group.leaf] = kept
    return keep


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_pruned_stream_agrees_with_the_masked_module(bias: bool, eps: float) -> None:
    net = build(bias, eps)
    x = torch.randn(4, 3, 8, 8)
    raw = export_raw(net, x[:1])
    structure = read_structure(raw, prune_norms=True)
    assert sorted(group.size for group in structure.groups) == [24, 40]
    keep = drop_half(structure)
    compact = deploy(materialise(raw, structure, keep))
    with torch.no_grad():
        for name, mask in mask_tensors(structure, keep).items():
            net.get_parameter(name).mul_(torch.from_numpy(mask.dense()))
    assert compare(onnx_runner(compact), torch_runner(net), x.numpy(), "noise").max_rel_err < 1e-5


def test_averaging_over_the_kept_channels_alone_would_be_wrong() -> None:
    """What the restored node does matters: without it the same masks give another answer."""
    net = build(True, 1e-5)
    x = torch.randn(4, 3, 8, 8)
    raw = export_raw(net, x[:1])
    structure = read_structure(raw, prune_norms=True)
    keep = drop_half(structure)
    compact = materialise(raw, structure, keep)
    others = tuple(edit for edit in structure.edits if not isinstance(edit, NormEdit))
    assert len(others) == len(structure.edits) - 2
    plain = materialise(raw, replace(structure, edits=others), keep)
    error = compare(onnx_runner(plain), onnx_runner(compact), x.numpy(), "noise").max_rel_err
    assert error > 1e-2


def test_without_the_mode_the_norm_pins_its_channels() -> None:
    structure = read_structure(export_raw(build(True, 1e-5), torch.zeros(1, 3, 8, 8)))
    assert [group.size for group in structure.groups] == [40]
    assert "LayerNormalization averages over this axis" in {item.reason for item in structure.pinned}
