"""The whole job on a small network: the report says what is in the artifacts, and a second run redoes what changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from tiny_job import CLASSES, SIDE, write_images
from torch import nn

import mm_edge
from mm_edge.api import run_job
from mm_edge.errors import ConstraintError, UsageError
from mm_edge.graph.layers import read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.load.data import open_data
from mm_edge.load.models import LoadedModel, LoadOptions, load_model, wrap_module
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.strategies import assign
from mm_edge.progress import Stages
from mm_edge.quality.evaluation import run_onnx
from mm_edge.records import Constraints, Report, from_json, to_json
from mm_edge.run import measure as measuring
from mm_edge.run.request import make_request

pytestmark = pytest.mark.slow

BUDGET = 0.7


class Small(nn.Module):
    """A network of the user's own, quick to export."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 64, 3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.norm(self.stem(images)))
        logits: torch.Tensor = self.head(torch.relu(self.body(found)).mean((2, 3)))
        return logits


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE)))


def load_small() -> LoadedModel:
    torch.manual_seed(0)
    return wrap_module(Small(), torch.zeros(1, 3, 16, 16), name="small", mean=(0.5,), std=(0.25,))


def run(
    load: Callable[[], LoadedModel], images: Path, out: Path, setting: dict[str, Any] | None = None, **fields: Any
) -> Report:
    """Run the job without measuring; one signal, strategy and input size unless told otherwise."""
    where: Any = {"out": out, "data": str(images), "bench": False, **(setting or {})}
    asked: Any = {"signals": ("magnitude",), "strategies": ("balanced",), "input_sizes": "none", **fields}
    if where["data"] is not None:
        asked.setdefault("recover", "bn")
    return run_job(load, make_request(**where, **asked), Stages())


@dataclass(frozen=True)
class Finished:
    files: Path
    out: Path
    report: Report


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All signals, one strategy, both kinds, and a budget."""
    out = tmp_path_factory.mktemp("done")
    kinds = ("structured", "unstructured")
    signals = ("magnitude", "gradient", "product")
    report = run(lambda: load(files), files / "images", out, signals=signals, kinds=kinds, macs=(BUDGET,))
    return Finished(files, out, report)


def weights_of(path: Path) -> list[npt.NDArray[np.float32]]:
    """Return the weights of an artifact's convolutions and matrix products, in graph order."""
    graph = onnx.load(path).graph
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [tensors[node.input[1]] for node in nodes]


def images_of(folder: Path) -> npt.NDArray[np.float32]:
    images = open_data(str(folder / "images"), load(folder).input, CLASSES).validation
    return np.concatenate([batch for batch, _ in images.batches(8)])


def ids(report: Report) -> list[str]:
    return [candidate.id for candidate in report.candidates]


def test_the_report_is_what_was_asked_for_and_round_trips(done: Finished) -> None:
    names = [
        f"{s}/balanced/{k}/fp32" for k in ("structured", "unstructured") for s in ("magnitude", "gradient", "product")
    ]
    names += [f"{s}/macs_0.7/structured/fp32" for s in ("magnitude", "gradient", "product")]
    assert ids(done.report) == names
    document = json.loads((done.out / "report.json").read_text())
    assert from_json(Report, document) == done.report
    assert to_json(done.report) == document
    assert document["schema_version"] == 7
    assert (document["model"]["name"], document["model"]["num_classes"]) == ("test_resnet", CLASSES)
    data = document["data"]
    assert (data["calibration"], data["validation"], data["test"]) == (24, 12, 12)
    assert document["dense"]["latency_ms"]["p50"] is None
    assert set(document["seconds"]) >= {"load", "export", "gradients", "scores", "plan", "candidates", "test"}


def test_every_artifact_agrees_with_its_masked_model(done: Finished) -> None:
    for candidate in done.report.candidates:
        assert candidate.parity is not None
        assert candidate.parity.max_rel_err <= 1e-4
        assert candidate.parity.top1_agreement == 1.0
        assert (candidate.parity.inputs.count, candidate.parity.inputs.kind) == (8, "images")
        assert candidate.recovered_by == "bn"


