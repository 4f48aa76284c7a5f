"""Arithmetic on weights alone is folded before masks are made, and the gain beside it stays a parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

from mm_edge.graph.compact import mask_tensors, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.quality.parity import compare, onnx_runner, torch_runner


def net(kind: type[nn.Conv2d]) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        kind(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        kind(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layers.eval()


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardised_convolutions_lose_channels_exactly(kind: type[nn.Conv2d]) -> None:
    module = net(kind)
    x = torch.randn(4, 3, 8, 8)
    raw = export_raw(module, x[:1])
    assert raw.folded == {"0.weight", "3.weight"}
    assert not raw.folded & raw.parameters
    layers = {layer.fqn: layer.shape for layer in read_layers(raw)}
    assert layers["0.weight"] == (16, 3, 3, 3) and layers["3.weight"] == (12, 16, 3, 3)
    structure = read_structure(raw)
    assert sorted(group.size for group in structure.groups) == [12, 16]
    keep = {group.leaf: np.arange(group.size) % 2 == 0 for group in structure.groups}
    compact = deploy(materialise(raw, structure, keep))
    masks = mask_tensors(structure, keep)
    assert not set(masks) & raw.folded
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(torch.from_numpy(mask.dense()))
    assert compare(onnx_runner(compact), torch_runner(module), x.numpy(), "noise").max_rel_err < 1e-5


def test_the_folded_weight_is_the_standardised_one() -> None:
    module = net(StdConv2d)
    raw = export_raw(module, torch.zeros(1, 3, 8, 8))
    tensor = raw.model.graph.initializers["0.weight"].const_value
    assert tensor is not None
    folded = tensor.numpy()
    flat = module.get_parameter("0.weight").detach().reshape(16, -1)
    eps = module.get_submodule("0").eps
    assert isinstance(eps, float)
    wanted = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, unbiased=False) + eps).sqrt()
    np.testing.assert_allclose(folded.reshape(16, -1), wanted.numpy(), atol=1e-5)


def test_gathered_tables_are_left_alone() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 6))
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(x) + self.table[[4]].reshape(1, 6, 1, 1)
            return result

    raw = export_raw(Biased().eval(), torch.zeros(1, 3, 4, 4))
    assert "table" in raw.parameters and not raw.folded


def test_a_projection_of_constant_queries_and_of_keys_loses_the_same_columns_from_both() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 5, 16))
            self.conv = nn.Conv2d(3, 16, 1)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            found: torch.Tensor = self.attention(self.queries, tokens, tokens, need_weights=False)[0]
            return found

    torch.manual_seed(0)
    module = Attending().eval()
    x = torch.randn(2, 3, 4, 4)
    raw = export_raw(module, x[:1])
    structure = read_structure(raw)
    (tokens,) = (group for group in structure.groups if "conv.weight" in group.tensors)
    assert {"queries", "attention.in_proj_weight"} <= set(tokens.tensors)
    keep = {tokens.leaf: np.arange(16) % 4 != 1}
    compact = onnx_runner(deploy(materialise(raw, structure, keep)))
    with torch.no_grad():
        for name, mask in mask_tensors(structure, keep).items():
            module.get_parameter(name).mul_(torch.from_numpy(mask.dense()))
    assert compare(compact, torch_runner(module), x.numpy(), "noise").max_rel_err < 1e-5
