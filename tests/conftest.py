"""Importing mm_edge first makes timm importable in every test module, whatever the order of its imports."""

from __future__ import annotations

from pathlib import Path

import mm_edge  # noqa: F401

# isort: split
import pytest
from tiny_job import save_checkpoint, write_images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small network as net.pt and its pictures in images/, one for each test module."""
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder / "net.pt")
    write_images(folder / "images")
    return folder