def test_the_masked_state_dict_is_timms_and_says_what_the_artifact_says(done: Finished) -> None:
    images = images_of(done.files)
    for candidate in done.report.candidates:
        assert candidate.masked_state_dict is not None and candidate.artifact is not None
        model = timm.create_model("test_resnet", num_classes=CLASSES).eval()
        model.load_state_dict(safetensors.torch.load_file(done.out / candidate.masked_state_dict), strict=True)
        with torch.no_grad():
            masked = model(torch.from_numpy(images)).numpy()
        compact = run_onnx(done.out / candidate.artifact, [(images, np.zeros(len(images), np.int64))], 1)
        np.testing.assert_allclose(compact, masked, atol=1e-4 * np.abs(masked).max(), rtol=0)
        np.testing.assert_array_equal(compact.argmax(1), masked.argmax(1))


def test_accuracy_is_that_of_the_artifact_on_validation_images(done: Finished) -> None:
    images = images_of(done.files)
    labels = open_data(str(done.files / "images"), load(done.files).input, CLASSES).validation.labels
    assert labels is not None
    dense = run_onnx(done.out / "dense.onnx", [(images, labels)], 1)
    assert done.report.dense.accuracy_top1 == (dense.argmax(1) == labels).mean()
    for candidate in done.report.candidates:
        assert candidate.artifact is not None and candidate.accuracy_drop is not None
        logits = run_onnx(done.out / candidate.artifact, [(images, labels)], 1)
        assert candidate.accuracy_top1 == pytest.approx((logits.argmax(1) == labels).mean())
        drop = 100 * (done.report.dense.accuracy_top1 - (logits.argmax(1) == labels).mean())
        assert candidate.accuracy_drop == pytest.approx(drop)
        assert candidate.agreement_top1 == pytest.approx((logits.argmax(1) == dense.argmax(1)).mean())


def test_sparsity_is_counted_in_the_artifact(done: Finished) -> None:
    dense = sum(weight.size for weight in weights_of(done.out / "dense.onnx"))
    for candidate in done.report.candidates:
        assert 0 < candidate.sparsity < 1
        assert candidate.artifact is not None
        weights = weights_of(done.out / candidate.artifact)
        kept = sum(int(np.count_nonzero(weight)) for weight in weights)
        assert candidate.sparsity == pytest.approx(1 - kept / dense, abs=1e-6)
        stored = sum(weight.size for weight in weights)
        assert stored == (kept if candidate.kind == "structured" else dense)
        fewer = (candidate.params < done.report.dense.params, candidate.macs < done.report.dense.macs)
        assert fewer == ((True, True) if candidate.kind == "structured" else (False, False))


def test_unstructured_zeros_are_those_asked_for_within_one_weight_a_layer(done: Finished) -> None:
    model = load(done.files)
    layers = read_layers(read_raw(model))
    ranges = apply_constraints(layers, rule_ranges(layers, model.family), False)
    for signal in ("magnitude", "gradient", "product"):
        wanted = assign(("balanced",), signal, layers, ranges)[0].sparsity
        weights = weights_of(done.out / "candidates" / f"{signal}-balanced-unstructured-fp32.onnx")
        assert [weight.size for weight in weights] == [layer.numel for layer in layers]
        for layer, weight in zip(layers, weights, strict=True):
            assert abs((weight == 0).sum() - wanted[layer.fqn] * layer.numel) <= 1, layer.fqn
        assert sum(wanted.values()) > 1


def test_a_budget_is_never_exceeded_and_nearly_used(done: Finished) -> None:
    candidates = [c for c in done.report.candidates if c.strategy == "macs_0.7"]
    assert len({c.macs for c in candidates}) == 1
    for item in candidates:
        assert (BUDGET - 0.03) * done.report.dense.macs <= item.macs <= BUDGET * done.report.dense.macs


