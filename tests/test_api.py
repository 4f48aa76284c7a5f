"""mm_edge.prune_export takes every option of the command line, refuses what it does not know, says what it made."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mm_edge
from mm_edge import api
from mm_edge.api import Result
from mm_edge.errors import UsageError
from mm_edge.formats.registry import FORMATS, Format
from mm_edge.plan.signals import SIGNALS, Signal, magnitude
from mm_edge.plan.strategies import STRATEGIES
from mm_edge.records import Candidate, Chosen, Constraints, DenseFigures, Latency, ModelInfo, Report, from_json, to_json
from mm_edge.run.options import Flags, list_options
from mm_edge.run.recoveries import RECOVERIES, Recovery
from mm_edge.run.request import RULES, SECTIONS, ModelOptions, Request, make_model_options, make_request

IMAGES = torch.zeros(1, 3, 16, 16)
FILE_ONLY = {"arch", "input_size", "trust_pickle", "layout"}


def make_report(chosen: bool = True) -> Report:
    candidate = Candidate(
        "magnitude/balanced/structured/fp32",
        "magnitude",
        "balanced",
        "structured",
        "fp32",
        0.5,
        100,
        1000,
        (1, 3, 16, 16),
        accuracy_top1=0.9,
        pareto=True,
        artifact="candidates/a.onnx",
    )
    return Report(
        model=ModelInfo("net", "Python module", None, 200, 2000, (1, 3, 16, 16), 3),
        target={"name": "host"},
        environment={},
        data={},
        dense=DenseFigures(0.91, Latency(), None, 800, 200, 2000),
        candidates=(candidate,),
        chosen=Chosen(candidate.id, "the only one") if chosen else None,
        constraints=Constraints(),
        skipped_groups=(),
        warnings=("one", "two"),
        seconds={"load": 1.0},
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Request]:
    """Stand in for the job; the requests it was given."""
    requests: list[Request] = []

    def run_job(load: object, request: Request, stages: object) -> Result:
        requests.append(request)
        return Result.of(make_report(), request.out)

    monkeypatch.setattr(api, "run_job", run_job)
    monkeypatch.chdir(tmp_path)
    return requests


def refuse(*positional: Any, **options: Any) -> str:
    """Expect prune_export to refuse before anything is written; return the message."""
    arguments = positional or (nn.Conv2d(3, 3, 3), IMAGES)
    with pytest.raises(UsageError) as caught:
        mm_edge.prune_export(*arguments, **options)
    assert list(Path().iterdir()) == []
    return str(caught.value)


# --- what is not known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "balanced"}, "unknown option 'strategy'; did you mean strategies?"),
        ({"signal": "magnitude"}, "unknown option 'signal'; did you mean signals?"),
        ({"max_dorp": 1}, "unknown option 'max_dorp'; did you mean max_drop?"),
        ({"latency_ms": 1}, "unknown option 'latency_ms'; did you mean latency?"),
        ({"strategy": None}, "unknown option 'strategy'; did you mean strategies?"),
        ({"zzz": 1}, "unknown option 'zzz'; help(mm_edge.prune_export) lists the options"),
        ({"arch": "resnet18"}, "arch says how to read a file, and the module is in memory; leave it out"),
        (
            {"inputs": "input=1,3,8,8"},
            "inputs: input has shape (1, 3, 8, 8), and example_input (1, 3, 16, 16); give an example of that shape",
        ),
        ({"inputs": {"images": (1, 3, 16, 16)}}, "inputs: unknown input 'images'; allowed: input"),
        ({"strategies": "balancd"}, "unknown strategy 'balancd'; did you mean balanced?"),
        ({"strategies": ()}, f"no strategy given; allowed: all, {', '.join(STRATEGIES)}"),
        ({"signals": ("magnitud",)}, "unknown signal 'magnitud'; did you mean magnitude?"),
        ({"kinds": ()}, "--kinds is empty; allowed: structured, n:m, unstructured"),
        ({"precision": "int9"}, "unknown --precision 'int9'; did you mean int8?"),
        ({"formats": "otr"}, "unknown format 'otr'; did you mean ort?"),
        ({"recover": "bm"}, "unknown --recover 'bm'; did you mean bn?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    asked: list[Request], options: dict[str, Any], message: str
) -> None:
    assert refuse(**options) == message
    assert asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": "half"}, "--macs 'half' is not a list of numbers; write for example --macs 0.5,0.25"),
        ({"macs": 1.5}, "--macs 1.5 is not a fraction of the dense MACs; give values between 0 and 1"),
        ({"macs": float("nan")}, "--macs 'nan' is not a list of numbers; write for example --macs 0.5,0.25"),
        ({"max_drop": "much"}, "--max-drop 'much' is not a number; write for example --max-drop 1"),
        ({"max_drop": float("nan")}, "--max-drop nan is not a number of points; write for example --max-drop 1"),
        ({"latency": "fast"}, "--latency 'fast' is not a number; write for example --latency 5"),
        ({"speedup": True}, "--speedup True is not a number; write for example --speedup 1.5"),
        ({"speedup": 0}, "--speedup 0 can never be met or missed; give a number above 0"),
        ({"size": 1.5}, "--size 1.5 is not a whole number; write for example --size 1000000"),
        ({"size": "1 MB"}, "--size '1 MB' is not a whole number; write for example --size 1000000"),
        ({"seed": -1}, "--seed -1 is not in the range 0 to 9223372036854775807"),
        ({"data": torch.zeros(2, 3, 16, 16)}, "--data takes a path or the name of a data set, not a Tensor"),
        ({"data": 3}, "--data takes a path or the name of a data set, not an int"),
        ({"out": 3}, "--out takes a path, not an int"),
        ({"target": 3}, "--target takes the name or file of a device profile, not an int"),
        ({"strategies": 3}, f"--strategies takes names, not an int; allowed: {', '.join(STRATEGIES)}"),
        ({"ranges": ("rules",)}, "--ranges takes one name, not a tuple; allowed: rules, observed"),
        ({"keep": 3}, "--keep takes patterns of parameter names, not an int"),
        ({"bench": "no"}, "bench takes True or False, not 'no'"),
        ({"ort": 1}, "ort takes True or False, not 1"),
        ({"split": (0.5, 0.5)}, "--split '0.5,0.5' has 2 parts; write CAL,VAL,TEST such as 0.5,0.25,0.25"),
        ({"input_sizes": "big"}, "--input-sizes 'big' is not auto, none or sides in pixels such as 224,192"),
        ({"input_sizes": (0,)}, "--input-sizes '0': give sides of 1 pixel or more, such as 224,192"),
        ({"mean": "grey"}, "--mean 'grey' is not a list of numbers; write for example --mean 0.485,0.456,0.406"),
        ({"recover": "bn"}, "--recover bn needs calibration images; give --data PATH"),
        ({"labels": "a.json"}, "--labels a.json labels photos; give --data PATH with it"),
        (
            {"labels": "a.json", "data": "photos", "metric": "a.py:b"},
            "--labels and --metric are two figures of merit; leave one out, or read the labels in the metric",
        ),
        ({"epochs": 3}, "--epochs 3 is for fine-tuning; give --recover finetune with it"),
        ({"epochs": 0}, "--epochs 0 trains nothing; give at least 1"),
        ({"select": "obs"}, "--select obs goes by the closed form's moments; give --recover closed-form with it"),
        (
            {"allocate_by": "latency"},
            "--allocate-by latency is for budgets of time; give --speedup X or --latency MS with it",
        ),
        (
            {"host": "pi", "bench": False},
            "--host names a device to measure on and --no-bench measures nothing; leave one out",
        ),
        (
            {"constraints": 1},
            "constraints takes a records.Constraints, not an int; give max_drop, latency, speedup or size",
        ),
        (
            {"constraints": Constraints(speedup=2), "speedup": 2},
            "speedup is given twice: by constraints too; leave constraints out",
        ),
        (
            {"precisions": ("int8",), "precision": "int8"},
            "precision is given twice: by precisions too; leave precisions out",
        ),
    ],
)
def test_a_value_that_is_wrong_is_refused(asked: list[Request], options: dict[str, Any], message: str) -> None:
    assert refuse(**options) == message
    assert asked == []


def test_what_is_no_module_or_no_batch_of_images_is_refused(asked: list[Request]) -> None:
    module = nn.Conv2d(3, 3, 3)
    assert refuse("net.pt", IMAGES) == (
        "module is a str, not a torch.nn.Module; for a file use: mm-edge prune-export FILE"
    )
    assert refuse(module, [IMAGES]) == "example_input is a list, not a tensor; give a batch of images (N, C, H, W)"
    assert refuse(module, (IMAGES, 3)) == "example_input is an int, not a tensor; give a batch of images (N, C, H, W)"
    assert refuse(module, ()) == "example_input has no tensor; give a batch of images (N, C, H, W)"
    assert refuse(module, IMAGES[0]) == "example_input has shape (3, 16, 16); give a batch of images (N, C, H, W)"
    assert refuse(module, IMAGES, "host", "images", "run", "more") == (
        "prune_export takes target, data, out by position at most; give the other options by name"
    )
    assert refuse(module, IMAGES, "host", target="host") == (
        "target is given twice: by position and by name; leave one out"
    )


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"macs": 0.5}, "macs", (0.5,)),
        ({"macs": "0.5,0.25"}, "macs", (0.5, 0.25)),
        ({"strategies": "balanced"}, "strategies", ("balanced",)),
        ({"strategies": "balanced, upper_70th,balanced"}, "strategies", ("balanced", "upper_70th")),
        ({"strategies": ["balanced"]}, "strategies", ("balanced",)),
        ({"strategies": "all"}, "strategies", tuple(STRATEGIES)),
        ({"precision": "int8"}, "precision", ("int8",)),
        ({"precisions": ("fp32", "int8")}, "precision", ("fp32", "int8")),
        ({"max_drop": 1}, "max_drop", 1.0),
        ({"max_drop": "1"}, "max_drop", 1.0),
        ({"constraints": Constraints(1, 2, 3, 4)}, "constraints", Constraints(1, 2, 3, 4)),
        ({"ort": True}, "formats", ("ort",)),
        ({"ort": False}, "formats", ()),
        ({"bake_preprocess": True, "formats": ("ort",)}, "formats", ("ort", "bake-preprocess")),
        ({"keep": "layer4.*"}, "keep", ("layer4.*",)),
        ({"mean": 0.5}, "mean", (0.5,)),
        ({"mean": torch.tensor([0.5, 0.25])}, "mean", (0.5, 0.25)),
        ({"data": Path("images")}, "data", "images"),
        ({"data": "images"}, "recover", "closed-form"),
        ({"data": "images"}, "select", "auto"),
        ({"data": "images", "recover": "bn"}, "select", "signal"),
        ({"input_sizes": 224}, "input_sizes", (224,)),
        ({"input_sizes": "224,192"}, "input_sizes", (224, 192)),
        ({"input_sizes": "none"}, "input_sizes", "none"),
        ({"bench": False}, "bench", False),
        ({"seed": None}, "seed", 0),
    ],
)
def test_values_are_taken_as_one_writes_them(
    asked: list[Request], options: dict[str, Any], field: str, value: object
) -> None:
    mm_edge.prune_export(nn.Conv2d(3, 3, 3), IMAGES, **options)
    assert getattr(asked[0], field) == value
    assert asked[0].out == Path("mm-edge-Conv2d")


def test_target_data_and_run_directory_may_be_given_by_position(asked: list[Request]) -> None:
    result = mm_edge.prune_export(nn.Conv2d(3, 3, 3), IMAGES, "arm64", "images", "run")
    assert (asked[0].target, asked[0].data, asked[0].out) == ("arm64", "images", Path("run"))
    assert result.folder == Path("run")


def test_a_name_added_to_a_registry_counts_at_once(asked: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "taylor", Signal("a first-order estimate", False, magnitude))
    monkeypatch.setitem(FORMATS, "my-runtime", Format("Also write it for my runtime.", lambda *_: []))
    monkeypatch.setitem(RECOVERIES, "nothing-at-all", Recovery("does nothing"))
    request = make_request(signals="taylor", my_runtime=True, recover="nothing-at-all", data="images")
    assert (request.signals, request.formats, request.recover) == (("taylor",), ("my-runtime",), "nothing-at-all")


# --- one declaration --------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.state = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(5, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(image)))) + self.state(state)[:, :, None, None]
        found: torch.Tensor = self.head(torch.relu(x))
        return found


@pytest.mark.slow
def test_a_module_of_two_inputs_takes_arrays_and_shapes_by_the_names_of_its_arguments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    arrays = {"image": random.standard_normal((12, 3, 16, 16)), "state": random.standard_normal((12, 5))}
    np.savez(tmp_path / "data.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})  # type: ignore[arg-type]
    result = mm_edge.prune_export(
        TwoInputs(), (IMAGES, torch.zeros(1, 5)), data=tmp_path / "data.npz", out=tmp_path / "run", bench=False,
        strategies="balanced", signals=("magnitude", "gradient"), select="signal",
        inputs={"image": (1, 3, 16, 16), "state": [1, 5]},
    )  # fmt: skip
    assert {candidate.signal for candidate in result.candidates} == {"magnitude", "gradient"}
    assert all(candidate.fidelity is not None for candidate in result.candidates)


def test_every_option_is_in_the_signature_and_in_the_help_with_type_and_default() -> None:
    parameters = inspect.signature(mm_edge.prune_export).parameters
    options = {name: item for name, item in list_options(Request).items() if name not in FILE_ONLY}
    flags = {key for item in options.values() if isinstance(item.kind, Flags) for key in item.kind.keywords()}
    assert set(parameters) == {"module", "example_input", *options, *flags}
    assert flags == {"ort", "bake_preprocess"}
    assert parameters["strategies"].annotation == tuple[str, ...]
    assert parameters["max_drop"].annotation == (float | None)
    assert parameters["bench"].default is True and parameters["bench"].annotation is bool
    text = inspect.getdoc(mm_edge.prune_export)
    assert text is not None
    for name, item in options.items():
        assert f"\n    {name} (" in text
        assert (item.python_help or item.help).split()[0] in text
    assert "strategies (tuple[str, ...], default all): " in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_field_is_an_option_in_a_group_and_the_defaults_agree() -> None:
    options = list_options(Request)
    assert list(options) == [field.name for field in dataclasses.fields(Request)]
    assert {item.section for item in options.values()} == set(SECTIONS)
    assert make_request() == Request()
    assert make_model_options() == ModelOptions()
    assert Request().constraints == Constraints()
    for item in options.values():
        if item.default not in (None, ()):
            assert item.read(item.default) == item.default, item.name
    for rule in RULES:
        assert rule(Request(), ()) is None


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_result_is_the_report_and_knows_its_files(tmp_path: Path) -> None:
    report = make_report()
    result = Result.of(report, tmp_path)
    assert isinstance(result, Report) and result.chosen == report.chosen
    assert result == report and report == result and result == Result.of(report, Path("elsewhere"))
    assert result != make_report(chosen=False) and result != "report"
    assert result.folder == tmp_path
    assert result.chosen_path == tmp_path / "candidates" / "a.onnx"
    assert Result.of(make_report(chosen=False), tmp_path).chosen_path is None
    assert dataclasses.replace(result, warnings=()).folder == tmp_path
    assert from_json(Report, json.loads(json.dumps(to_json(result)))) == report
    assert "folder" not in to_json(result)


def test_a_result_prints_as_a_summary() -> None:
    lines = str(Result.of(make_report(), Path("run"))).splitlines()
    assert lines[1:] == [
        "dense:       net, top-1 91.00 %, p50 not measured, file 800 B",
        "chosen:      magnitude/balanced/structured/fp32, top-1 90.00 %, p50 not measured, speed-up not measured, file "
        "not measured",
        "chosen file: run/candidates/a.onnx",
        "target:      host",
        "candidates:  1, 1 of them on the front",
        "warnings:    2",
        "full report: run/report.md",
    ]
    assert len(str(Result.of(make_report(chosen=False), Path("run"))).splitlines()) == 6


# --- the job ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.relu(self.body(torch.relu(self.stem(images)))).mean((2, 3)))
        return found


def test_a_job_runs_with_progress_on_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    result = mm_edge.prune_export(
        Small(), IMAGES, out=tmp_path / "run", strategies="balanced", bench=False, mean=(0.5,), std=(0.25,)
    )
    out, err = capfd.readouterr()
    assert out == "" and "candidates: " in err
    assert [candidate.id for candidate in result.candidates] == ["magnitude/balanced/structured/fp32"]
    assert result.folder == tmp_path / "run"
    assert result.chosen is None and result.chosen_path is None  # nothing was compared with the dense network
    assert result.candidates[0].artifact is not None
    assert (result.folder / result.candidates[0].artifact).is_file()
    assert result == from_json(Report, json.loads((tmp_path / "run" / "report.json").read_text()))
    assert len(str(result).splitlines()) <= 10
