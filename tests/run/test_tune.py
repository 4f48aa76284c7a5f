"""Tuning as a stage of the whole job: candidates on the front go on from the closed form, or say that they did not."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import safetensors.numpy
from tiny_job import SIDE

from mm_edge.api import run_job
from mm_edge.arrays import Arrays
from mm_edge.errors import UsageError
from mm_edge.graph.axes import Keep
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.records import Candidate, Report
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.judging import Judged
from mm_edge.recover.closed_form.structured import Recovered
from mm_edge.recover.training import acceptance, adapt, descent, distil
from mm_edge.recover.training import tune as module_under_test
from mm_edge.recover.training.acceptance import Tuned
from mm_edge.recover.training.tune import tune
from mm_edge.run import closed_form
from mm_edge.run.closed_form import recover_keep
from mm_edge.run.request import make_request

pytestmark = pytest.mark.slow


def run(files: Path, out: Path, rate: float, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Report:
    for name, value in {"STEPS": 40, "CHECK": 10, "RATE": rate}.items():
        monkeypatch.setattr(module_under_test, name, value)
    for name, value in {"WARM_UP": 5, "CROPS": 64, "BATCH": 8}.items():
        monkeypatch.setattr(descent, name, value)
    monkeypatch.setattr(distil, "STEPS", 40)
    setting = {"out": out, "data": str(files / "images"), "split": (0.75, 0.25, 0.0), "bench": False}
    wanted = {"signals": ("magnitude",), "strategies": ("max_aggressive",), "macs": (0.5,), **more}
    request = make_request(**setting, recover="tune", **wanted)
    loaded = load_model(str(files / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE)))
    return run_job(lambda: loaded, request, Stages())


def _let_tuning_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make held-back images call every later state the better one: the closed form leaves little on so small a net."""
    asked = count()
    monkeypatch.setattr(acceptance, "is_better", lambda new, old: True)
    monkeypatch.setattr(
        module_under_test, "judge_answers", lambda context, logits: Judged(np.array([1 / (1 + next(asked))]), 1.0)
    )


