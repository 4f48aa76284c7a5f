"""Fine-tuning as a stage of the whole job: which candidates it takes, what they say, what is on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import safetensors
import timm
import torch
from tiny_job import CLASSES, SIDE, save_checkpoint, write_images

from mm_edge.api import run_job
from mm_edge.errors import UsageError
from mm_edge.graph.layers import read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.load.data import open_data
from mm_edge.load.models import LoadedModel, LoadOptions, load_model, wrap_module
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.strategies import assign
from mm_edge.progress import Stages
from mm_edge.records import Candidate, DenseFigures, Latency, Report
from mm_edge.recover.training import descent, tune
from mm_edge.recover.training.finetune import Settings
from mm_edge.run import finetune as stage
from mm_edge.run.recover import worth_training
from mm_edge.run.request import make_request

pytestmark = pytest.mark.slow


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE)))


def run(files: Path, out: Path, **fields: Any) -> Report:
    setting = {"out": out, "data": str(files / "images"), "bench": False}
    asked: Any = {"signals": ("magnitude",), "strategies": ("balanced",), "recover": "finetune", "epochs": 2, **fields}
    return run_job(lambda: load(files), make_request(**setting, **asked), Stages())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learnt the colours, so that there is accuracy to lose."""
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder / "net.pt")
    write_images(folder / "images")
    model = load(folder)
    network = model.module
    assert network is not None
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    images = open_data(str(folder / "images"), model.input, CLASSES, (1.0, 0.0, 0.0)).calibration
    network.train()
    for _ in range(12):
        for batch, labels in images.batches(16):
            loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(batch)), torch.from_numpy(labels))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    save_checkpoint(folder / "net.pt", state_dict=network.state_dict())
    return folder


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("run")
    kinds = ("structured", "unstructured")
    return out, run(files, out, kinds=kinds, strategies=("max_aggressive",), macs=(0.5,))


def test_candidates_say_how_long_and_why(done: tuple[Path, Report]) -> None:
    _, report = done
    assert report.schema_version == 7
    tuned = [item for item in report.candidates if item.epochs is not None]
    assert {item.kind for item in tuned} == {"structured", "unstructured"}
    assert any(item.recovered_by == "finetune" for item in tuned)
    for item in report.candidates:
        if item.recovered_by == "finetune":
            assert (
                item.epochs == 2 and item.stopped is not None and item.stopped.startswith("all 2 epochs done; epoch ")
            )
            assert item.artifact is not None and item.artifact.endswith("-finetuned.onnx")
            assert item.parity is not None and item.parity.max_rel_err <= 1e-4
    budget = [item for item in report.candidates if item.strategy == "macs_0.5"]
    assert sum(item.epochs is not None for item in budget) >= 1


