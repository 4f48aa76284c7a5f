"""The device worker: a file that stands alone and answers in JSON."""

from __future__ import annotations

import ast
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from bench_models import save_convs

from mm_edge.bench import worker

WORKER = Path(worker.__file__)


def ask(command: str, cwd: Path, **options: object) -> dict[str, Any]:
    request = json.dumps({"schema_version": 1, "command": command, "options": options})
    done = subprocess.run(
        [sys.executable, "-I", WORKER], input=request.encode(), capture_output=True, cwd=cwd, check=True
    )
    (line,) = [line for line in done.stdout.decode().splitlines() if line.startswith(worker.RESULT_MARK)]
    reply: dict[str, Any] = json.loads(line[len(worker.RESULT_MARK) :])
    return reply


def test_it_is_python_3_8_and_needs_only_numpy_and_onnxruntime() -> None:
    tree = ast.parse(WORKER.read_text(), feature_version=(3, 8))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    # PyTorch is for the products of GPUs alone, and its absence is an answer, not a crash
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "torch"}


def test_measure_gives_paired_samples(tmp_path: Path) -> None:
    dense, candidate = save_convs(tmp_path / "d.onnx", 32), save_convs(tmp_path / "c.onnx", 8)
    result = ask("measure", tmp_path, dense=str(dense), candidate=str(candidate), pairs=22, threads=1)["result"]
    count = len(result["dense_ns"])
    assert count == len(result["candidate_ns"]) == len(result["disturbed"]) == sum(result["sittings"])
    # Whole blocks of four: as many undisturbed pairs as were asked for, or twice as many in all.
    assert count % 4 == 0 and 22 <= count <= 48
    assert count - sum(result["disturbed"]) >= 22 or count >= 44
    assert result["load"]["cores"] >= 1
    assert min(result["dense_ns"] + result["candidate_ns"]) > 0
    assert result["threads"] == 1
    assert result["warm_up_runs"] >= 10
    # sixteen times the work is slower on any machine
    assert np.median(result["dense_ns"]) > np.median(result["candidate_ns"])


def test_memory_grows_with_the_model(tmp_path: Path) -> None:
    small = save_convs(tmp_path / "s.onnx", 8)
    large = save_convs(tmp_path / "l.onnx", 640, layers=2, size=4)  # 15 MB of weights
    peaks = [ask("memory", tmp_path, model=str(m), threads=1)["result"]["peak_rss_bytes"] for m in (small, large)]
    assert peaks[1] - peaks[0] > large.stat().st_size * 0.8
    assert peaks[0] < 8 << 20


def test_evaluate_returns_the_models_own_outputs(tmp_path: Path) -> None:
    model = save_convs(tmp_path / "m.onnx", 5)
    images = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    result = ask("evaluate", tmp_path, model=str(model), images=str(tmp_path / "images.npy"), threads=1)["result"]
    outputs = np.frombuffer(base64.b64decode(result["data"]), "<f4").reshape(result["shape"])
    session = onnxruntime.InferenceSession(str(model))
    expected = np.concatenate([session.run(None, {"input": images[i : i + 1]})[0] for i in range(3)])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_the_harness_itself_costs_little_beside_a_small_model(tmp_path: Path) -> None:
    samples = ask("null", tmp_path, pairs=200, threads=1)["result"]["null_ns"]
    assert len(samples) == 200
    model = str(save_convs(tmp_path / "m.onnx", 64))
    timed = ask("measure", tmp_path, dense=model, candidate=model, pairs=22, threads=1)["result"]["dense_ns"]
    assert np.median(samples) < 0.25 * np.median(timed)


def test_info_describes_this_machine(tmp_path: Path) -> None:
    info = ask("info", tmp_path)["result"]
    assert info["onnxruntime"] == onnxruntime.__version__
    assert 1 <= info["threads_auto"] <= 4
    assert info["emulated"] is False