def test_macs_are_those_of_the_artifact(done: Finished) -> None:
    """Counted by hand from the shapes: a convolution costs its weights at every output position."""
    macs = {"dense.onnx": done.report.dense.macs} | {str(item.artifact): item.macs for item in done.report.candidates}
    for artifact, counted in macs.items():
        model = onnx.shape_inference.infer_shapes(onnx.load(done.out / artifact))
        shapes = {
            value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*model.graph.value_info, *model.graph.output)
        }
        sizes = {item.name: list(item.dims) for item in model.graph.initializer}
        total = 0
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                total += int(np.prod(sizes[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        assert counted == total


def test_test_images_are_read_once_for_the_chosen_one(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reading of images by the pipeline and the candidates is listed by model and labels."""
    readings: list[tuple[str, list[int]]] = []

    def spy(model: Path, batches: Any, *rest: Any) -> Any:
        kept = list(batches)
        readings.append((model.name, [int(label) for _, labels in kept for label in labels]))
        return run_onnx(model, kept, *rest)

    monkeypatch.setattr("mm_edge.run.networks.run_onnx", spy)
    monkeypatch.setattr("mm_edge.run.finish.run_onnx", spy)
    monkeypatch.setattr("mm_edge.quality.evaluation.run_onnx", spy)
    report = run(load_small, files / "images", tmp_path / "run", strategies=("balanced", "min_conservative"))
    splits = open_data(str(files / "images"), load_small().input, CLASSES)
    assert splits.validation.labels is not None and splits.test.labels is not None
    validation, test = splits.validation.labels.tolist(), splits.test.labels.tolist()
    assert validation != test
    assert report.chosen is not None
    chosen = report.chosen.id.replace("/", "-") + ".onnx"
    names = [Path(c.artifact or "").name for c in report.candidates]
    assert readings == [*((name, validation) for name in ("dense.onnx", *names)), (chosen, test), ("dense.onnx", test)]
    for model, accuracy in (
        (tmp_path / "run" / "candidates" / chosen, report.chosen.accuracy_top1_test),
        (tmp_path / "run" / "dense.onnx", report.chosen.dense_accuracy_top1_test),
    ):
        logits = run_onnx(model, splits.test.batches(8), 1)
        assert accuracy == pytest.approx((logits.argmax(1) == splits.test.labels).mean())
    for item in report.candidates:
        assert item.accuracy_ci is not None and item.drop_ci is not None and item.accuracy_drop is not None
        assert item.accuracy_ci[0] <= (item.accuracy_top1 or 0.0) <= item.accuracy_ci[1]
        assert item.drop_ci[0] <= item.accuracy_drop <= item.drop_ci[1]
    assert report.dense.accuracy_images == len(validation) and report.dense.accuracy_ci is not None


def test_the_same_seed_gives_the_same_records(done: Finished, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "signals": ("magnitude", "gradient", "product"),
        "kinds": ("structured", "unstructured"),
        "macs": (BUDGET,),
    }
    again = run(lambda: load(done.files), done.files / "images", tmp_path / "again", **fields)
    # The command names the run directory.
    assert replace(again, seconds={}, command=None) == replace(done.report, seconds={}, command=None)
    for candidate in again.candidates:
        for name in (candidate.artifact, candidate.masked_state_dict):
            assert name is not None
            assert (tmp_path / "again" / name).read_bytes() == (done.out / name).read_bytes()


def times(out: Path) -> dict[str, int]:
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Return the artifacts and stages written since, without what every run writes anew."""
    anew = {"dense.onnx", "report.json", "report.md", "report.html", ".mm-edge/lock", ".mm-edge/owned.json"}
    new = {name for name, when in after.items() if before.get(name) != when} - anew
    return {name for name in new if not name.startswith("bundle/")}


def test_a_second_run_redoes_only_what_a_flag_touches(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fields: dict[str, Any] = {"signals": ("magnitude", "gradient")}
    first = run(load_small, files / "images", out, **fields)
    start = times(out)
    same = run(load_small, files / "images", out, **fields)
    assert changed(start, times(out)) == set()
    assert replace(same, seconds={}) == replace(first, seconds={})

    more = run(load_small, files / "images", out, **fields, strategies=("balanced", "max_aggressive"))
    names = ("balanced", "max_aggressive")
    assert ids(more) == [f"{signal}/{name}/structured/fp32" for signal in fields["signals"] for name in names]
    new = changed(start, times(out))
    assert new and all("max_aggressive" in name for name in new)

    before = times(out)
    run(load_small, files / "images", out, **fields, recover="none")
    assert changed(before, times(out)) >= {f"candidates/{s}-balanced-structured-fp32.onnx" for s in fields["signals"]}
    assert ".mm-edge/gradients.safetensors" not in changed(before, times(out))

    before = times(out)
    damaged = out / "candidates" / "gradient-balanced-structured-fp32.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(load_small, files / "images", out, **fields, recover="none")
    assert {name for name in changed(before, times(out)) if "magnitude" in name} == set()
    onnxruntime.InferenceSession(damaged, providers=["CPUExecutionProvider"])

    before = times(out)
    run(load_small, files / "images", out, {"resume": False}, **fields, recover="none")
    assert ".mm-edge/gradients.safetensors" in changed(before, times(out))


def test_changed_images_are_noticed(files: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    run(load_small, images, tmp_path / "run", signals=("gradient",))
    before = times(tmp_path / "run")
    picture = images / "class0" / "0.png"
    picture.write_bytes((images / "class1" / "1.png").read_bytes())
    run(load_small, images, tmp_path / "run", signals=("gradient",))
    assert ".mm-edge/gradients.safetensors" in changed(before, times(tmp_path / "run"))


def test_a_target_that_is_not_here_has_no_latency_and_says_how_to_measure(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_edge.run.start.matches_this_machine", lambda target: False)
    monkeypatch.setattr(measuring, "matches_this_machine", lambda target: False)
    report = run(load_small, files / "images", tmp_path / "run", {"target": "arm64", "bench": True})
    assert report.target["name"] == "arm64"
    assert report.dense.latency_ms.p50 is None
    assert {item.latency_ms.p50 for item in report.candidates} == {None}
    assert {(item.speedup, item.speedup_ci, item.peak_memory_bytes) for item in report.candidates} == {
        (None, None, None)
    }
    assert report.warnings[-1] == (
        "latency is not measured: this machine is not arm64 and no device was given; give --host USER@HOST, or copy "
        "dense.onnx and the artifacts to one and run there: mm-edge bench dense.onnx ARTIFACT.onnx --target arm64"
    )
    with pytest.raises(UsageError, match=r"^--latency needs a measurement, and nothing is measured here; "):
        limits = Constraints(latency_ms=1)
        run(load_small, files / "images", tmp_path / "run", {"target": "arm64", "bench": True}, constraints=limits)


def test_an_onnx_goes_the_same_way_with_the_magnitude_signal(done: Finished, tmp_path: Path) -> None:
    setting = {"out": tmp_path / "run", "data": str(done.files / "images"), "bench": False}
    request = make_request(**setting, strategies=("balanced",), select="signal")
    report = run_job(lambda: load_model(str(done.out / "dense.onnx"), LoadOptions()), request, Stages())
    assert ids(report) == ["magnitude/balanced/structured/fp32"]
    assert "a network given as .onnx has no gradients: signal magnitude only" in report.warnings
    assert report.dense.accuracy_top1 == done.report.dense.accuracy_top1
    candidate = report.candidates[0]
    assert candidate.parity is not None and candidate.parity.max_rel_err <= 1e-4
    assert candidate.macs < 0.8 * report.dense.macs


def test_where_the_closed_form_chooses_channels_each_network_is_made_once_and_no_gradient_is_taken(
    files: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "signals": ("gradient", "magnitude"),
        "strategies": ("balanced", "middle_50th"),
        "recover": "closed-form",
        "macs": (BUDGET,),
    }
    report = run(load_small, files / "images", tmp_path / "auto", **fields)
    assert ids(report)[0] == "magnitude/balanced/structured/fp32"
    assert report.candidates[0].also_ids == (
        "magnitude/middle_50th/structured/fp32",
        "gradient/balanced/structured/fp32",
        "gradient/middle_50th/structured/fp32",
    )
    assert [c.id for c in report.candidates if c.signal == "magnitude"] == [
        "magnitude/balanced/structured/fp32",
        "magnitude/macs_0.7/structured/fp32",
    ]
    assert "gradients" not in report.seconds and not (tmp_path / "auto" / ".mm-edge" / "gradients.safetensors").exists()
    assert (
        "gradient changes nothing in structured candidates, because --select auto chooses their channels; no gradient "
        "is taken: each network is made once and carries all its names; --select signal makes one per signal"
    ) in report.warnings
    assert (
        "balanced and middle_50th coincide by formula: made, measured and listed once, under both names"
        in report.warnings
    )


def test_what_keep_names_is_not_pruned(files: Path, tmp_path: Path) -> None:
    kept = "layer3.*"
    report = run(lambda: load(files), files / "images", tmp_path / "run", keep=(kept,))
    candidate = report.candidates[0]
    state = safetensors.torch.load_file(tmp_path / "run" / (candidate.masked_state_dict or ""))
    dense = torch.load(files / "net.pt")["state_dict"]
    for name, tensor in dense.items():
        if name.startswith("layer3.") and name.endswith("weight"):
            assert torch.equal(state[name], tensor), name
    assert not torch.equal(state["layer1.0.conv1.weight"], dense["layer1.0.conv1.weight"])
    assert {group.reason for group in report.skipped_groups} >= {f"kept by --keep {kept}"}


def test_constraints_choose_and_the_nearest_is_named(done: Finished, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"strategies": ("balanced", "min_conservative")}
    report = run(load_small, done.files / "images", tmp_path / "run", constraints=Constraints(speedup=1.2), **fields)
    assert report.chosen is not None
    names = [f"magnitude/{name}/structured/fp32" for name in (*fields["strategies"], "speedup_1.2")]
    assert ids(report) == names and report.chosen.id in names
    with pytest.raises(
        ConstraintError, match=r"^no candidate meets --speedup 900; the nearest is magnitude/speedup_900/"
    ):
        run(load_small, done.files / "images", tmp_path / "run", constraints=Constraints(speedup=900), **fields)


# --- from Python ----------------------------------------------------------------------------------------------------


def test_prune_export_from_python(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    report = mm_edge.prune_export(
        module,
        torch.zeros(2, 3, 16, 16),
        data=files / "images",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        bench=False,
        strategies=("balanced",),
        select="signal",
        input_sizes="none",
    )
    assert ids(report) == [f"{signal}/balanced/structured/fp32" for signal in ("magnitude", "gradient", "product")]
    assert report == from_json(Report, json.loads((tmp_path / "mm-edge-Small" / "report.json").read_text()))
    assert report.candidates[0].macs < 0.8 * report.dense.macs
    assert report.warnings == (
        "preprocessing not stated, assumed: colours RGB, resize crop; give --preprocess NAME, or --colours, --resize",
        "latency is not measured: --no-bench was given; run the same command without it to measure",
    )
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_python_refuses_what_the_command_line_refuses(tmp_path: Path) -> None:
    def refuse(**request: Any) -> str:
        with pytest.raises(UsageError) as caught:
            mm_edge.prune_export(Small(), torch.zeros(1, 3, 16, 16), out=tmp_path / "run", bench=False, **request)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert refuse(strategies=("balancd",)) == "unknown strategy 'balancd'; did you mean balanced?"
    assert refuse(kinds=()) == "--kinds is empty; allowed: structured, n:m, unstructured"
    with pytest.raises(AttributeError, match=r"^module 'mm_edge' has no attribute 'prune'$"):
        mm_edge.prune  # noqa: B018


def test_smaller_numbers_and_files_for_the_device(files: Path, tmp_path: Path) -> None:
    """int8 of the dense model and of the front, an .ort that agrees, a model that takes raw images."""
    asked: dict[str, Any] = {"precisions": ("fp32", "int8"), "ort": True, "bake_preprocess": True}
    report = run(lambda: load(files), files / "images", tmp_path / "run", **asked)
    candidates = {c.id: c for c in report.candidates}
    assert candidates["dense/int8"].kind == "dense" and candidates["dense/int8"].sparsity == 0
    pruned = [c for c in candidates.values() if c.precision == "int8" and c.kind == "structured"]
    assert pruned and all(c.parity is None and c.agreement_top1 is not None for c in pruned)
    for item in pruned:
        assert item.file_bytes is not None and item.artifact is not None
        fp32 = candidates[item.id.replace("int8", "fp32")]
        assert fp32.file_bytes is not None and item.file_bytes < fp32.file_bytes
        assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "run" / item.artifact).graph.node)
    bundle = tmp_path / "run" / "bundle"
    assert len(list(bundle.glob("*.ort"))) == len(list(bundle.glob("*-raw-images.onnx"))) == 1
    (raw,) = bundle.glob("*-raw-images.onnx")
    session = onnxruntime.InferenceSession(str(raw))
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (scores,) = session.run(None, {session.get_inputs()[0].name: np.zeros((50, 60, 3), np.uint8)})
    assert scores.shape == (1, CLASSES)


def test_unstructured_candidates_are_stored_small_and_say_where(files: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"kinds": ("unstructured",), "strategies": ("max_aggressive",)}
    report = run(lambda: load(files), files / "images", tmp_path / "run", **asked)
    (item,) = report.candidates
    assert item.stored_file is not None and item.artifact is not None
    stored = tmp_path / "run" / item.stored_file
    assert item.file_bytes == stored.stat().st_size < (tmp_path / "run" / item.artifact).stat().st_size


def test_the_closed_form_recovers_what_masks_lost_and_stays_exact(files: Path, tmp_path: Path) -> None:
    """Screened for every candidate, walked for the front; a budget gets one by sensitivity; a second run reuses."""
    asked: dict[str, Any] = {"recover": "closed-form", "strategies": ("balanced",), "macs": (0.7,)}
    report = run(lambda: load(files), files / "images", tmp_path / "run", **asked)
    candidates = {c.id: c for c in report.candidates}
    assert {c.recovered_by for c in candidates.values()} <= {"closed-form", "closed-form (screened)"}
    assert candidates["sensitivity/macs_0.7/structured/fp32"].recovered_by == "closed-form"
    plain = run(lambda: load(files), files / "images", tmp_path / "plain", **{**asked, "recover": "none"})
    for before in plain.candidates:
        after = candidates[before.id]
        assert after.macs == before.macs
        assert after.parity is not None and after.parity.max_rel_err <= 1e-4
        assert after.kl_to_dense is not None and before.kl_to_dense is not None
        assert after.kl_to_dense < before.kl_to_dense
        assert after.masked_state_dict is not None and after.artifact is not None
        state = safetensors.torch.load_file(tmp_path / "run" / after.masked_state_dict)
        timm.create_model("test_resnet", num_classes=CLASSES).load_state_dict(state, strict=True)
    artifact = tmp_path / "run" / str(candidates["magnitude/balanced/structured/fp32"].artifact)
    made = artifact.stat().st_mtime_ns
    again = run(lambda: load(files), files / "images", tmp_path / "run", **asked)
    assert artifact.stat().st_mtime_ns == made
    assert [c.kl_to_dense for c in again.candidates] == [c.kl_to_dense for c in report.candidates]
