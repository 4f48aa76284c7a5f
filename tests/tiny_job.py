"""A small network and images for tests of the whole job: quick to export, labels that can be learnt from the colour."""

from __future__ import annotations

from pathlib import Path

import mm_edge  # noqa: F401  before timm, which it makes importable beside CPU-only torch

# isort: split
import numpy as np
import timm
import torch
from PIL import Image

CLASSES = 3
SIDE = 32


def save_checkpoint(path: Path, **changes: object) -> Path:
    """Save a timm checkpoint of a small ResNet with randomised norms, so that masks matter; `changes` replace parts."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict(), **changes}, path)
    return path


def write_images(folder: Path, per_class: int = 16, classes: int = CLASSES) -> Path:
    """Write `per_class` images of each class, told apart by their colour."""
    generator = np.random.default_rng(0)
    for index in range(classes):
        (folder / f"class{index}").mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 150, (40, 40, 3))
            pixels[..., index % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{index}" / f"{number}.png")
    return folder