@pytest.mark.parametrize(
    ("command", "options", "kind", "message"),
    [
        ("measure", {"dense": "no.onnx", "candidate": "no.onnx", "pairs": 4}, "model", "cannot load the model"),
        ("memory", {"model": "junk.onnx"}, "model", "cannot load the model"),
        (
            "null",
            {"provider": "TensorrtExecutionProvider"},
            "provider",
            "has no TensorrtExecutionProvider here; it has",
        ),
        ("dance", {}, "request", "unknown request"),
        ("measure", {"dense": "no.onnx"}, "worker", "KeyError: 'pairs'"),
    ],
)
def test_errors_are_answers(tmp_path: Path, command: str, options: dict[str, Any], kind: str, message: str) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    error = ask(command, tmp_path, **options)["error"]
    assert error["kind"] == kind
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_auto_threads_count_hyper_threads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    monkeypatch.setattr(worker, "usable_cores", lambda: sorted(siblings))
    monkeypatch.setattr(worker, "_read_text", lambda path: siblings[int(path.split("cpu")[2].split("/")[0])])
    assert worker.physical_cores() == 2


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (4, 3), (5, 4), (64, 4)])
def test_auto_threads_leave_a_core(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(worker, "physical_cores", lambda: cores)
    assert worker.default_threads() == threads


def test_cpuinfo_of_an_arm_board(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd05\n\n"
    text += "processor\t: 1\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
    monkeypatch.setattr(worker, "_read_text", lambda path: text)
    cpu = worker.read_cpu()
    assert cpu["flags"] == ["asimd", "asimddp", "fp"]
    assert cpu["parts"] == ["0x41/0xd05", "0x41/0xd0b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here: the products are measured on it")
def test_products_without_a_gpu_are_refused_in_a_sentence(tmp_path: Path) -> None:
    error = ask("products", tmp_path, products=[[8, 64, 32]], runs=20)["error"]
    assert error == {"kind": "gpu", "message": "layer times need a CUDA GPU that PyTorch can use, and there is none"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: 2:4 kernels cannot be timed")
def test_products_on_a_gpu(tmp_path: Path) -> None:
    result = ask("products", tmp_path, products=[[512, 1024, 1024], [8, 64, 32]], runs=20)["result"]
    assert [len(samples) for key in ("dense_ns", "sparse_ns") for samples in result[key]] == [20] * 4


# --- sizes that a model leaves open ---------------------------------------------------------------------------------


def open_model(path: Path, metadata: str | None, batch: str = "N") -> Path:
    shape = f"float[{batch},3,H,W]"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({shape} x) => ({shape} y) {{ y = Relu(x) }}'
    proto = onnx.parser.parse_model(text)
    if metadata is not None:
        proto.metadata_props.add(key="mm_edge.measured", value=metadata)
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize(("batch", "expected"), [("N", (2, 3, 32, 48)), ("1", (1, 3, 32, 48))])
def test_open_sizes_are_those_the_artifact_states(tmp_path: Path, batch: str, expected: tuple[int, ...]) -> None:
    session = onnxruntime.InferenceSession(open_model(tmp_path / "m.onnx", '{"x": [2, 3, 32, 48]}', batch))
    assert worker.make_inputs(session, {})["x"].shape == expected


@pytest.mark.parametrize(
    "metadata",
    [None, "", "[]", "{", "[" * 5000, '{"x": [1, 3]}', '{"x": [1, 3, -4, 8]}', '{"x": [1, 3, 1e9, 8]}',
     '{"x": [1, 3, 100000, 100000]}', '{"other": [1, 3, 8, 8]}'],
)  # fmt: skip
def test_open_sizes_that_nothing_states_are_refused(tmp_path: Path, metadata: str | None) -> None:
    session = onnxruntime.InferenceSession(open_model(tmp_path / "m.onnx", metadata))
    with pytest.raises(worker.WorkerError) as caught:
        worker.make_inputs(session, {})
    assert caught.value.args[-1] == (
        "input 'x' leaves sizes open, ['N', 3, 'H', 'W']; fix them, or give a file that mm-edge prune-export wrote"
    )
