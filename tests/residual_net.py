"""A small network of residual blocks whose norms, biases and layer scales matter."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """x + conv(relu(norm(conv(x)))), 3x3 and padded, so that a constant inside would show at the borders."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)
        self.narrow = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.narrow(torch.relu(self.norm(self.wide(x))))
        return result


class Residual(nn.Module):
    """A stem, two residual blocks with a down-sampling convolution between them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = Block(8, 12)
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.second = Block(16, 20)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.down(self.first(self.stem(images)))))
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


def randomise_(module: nn.Module) -> None:
    """Give norms, biases and layer scales values that matter."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            around_one = "var" in name or "weight" in name or "gamma" in name
            tensor.uniform_(*((0.5, 1.5) if around_one else (-0.3, 0.3)), generator=generator)
