"""Small networks with what recovering them needs: graph, structure, context, and indices to keep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.quality.divergences import kl_per_image
from mm_edge.recover.closed_form.context import RecoveryContext, answers, build_context


class Plain(nn.Module):
    """Convolutions with BatchNorm, a residual block, a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(self.bn(self.stem(x)).relu())).relu()
        x = x + self.bn3(self.conv3(self.bn2(self.conv2(x)).relu()))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Depthwise(nn.Module):
    """Inverted residual blocks with a ReLU6, as in mobile networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.dw, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.project, self.bn3 = nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        act = nn.functional.relu6
        x = self.bn(self.stem(x))
        x = x + self.bn3(self.project(act(self.bn2(self.dw(act(self.bn1(self.expand(x))))))))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Grouped(nn.Module):
    """A grouped convolution between 1x1 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu().mean((2, 3)))
        return found


def small_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    network: nn.Module = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10
    )
    return network


def _scrambled(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and LayerNorm weights of their own, as training would."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.copy_(0.2 * torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(0.2 + torch.rand(part.num_features, generator=generator))
            part.weight.data.copy_(0.5 + torch.rand(part.num_features, generator=generator))
            part.bias.data.copy_(0.3 * torch.randn(part.num_features, generator=generator))
    return module.eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "vit": small_vit,
}


class Case:
    """One of the BUILDERS with random images, and three quarters of every group's indices to keep."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.module = _scrambled(BUILDERS[name]())
        self.images = np.random.default_rng(0).standard_normal((60, 3, 16, 16), dtype=np.float32)
        self.raw: RawGraph = export_raw(self.module, torch.zeros(1, 3, 16, 16))
        self.structure: Structure = read_structure(self.raw)
        self.context: RecoveryContext = build_context(self.raw, self.structure, self.images, module=self.module)
        self.counts = {group.leaf: max(1, (3 * group.size) // 4) for group in self.structure.groups}
        self.keep: dict[Axis, BoolArray] = {}
        for group in self.structure.groups:
            mask = np.ones(group.size, dtype=np.bool_)
            mask[np.random.default_rng(group.size).permutation(group.size)[self.counts[group.leaf] :]] = False
            self.keep[group.leaf] = mask


def kl_as_it_is(context: RecoveryContext, keep: Keep, tensors: Arrays) -> float:
    """Return KL(dense || network) on held-back images of the network as it would be written, its answers not scaled."""
    graph = RunnableGraph(materialise(context.raw, context.structure, keep, tensors))
    held = Frontier(graph, context.images, context.held_back)
    (found,) = answers(graph, context.judged, held, context.held_back)
    return float(kl_per_image(context.answers[0], found).mean())
