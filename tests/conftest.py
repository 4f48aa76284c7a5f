"""Importing mm_edge first makes timm importable in every test module, whatever the order of its imports."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import mm_edge  # noqa: F401

# isort: split
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_job import save_checkpoint, write_images
from torch import nn
from torch.onnx._internal.exporter import _registration

from mm_edge.graph import export

# On a busy machine a property may take any time.
settings.register_profile("any time", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any time")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process per core runs tests

SMALL = 4 << 20  # bytes of pickled module; larger ones are exported anew, so that memory stays low


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small network as net.pt and its pictures in images/, one for each test module."""
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder / "net.pt")
    write_images(folder / "images")
    return folder


@pytest.fixture(scope="session", autouse=True)
def export_small_networks_once() -> Iterator[None]:
    """Reuse what torch.onnx.export made of the same small network: most of the suite's time goes there."""
    real, made = export._export, dict[str, ir.Model]()
    # PyTorch reads the types of all its operators anew for every export: a second of each.
    operators = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def cached(module: nn.Module, examples: tuple[torch.Tensor, ...]) -> ir.Model:
        key = _identify(module, examples)
        if key is None:
            return real(module, examples)
        if key not in made:
            made[key] = real(module, examples)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", cached)
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(operators))
        yield


def _identify(module: nn.Module, examples: tuple[torch.Tensor, ...]) -> str | None:
    """Return a digest of everything the export depends on; None where it cannot be told."""
    content = io.BytesIO()
    try:
        torch.save((module, [(tuple(item.shape), item.dtype) for item in examples]), content)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return None  # a class inside a function, for instance
    if content.tell() > SMALL:
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()
