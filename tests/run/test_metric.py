"""The user's own figure of merit: its contract, what is refused, and that it is measured once per artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mm_edge.errors import UsageError
from mm_edge.records import MetricValue
from mm_edge.run.metric import Runner, open_metric
from mm_edge.run.reuse import load_or_measure, measure_candidate
from mm_edge.store import RunStore

CODE = """
import numpy as np

def mean(run):
    return run({"x": np.ones((1, 3))})["y"].mean()

def named(run):
    return {"error": np.float32(run({"x": np.ones((2, 3), np.float32)})["y"].sum()), "count": 2}

named.higher_is_better = False

def odd(run):
    return 1.0

odd.higher_is_better = "yes"

def raises(run):
    raise RuntimeError("no more\\ncopper")

def leaves(run):
    raise SystemExit(3)

def wrong_input(run):
    return run({"z": np.ones((1, 3))})

def nothing(run): return None
def text(run): return "0.5"
def truth(run): return True
def not_a_number(run): return float("nan")
def many(run): return np.ones(3)
def empty(run): return {}
def unnamed(run): return {1: 0.5}
def partly(run): return {"a": 0.5, "b": float("inf")}
def long(run): return list(range(1000))

class Score:
    def __call__(self, run):
        return 0.25

score = Score()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "score.py"
    file.write_text(CODE)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "double.onnx")


def save(file: Path, dtype: int = TensorProto.FLOAT) -> Path:
    """A network that doubles."""
    values = [helper.make_tensor_value_info(name, dtype, ("N", 3)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


def test_a_runner_takes_and_gives_arrays_by_name(model: Path, tmp_path: Path) -> None:
    run = Runner(model)
    assert run.inputs == {"x": ("N", 3)} and run.outputs == ("y",)
    assert run({"x": np.full((1, 3), 2.0)})["y"].tolist() == [[4, 4, 4]]
    half = Runner(save(tmp_path / "half.onnx", TensorProto.FLOAT16))
    assert half({"x": np.ones((1, 3), np.float32)})["y"].dtype == np.float16


def test_a_number_or_a_dict_of_numbers(code: Path, model: Path) -> None:
    assert open_metric(f"{code}:mean").measure(model, "it") == MetricValue("mean", 2.0)
    named = MetricValue("error", 12.0, higher_is_better=False, others={"count": 2.0})
    assert open_metric(f"{code}:named").measure(model, "it") == named
    assert open_metric(f"{code}:score").measure(model, "it") == MetricValue("score", 0.25)


def refusal(metric: str, model: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_metric(metric).measure(model, "the dense network")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value).replace(metric.partition(".py")[0], "score")


def test_what_is_no_metric_is_one_line(code: Path, model: Path) -> None:
    assert refusal("score", model) == (
        "--metric 'score' is not FILE.py:CALLABLE; write for example --metric score.py:accuracy"
    )
    assert refusal(f"{code.parent}/none.py:mean", model) == "--metric score.py:mean: the file 'score.py' does not exist"
    assert refusal(f"{code}:Mean", model).startswith(
        "--metric score.py:Mean: unknown callable 'Mean'; did you mean mean"
    )
    assert refusal(f"{code}:odd", model) == ("--metric score.py:odd: its higher_is_better is 'yes'; give True or False")
    code.write_text("import nothing_of_this_name")
    assert refusal(f"{code}:mean", model) == (
        "--metric score.py:mean: importing 'score.py' failed: "
        "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    )


def test_a_metric_that_raises_is_one_line(code: Path, model: Path) -> None:
    failed = "failed for the dense network"
    assert refusal(f"{code}:raises", model) == f"--metric score.py:raises {failed}: RuntimeError: no more"
    assert refusal(f"{code}:leaves", model) == f"--metric score.py:leaves {failed}: SystemExit: 3"
    assert refusal(f"{code}:wrong_input", model).startswith(f"--metric score.py:wrong_input {failed}: ValueError: ")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("nothing", "None"),
        ("text", "'0.5'"),
        ("truth", "True"),
        ("not_a_number", "nan"),
        ("many", "array([1., 1., 1.])"),
        ("empty", "{}"),
        ("unnamed", "{1: 0.5}"),
        ("partly", "{'a': 0.5, 'b': inf}"),
        ("long", f"{str(list(range(1000)))[:57]}..."),
    ],
)
def test_what_is_no_figure_is_one_line(code: Path, model: Path, name: str, shown: str) -> None:
    assert refusal(f"{code}:{name}", model) == (
        f"--metric score.py:{name} returned {shown} for the dense network; "
        "return a finite number, or a dict from names to finite numbers"
    )


class Job:
    def __init__(self, folder: Path) -> None:
        self.store = RunStore(folder)
        self.notes: list[str] = []

    def note(self, *texts: str) -> None:
        self.notes.extend(texts)


def test_an_artifact_is_measured_once(code: Path, model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code.write_text(f"def count(run):\n    with open({str(log)!r}, 'a') as file: file.write('x')\n    return 1.5\n")
    job: Any = Job(tmp_path / "run")
    with job.store.lock():
        for _ in range(2):
            assert load_or_measure(job, open_metric(f"{code}:count"), model, "it") == MetricValue("count", 1.5)
        assert log.read_text() == "x"
        code.write_text(code.read_text() + "\n")
        load_or_measure(job, open_metric(f"{code}:count"), model, "it")
        assert log.read_text() == "xx"
        save(model, TensorProto.DOUBLE)
        load_or_measure(job, open_metric(f"{code}:count"), model, "it")
        assert log.read_text() == "xxx"


def test_a_candidate_for_which_the_metric_fails_has_none_and_a_note(code: Path, model: Path, tmp_path: Path) -> None:
    job: Any = Job(tmp_path / "run")
    with job.store.lock():
        assert measure_candidate(job, open_metric(f"{code}:mean"), model, "a") == MetricValue("mean", 2.0)
        assert measure_candidate(job, open_metric(f"{code}:raises"), model, "b") is None
    assert job.notes == [f"b has no figure of merit: --metric {code}:raises failed for b: RuntimeError: no more"]
