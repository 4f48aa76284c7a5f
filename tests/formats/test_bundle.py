"""The bundle: what it holds, and that its scripts run where nothing of mm-edge is."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from mm_edge.bench.target import load_target
from mm_edge.formats.bundle import run as script
from mm_edge.formats.bundle.contents import Facts, names_of, write_archive, write_contents
from mm_edge.formats.context import FormatContext
from mm_edge.load.photos import normalise, pixels_of
from mm_edge.load.presets import RESIZES
from mm_edge.records import Candidate, DenseFigures, InputSpec, Latency, ModelInfo, to_json

SIDE = 16
SPEC = InputSpec((3, SIDE, SIDE), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
LABELS = ("red thing", "green\nthing", "blue <b>thing</b>")
CHOSEN = Candidate(
    id="magnitude/balanced/structured/fp32",
    signal="magnitude",
    strategy="balanced",
    kind="structured",
    precision="fp32",
    sparsity=0.5,
    params=9,
    macs=9,
    input_shape=(3, SIDE, SIDE),
    accuracy_top1=0.9,
    speedup=1.5,
    speedup_ci=(1.4, 1.6),
    latency_ms=Latency(1.0, 1.1, 1.2, 200, 1, "host"),
    artifact="candidates/net.onnx",
)


def save_classifier(path: Path) -> None:
    """Save a network whose class is the strongest colour."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Mul", ["flat", "gain"], ["scores"]),
    ]
    save(path, nodes, {"gain": np.full(3, 4, np.float32)}, {"scores": [1, 3]})


def save_detector(path: Path) -> None:
    """Save a network that finds the same two boxes of YOLO's layout in every photo: 4 of its 6 cells overlap."""
    rows = np.zeros((1, 4 + 2, 6), np.float32)
    rows[0, :4] = np.array([[4, 4, 4, 4]] * 4 + [[10, 8, 8, 12]] + [[0, 0, 0, 0]], np.float32).T
    rows[0, 4, :4] = [0.6, 0.9, 0.5, 0.4]
    rows[0, 5, 4] = 0.8
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["boxes"]),
    ]
    save(path, nodes, {"zero": np.float32(0), "rows": rows}, {"boxes": [1, 6, 6]})


def save(path: Path, nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], outputs: dict[str, list[int]]) -> None:
    feed = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", [feed], made, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def make_bundle(folder: Path, labels: tuple[str, ...] = LABELS, spec: InputSpec = SPEC) -> Path:
    """Make the bundle of the network that lies in `folder`."""
    bundle = folder / "bundle"
    bundle.mkdir()
    images = np.random.default_rng(0).standard_normal((8, 3, SIDE, SIDE)).astype(np.float32)
    context = FormatContext(spec, load_target("raspberry-pi-5"), images, "images")
    model = ModelInfo("net", "checkpoint <net>.pt", "ab", 9, 9, (1, 3, SIDE, SIDE), len(labels) or None, "mit")
    dense = DenseFigures(0.95, Latency(1.5, 1.6, 1.7, 200, 1, "host"), None, 99, 18, 18)
    facts = Facts(model, dense, labels, "the fastest", 0.89, {"model": to_json(model), "target": "raspberry-pi-5"})
    made = write_contents(folder, bundle, CHOSEN, context, facts)
    assert sorted(path.name for path in made) == sorted(path.name for path in bundle.iterdir())
    assert {path.name for path in made} <= set(names_of(CHOSEN))
    return bundle