def test_the_masked_state_is_timms_and_holds_the_masks(done: tuple[Path, Report]) -> None:
    out, report = done
    for item in report.candidates:
        if item.recovered_by != "finetune" or item.kind != "structured":
            continue
        assert item.masked_state_dict is not None
        with safetensors.safe_open(out / item.masked_state_dict, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert "kept" in file.metadata()
        timm.create_model("test_resnet", num_classes=CLASSES).load_state_dict(state, strict=True)
        assert any((tensor == 0).any() for name, tensor in state.items() if name.endswith("conv1.weight"))


def test_unstructured_zeros_are_those_asked_for_within_one_weight_a_layer(
    files: Path, done: tuple[Path, Report]
) -> None:
    out, report = done
    (item,) = [item for item in report.candidates if item.kind == "unstructured"]
    assert item.epochs == 2 and item.artifact is not None
    model = load(files)
    layers = read_layers(read_raw(model))
    ranges = apply_constraints(layers, rule_ranges(layers, model.family), False)
    wanted = assign(("max_aggressive",), "magnitude", layers, ranges)[0].sparsity
    graph = onnx.load(out / item.artifact).graph
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    weights = [tensors[node.input[1]] for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert [weight.size for weight in weights] == [layer.numel for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        assert abs(int((weight == 0).sum()) - wanted[layer.fqn] * layer.numel) <= 1, layer.fqn
    total = sum(layer.numel for layer in layers)
    assert abs(item.sparsity * total - sum(wanted[layer.fqn] * layer.numel for layer in layers)) <= len(layers)


def test_a_second_run_trains_nothing_and_more_epochs_train_again(files: Path, tmp_path: Path) -> None:
    kinds = ("unstructured",)  # no closed form before it
    first = run(files, tmp_path / "run", kinds=kinds, epochs=1)
    path = tmp_path / "run" / ".mm-edge" / "finetuned" / "magnitude-balanced-unstructured-fp32.json"
    made = path.stat().st_mtime_ns
    again = run(files, tmp_path / "run", kinds=kinds, epochs=1)
    assert path.stat().st_mtime_ns == made
    assert again.candidates == first.candidates
    assert list(path.parent.glob("*unfinished*")) == []
    assert run(files, tmp_path / "run", kinds=kinds, epochs=2).candidates[0].epochs == 2
    assert path.stat().st_mtime_ns > made


def test_what_cannot_be_trained_is_refused(files: Path, done: tuple[Path, Report], tmp_path: Path) -> None:
    setting = {"out": tmp_path / "run", "data": str(files / "images"), "bench": False}
    request = make_request(**setting, recover="finetune")
    assert request.epochs == 10 and request.select == "auto"
    dense = load_model(str(done[0] / "dense.onnx"), LoadOptions())
    with pytest.raises(UsageError) as caught:
        run_job(lambda: dense, request, Stages())
    assert str(caught.value) == (
        "--recover finetune trains a PyTorch module, and an .onnx file holds none; "
        "give the checkpoint with --arch, or use --recover closed-form"
    )
    with pytest.raises(UsageError, match=r"^--recover finetune trains on calibration images, and there are none; "):
        run_job(lambda: load(files), replace(request, split=(0.0, 0.5, 0.5)), Stages())
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"^--epochs 3 is for fine-tuning; give --recover finetune with it$"):
        make_request(**setting, recover="closed-form", epochs=3)
    with pytest.raises(UsageError, match=r"^--epochs 0 trains nothing; give at least 1$"):
        make_request(**setting, recover="finetune", epochs=0)


class TwoOutputs(torch.nn.Module):
    """A mask of the size of the image, and four numbers a position at a quarter of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Conv2d(3, 16, 3, 2, 1)
        self.inner, self.norm = torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.BatchNorm2d(32)
        self.boxes, self.up = torch.nn.Conv2d(32, 4, 1), torch.nn.ConvTranspose2d(32, 2, 4, 4)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.inner(torch.relu(self.enter(images)))))
        return {"boxes": self.boxes(x).flatten(2), "mask": torch.sigmoid(self.up(x))}


@pytest.mark.parametrize("recover", ["finetune", "tune"])
def test_the_dense_networks_outputs_teach_whatever_their_shape(
    recover: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, values in ((tune, {"STEPS": 40, "CHECK": 10}), (descent, {"CROPS": 64, "BATCH": 8, "WARM_UP": 5})):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(stage, "Settings", partial(Settings, batch=8, peak=1e-3))
    torch.manual_seed(0)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32))
    request = make_request(
        data=tmp_path / "data.npy", out=tmp_path / "run", bench=False, signals="magnitude", strategies="max_aggressive",
        recover=recover, **({"epochs": 8} if recover == "finetune" else {}),
    )  # fmt: skip
    model = wrap_module(TwoOutputs().eval(), torch.zeros(1, 3, 16, 16), name="net")
    report = run_job(lambda: model, request, Stages())
    (trained,) = report.candidates
    plain = run_job(lambda: model, replace(request, recover="closed-form", out=tmp_path / "closed"), Stages())
    (solved,) = plain.candidates
    assert trained.stopped is not None and "none was better" not in trained.stopped and "dropped" not in trained.stopped
    assert trained.fidelity is not None and solved.fidelity is not None and len(trained.fidelity.outputs) == 2
    mine, theirs = (
        [item.nmse or 0.0 for item in found.outputs.values()] for found in (trained.fidelity, solved.fidelity)
    )
    assert np.mean(mine) < np.mean(theirs)


def candidate(
    name: str, accuracy: float | None, macs: int = 90, sparsity: float = 0.1, kind: str = "structured"
) -> Candidate:
    strategy = name.split("/")[1]
    return Candidate(
        id=f"{name}/{kind}/fp32",
        signal="s",
        strategy=strategy,
        kind=kind,
        precision="fp32",
        sparsity=sparsity,
        params=1,
        macs=macs,
        input_shape=(3, 8, 8),
        accuracy_top1=accuracy,
        kl_to_dense=0.1,
        planned_by="multiply-adds, counted" if strategy.startswith("macs") else None,
    )


DENSE = DenseFigures(0.9, Latency(), None, None, 1, 100)


def test_the_front_and_the_best_of_each_budget_are_worth_training() -> None:
    candidates = [
        candidate("a/balanced", 0.8, 60),
        candidate("b/balanced", 0.7, 70),
        candidate("a/macs_0.5", 0.5, 65),
        candidate("b/macs_0.5", 0.6, 65),
        candidate("c/macs_0.5", 0.59, 59),
        candidate("c/balanced", 0.4, 100, 0.5, "unstructured"),
        candidate("d/balanced", 0.3, 100, 0.4, "unstructured"),
        candidate("e/balanced", 0.2, 100, 0.6, "unstructured"),
    ]
    chosen = [item.id for item in worth_training(candidates, DENSE)]
    assert chosen == [
        "a/balanced/structured/fp32",
        "b/macs_0.5/structured/fp32",
        "c/balanced/unstructured/fp32",
        "e/balanced/unstructured/fp32",
    ]


def test_a_whole_network_is_no_rival_to_what_is_pruned_under_a_budget() -> None:
    candidates = [
        candidate("a/macs_0.5", 0.5, 65),
        candidate("b/macs_0.5", 0.6, 65),
        candidate("c/macs_0.5", 0.7, 60, 0.0),
    ]
    chosen = [item.id for item in worth_training(candidates, DENSE)]
    assert chosen == ["b/macs_0.5/structured/fp32", "c/macs_0.5/structured/fp32"]


def test_without_accuracy_all_are_trained() -> None:
    candidates = [candidate("a/balanced", None), candidate("b/balanced", None)]
    assert worth_training(candidates, DENSE) == candidates


def test_equal_candidates_are_both_kept() -> None:
    candidates = [candidate("a/balanced", 0.5, 100, 0.5, "n:m"), candidate("b/balanced", 0.5, 100, 0.5, "n:m")]
    assert worth_training(candidates, DENSE) == candidates