def test_tuned_candidates_go_on_from_the_closed_form(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_tuning_win(monkeypatch)
    report = run(files, tmp_path, 4e-3, monkeypatch)
    said = [item for item in report.candidates if item.stopped is not None]
    assert said
    assert all(item.recovered_by in ("tune", "closed-form", "closed-form (screened)") for item in report.candidates)
    tuned = [item for item in said if item.recovered_by == "tune"]
    assert tuned
    for item in tuned:
        assert item.stopped is not None and item.stopped.startswith("tuned ")
        assert item.artifact is not None and item.artifact.endswith("-tuned.onnx")
        assert item.parity is not None and item.parity.max_rel_err < 1e-4
        assert _zeros(tmp_path, item) >= item.sparsity - 1e-9


def _zeros(folder: Path, item: Candidate) -> float:
    """Return the share of zeros in the weights of the masked state: no less than its sparsity."""
    assert item.masked_state_dict is not None
    state = safetensors.numpy.load_file(folder / item.masked_state_dict)
    weights = [array for array in state.values() if array.ndim > 1]
    zeros = sum(int((array == 0).sum()) for array in weights)
    return zeros / int(sum(array.size for array in weights))


def test_a_candidate_that_was_not_bettered_says_so(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(files, tmp_path, 100.0, monkeypatch)
    said = [item for item in report.candidates if item.stopped is not None]
    assert said
    for item in said:
        assert item.stopped == "tuning dropped: no better on held-back images"
        assert item.recovered_by is not None and item.recovered_by.startswith("closed-form")


def test_what_is_tuned_was_not_solved_for_the_images_that_judge_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[Recovered] = []
    given: list[Arrays] = []

    def recover(*args: Any, **more: Any) -> Recovered:
        found = recover_keep(*args, **more)
        if more["walked"]:
            walked.append(found)
        return found

    def tune_(context: RecoveryContext, keep: Keep, start: Arrays, **more: Any) -> Tuned:
        given.append(start)
        return Tuned(start, 1.0, 1.0, False, "not tried")

    monkeypatch.setattr(closed_form, "recover_keep", recover)
    monkeypatch.setattr(adapt, "tune", tune_)
    run(files, tmp_path, 4e-3, monkeypatch)
    assert given and walked
    solved = [item for item in walked if any((item.fitted[n] != item.tensors[n]).any() for n in item.fitted)]
    assert solved  # else the two cannot be told apart
    for start in given:
        alike = [item for item in walked if all(np.array_equal(start[n], item.fitted[n]) for n in item.fitted)]
        assert alike


def test_candidates_on_smaller_pictures_are_tuned_at_the_size_that_was_given(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_tuning_win(monkeypatch)
    sides: list[int] = []

    def tune_(context: RecoveryContext, *args: Any, **more: Any) -> Tuned:
        sides.append(context.images.shape[-1])
        return tune(context, *args, **more)

    monkeypatch.setattr(adapt, "tune", tune_)
    report = run(files, tmp_path, 4e-3, monkeypatch, macs=(0.4,), input_sizes=(SIDE, 24))
    tuned = [item for item in report.candidates if item.recovered_by == "tune"]
    smaller = [item for item in tuned if item.input_shape[-1] == 24]
    assert smaller
    assert set(sides) == {SIDE}
    for item in smaller:
        assert item.artifact is not None and item.artifact.endswith("-tuned.onnx")
        assert item.parity is not None and item.parity.max_rel_err < 1e-4
        assert _zeros(tmp_path, item) >= item.sparsity - 1e-9


def test_the_whole_network_within_a_budget_is_taught_the_answers_to_larger_pictures(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _let_tuning_win(monkeypatch)
    report = run(files, tmp_path, 4e-3, monkeypatch, macs=(0.7,), input_sizes=(SIDE, 24))
    item = next(item for item in report.candidates if item.id == "sensitivity/macs_0.7/structured/fp32@24")
    control = next(item for item in report.candidates if item.id == "dense@24")
    assert (item.sparsity, item.macs, item.is_pruned) == (0.0, control.macs, False)
    assert item.recovered_by == "tune" and item.stopped is not None and item.stopped.startswith("distilled 40 steps")
    assert item.parity is not None and item.parity.max_rel_err < 1e-4
    assert item.artifact is not None and control.artifact is not None
    weights = [_weights(tmp_path / path) for path in (item.artifact, control.artifact)]
    assert item.params == control.params
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0].keys() & weights[1].keys())


def test_the_whole_network_that_was_not_bettered_is_the_control_alone(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "is_better", lambda new, old: False)
    report = run(files, tmp_path, 4e-3, monkeypatch, macs=(0.7,), input_sizes=(SIDE, 24))
    at_24 = [item for item in report.candidates if item.input_shape[-1] == 24]
    assert [item.id for item in at_24 if not item.is_pruned] == ["dense@24"]
    assert any(item.id == "sensitivity/macs_0.7/structured/fp32" for item in report.candidates)
    assert (
        "sensitivity/macs_0.7/structured/fp32@24, the whole network, is the control again: "
        "distilling dropped: no better on held-back images"
    ) in report.warnings


def _weights(path: Path) -> dict[str, np.ndarray]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def test_an_onnx_file_cannot_be_tuned(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    weight = onnx.numpy_helper.from_array(np.ones((2, 3, 1, 1), dtype=np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    shape = [onnx.helper.make_tensor_value_info(n, 1, [1, c, SIDE, SIDE]) for n, c in (("x", 3), ("y", 2))]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", shape[:1], shape[1:], [weight])), path)
    loaded = load_model(str(path), LoadOptions())
    setting = {"out": tmp_path / "run", "data": str(files / "images"), "bench": False}
    with pytest.raises(UsageError) as caught:
        run_job(lambda: loaded, make_request(**setting, recover="tune"), Stages())
    assert str(caught.value) == (
        "--recover tune trains a PyTorch module, and an .onnx file holds none; "
        "give the checkpoint with --arch, or use --recover closed-form"
    )