def run_script(bundle: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the bundle where mm_edge cannot be imported."""
    return subprocess.run(
        [sys.executable, "-I", str(bundle / name), *words], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    save_classifier(tmp_path / "candidates" / "net.onnx")
    return make_bundle(tmp_path)


def test_a_classifier_answers_a_photo_in_words(classifier: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 10, 240)).save(tmp_path / "blue.png")
    done = run_script(classifier, "run.py", str(tmp_path / "blue.png"), "--top", "2")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.endswith("%  blue <b>thing</b>") and second.endswith("%  green thing")


def test_a_photo_that_cannot_be_read_is_one_line(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    done = run_script(classifier, "run.py", str(tmp_path / "no.png"))
    assert done.returncode == 1 and done.stderr.startswith("cannot read the photo '") and "Traceback" not in done.stderr


def test_verify_finds_the_model_good_and_times_it(classifier: Path) -> None:
    done = run_script(classifier, "verify.py", "--seconds", "0.05")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "files: all 7 as written" in done.stdout
    assert "output scores: differs by 0.0e+00 of its largest value, within 0.001" in done.stdout
    assert "time in the report: median 1 ms" in done.stdout


def test_an_emulator_s_time_is_not_taken(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_EDGE_EMULATED", "1")
    done = run_script(classifier, "verify.py", "--seconds", "0.05")
    assert done.returncode == 0
    times = [line for line in done.stdout.splitlines() if line.startswith("time")]
    assert times == ["time: not taken, because this processor is emulated", "time in the report: median 1 ms"]


def test_verify_finds_a_changed_file_and_a_wrong_answer(classifier: Path) -> None:
    model = onnx.load(classifier / "net.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(3, 4.1, np.float32), "gain"))
    onnx.save(model, classifier / "net.onnx")
    (classifier / "labels.txt").unlink()
    done = run_script(classifier, "verify.py", "--seconds", "0")
    assert done.returncode == 1
    assert "files: labels.txt is missing; net.onnx is not the file that was written" in done.stdout
    assert "NOT within 0.001" in done.stdout and done.stdout.endswith("NOT good\n")


def test_a_detector_prints_and_draws_boxes_in_pixels_of_the_photo(tmp_path: Path) -> None:
    save_detector(tmp_path / "candidates" / "net.onnx")
    bundle = make_bundle(tmp_path, ("cat", "dog"), dataclasses.replace(SPEC, resize="stretch"))
    Image.new("RGB", (160, 32)).save(tmp_path / "photo.png")
    drawn = tmp_path / "drawn.png"
    done = run_script(bundle, "run.py", str(tmp_path / "photo.png"), "--boxes", str(drawn))
    assert done.stdout.splitlines() == [
        " 90.00 %  cat  from 20,4 to 60,12",
        " 80.00 %  dog  from 60,4 to 140,28",
    ]
    with Image.open(drawn) as picture:
        assert picture.size == (160, 32) and np.asarray(picture).any()
    assert run_script(bundle, "verify.py", "--seconds", "0").returncode == 0


@pytest.mark.parametrize("resize", sorted(RESIZES))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 24, 40)])
def test_photos_are_prepared_as_they_were_for_the_measurement(resize: str, shape: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (45, 70, 3), np.uint8)
    photo = Image.fromarray(noise)
    one = shape[0] == 1
    changes: list[dict[str, Any]] = [
        {},
        {"layout": "NHWC", "colours": "BGR", "scale": 1.0, "interpolation": "bilinear"},
    ]
    for change in changes:
        mean, std = ((0.5,), (0.2,)) if one else (SPEC.mean, SPEC.std)
        spec = dataclasses.replace(SPEC, shape=shape, mean=mean, std=std, resize=resize, pad=114, **change)
        expected = normalise(pixels_of(spec)(photo)[None], spec)
        found, _ = script.prepare(photo, to_json(spec))  # type: ignore[no-untyped-call]
        np.testing.assert_array_equal(found, expected)


def test_the_manifest_says_what_it_is(classifier: Path) -> None:
    manifest = json.loads((classifier / "manifest.json").read_text())
    assert manifest["model"]["inputs"] == [{"name": "x", "shape": [1, 3, SIDE, SIDE], "type": "tensor(float)"}]
    assert manifest["numbers"]["speedup_ci"] == [1.4, 1.6] and manifest["dense"]["accuracy_top1"] == 0.95
    assert manifest["verify"]["count"] == 4 and manifest["weights_licence"] == "mit"
    assert (classifier / "labels.txt").read_text() == "red thing\ngreen thing\nblue <b>thing</b>\n"
    assert "The network names `mit` as the licence of its weights." in (classifier / "README.md").read_text()
    assert "checkpoint \\<net\\>.pt" in (classifier / "README.md").read_text()


def test_what_was_assumed_is_said_by_readme_and_script(tmp_path: Path) -> None:
    save_classifier(tmp_path / "candidates" / "net.onnx")
    bundle = make_bundle(tmp_path, (), dataclasses.replace(SPEC, assumed=("mean", "std")))
    assert "Nobody stated mean, std of the input, so mm-edge assumed them." in (bundle / "README.md").read_text()
    assert not (bundle / "labels.txt").exists()
    Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / "red.png")
    done = run_script(bundle, "run.py", str(tmp_path / "red.png"))
    assert done.stderr == "note: nobody stated mean, std of the input; it was assumed\n"
    assert "class 0" in done.stdout.splitlines()[0]


def test_the_archive_has_the_same_bytes_for_the_same_files(classifier: Path, tmp_path: Path) -> None:
    names = [path.name for path in classifier.iterdir()]
    for name in ("a.tar.gz", "b.tar.gz"):
        write_archive(classifier, tmp_path / name, names)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
