"""What a run that is stopped keeps of long stages: sensitivities, blocks and the dense network's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import write_images
from torch import nn

from mm_edge.api import run_job
from mm_edge.load.models import wrap_module
from mm_edge.progress import Stages
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.recover.closed_form import branches, sensitivity
from mm_edge.run import networks, reuse
from mm_edge.run.request import make_request

SIDE = 32


class Net(nn.Module):
    """Three groups of channels and two residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.first, self.second = (nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1)) for _ in "12")
        self.head = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images).relu()
        x = x + self.first(x)
        x = x + self.second(x)
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), per_class=8)


def prune(images: Path, out: Path) -> dict[str, Any]:
    """Run the whole job; return the report without its seconds and the name of its folder."""
    torch.manual_seed(0)
    setting = {"out": out, "data": str(images), "bench": False, "macs": (0.7,), "effort": "quick"}
    request = make_request(
        **setting, signals=("magnitude",), strategies=("balanced",), recover="closed-form", input_sizes="none"
    )
    example = torch.zeros(1, 3, SIDE, SIDE)
    run_job(lambda: wrap_module(Net(), example, name="net", mean=(0.5,), std=(0.25,)), request, Stages())
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("seconds", "command")}


def stop_after(calls: int, real: Callable[..., Any], done: list[int]) -> Callable[..., Any]:
    """Return `real`, which Ctrl-C comes before when it was called so often; `done` counts."""

    def call(*args: Any, **rest: Any) -> Any:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **rest)

    return call


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prune(images, tmp_path_factory.mktemp("unbroken") / "run")


@pytest.mark.parametrize(
    ("module", "name", "total"), [(sensitivity, "_measure", 3), (branches, "divergence", 2)], ids=["groups", "blocks"]
)
def test_what_was_measured_before_a_stop_is_not_measured_again(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, Any],
    module: Any,
    name: str,
    total: int,
) -> None:
    monkeypatch.setattr(reuse, "KEEP_SECONDS", 0.0)
    real = getattr(module, name)
    monkeypatch.setattr(module, name, stop_after(1, real, []))
    with pytest.raises(KeyboardInterrupt):
        prune(images, tmp_path / "run")
    again: list[int] = []
    monkeypatch.setattr(module, name, stop_after(100, real, again))
    assert prune(images, tmp_path / "run") == unbroken
    assert len(again) == total - 1
    assert prune(images, tmp_path / "run") == unbroken
    assert len(again) == total - 1


def test_the_dense_networks_answers_are_kept_as_soon_as_they_are_known(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]
) -> None:
    done: list[int] = []
    monkeypatch.setattr(networks, "run_onnx", stop_after(1, run_onnx, done))
    monkeypatch.setattr(networks, "compare_logits", stop_after(0, compare_logits, []))
    with pytest.raises(KeyboardInterrupt):
        prune(images, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(networks, "run_onnx", stop_after(1, run_onnx, done))
    assert prune(images, tmp_path / "run") == unbroken
    assert len(done) == 1


def test_answers_are_not_kept_where_an_image_cannot_be_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only reading tells which images cannot be read, and the report names them."""
    damaged = write_images(tmp_path / "damaged", per_class=8)
    photo = damaged / "class1" / "3.png"
    photo.write_bytes(photo.read_bytes()[:-40])
    first = prune(damaged, tmp_path / "run")
    assert not (tmp_path / "run" / ".mm-edge" / "dense_answers.safetensors").exists()
    assert any("cannot be read" in text for text in first["warnings"])
    assert prune(damaged, tmp_path / "run") == first


def test_a_stage_is_stored_no_more_often_than_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("mm_edge.run.reuse.time.monotonic", lambda: clock[0])
    kept: list[str] = []
    offer = reuse.now_and_then(kept.append)
    for seconds, name in ((9.9, "a"), (0.1, "b"), (9.0, "c"), (1.0, "d")):
        clock[0] += seconds
        offer(name)
    assert kept == ["b", "d"]
