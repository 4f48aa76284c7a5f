"""Budgets: what they are called, how plans are drawn to them, and that the rows they bring meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file
from tiny_graphs import structure_of, tiny

from mm_edge.api import run_job
from mm_edge.bench.target import Target, load_target, resolve_host
from mm_edge.errors import ConstraintError, UsageError
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.costs import RunningCost
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.load.models import LoadedModel, LoadOptions, load_model
from mm_edge.plan.budgets import BudgetCheck, Draft, counts_of, meet, words_for
from mm_edge.progress import Stages
from mm_edge.records import Budget, Constraints, Report, asked_budgets, from_json
from mm_edge.run import networks
from mm_edge.run import plan as planning
from mm_edge.run.request import make_request
from mm_edge.run.timing import DeviceTimer
from mm_edge.store import RunStore

CHAIN = "a = Conv(x, w1) r = Relu(a) b = Conv(r, w2) s = Relu(b) y = Conv(s, w3)"


@pytest.fixture(scope="module")
def chain() -> Structure:
    return structure_of(
        tiny("float[1,3,4,4] x", CHAIN, {"w1": (96, 3, 1, 1), "w2": (64, 96, 1, 1), "w3": (4, 64, 1, 1)})
    )


def test_a_running_cost_is_the_cost_of_its_counts(chain: Structure) -> None:
    first, second = (group.leaf for group in chain.groups)
    assert chain.macs() == 16 * (96 * 3 + 64 * 96 + 4 * 64)
    running = RunningCost(chain.mac_cost, {first: 96, second: 64})
    change = running.change(first, 48)
    assert change == 16 * (48 * 3 + 64 * 48) - 16 * (96 * 3 + 64 * 96)
    running.apply(first, 48)
    running.apply(second, 16)
    assert running.total == chain.macs({first: 48, second: 16}) == 16 * (48 * 3 + 16 * 48 + 4 * 16)


def test_what_budgets_are_called() -> None:
    limits = Constraints(max_drop=1, latency_ms=3.5, speedup=1.5, size_bytes=2_000_000)
    found = asked_budgets((0.7, 0.5), limits, ("structured",))
    assert [item.asked for item in found] == [
        "--macs 0.7",
        "--macs 0.5",
        "--latency 3.5",
        "--speedup 1.5",
        "--size 2000000",
    ]
    assert [item.strategy for item in found] == ["macs_0.7", "macs_0.5", "latency_3.5", "speedup_1.5", "size_2000000"]
    # Zeros in dense shapes make nothing faster, so nothing is scaled for them.
    assert asked_budgets((0.7,), limits, ("unstructured",)) == (Budget("macs", 0.7),)


def check_of(chain: Structure, check: Callable[[float], float], target: float, **changes: Any) -> BudgetCheck:
    cost, dense = chain.mac_cost, chain.macs()

    def checked(keep: Keep) -> float:
        return check(cost.total(counts_of(keep)) / dense)

    return replace(BudgetCheck(target, cost, dense, 1.0, checked, 0.97, (0.95, 0.99)), **changes)


def draw(chain: Structure, asked: list[float] | None = None) -> Callable[[float], Draft]:
    """Return what narrows the first group alone until the multiply-adds are at or below a share."""
    first = chain.groups[0]

    def drafted(aim: float) -> Draft:
        if asked is not None:
            asked.append(aim)
        counts = range(first.size, 0, -1)
        count = next((n for n in counts if chain.macs({first.leaf: n}) <= aim * chain.macs()), 1)
        return Draft({first.leaf: np.arange(first.size) < count})

    return drafted


def test_time_that_falls_less_than_its_model_is_corrected_once(chain: Structure) -> None:
    """Half of the time does not depend on the widths: a linear law, which one correction meets."""
    asked: list[float] = []
    by_time = check_of(chain, lambda share: 0.5 + 0.5 * share, 0.8)
    met = meet(draw(chain, asked), by_time)
    assert met.corrections == 1 and met.fits(by_time)
    assert asked == pytest.approx([0.97 * 0.8, 2 * 0.97 * 0.8 - 1], abs=0.02)
    assert 0.95 * 0.8 <= met.share <= 0.99 * 0.8


def test_what_is_counted_needs_no_correction(chain: Structure) -> None:
    counted = check_of(chain, lambda share: share, 0.6, aim=1.0, window=(0.97, 1.0))
    met = meet(draw(chain), counted)
    assert met.corrections == 0 and 0.97 * 0.6 <= met.share <= 0.6


def test_a_smaller_picture_starts_from_its_own_time(chain: Structure) -> None:
    """The unpruned network there takes 0.7 of the time, modelled as 1.0: the first draft is that much narrower."""
    asked: list[float] = []
    meet(draw(chain, asked), check_of(chain, lambda share: 0.7 * share, 0.5, whole=0.7))
    assert asked == pytest.approx([0.97 * 0.5 / 0.7])


def test_a_target_out_of_reach_gives_the_cheapest_and_does_not_fit(chain: Structure) -> None:
    stuck = check_of(chain, lambda share: 0.9 + 0.1 * share, 0.5)
    met = meet(draw(chain), stuck)
    assert not met.fits(stuck)
    slower = check_of(chain, lambda share: 1.2, 0.5)
    met = meet(draw(chain), slower)
    assert (met.share, met.corrections) == (1.2, 0)


def test_what_the_report_says_of_a_plan(chain: Structure) -> None:
    met = meet(draw(chain), check_of(chain, lambda share: 0.5 + 0.5 * share, 0.8))
    words = words_for(Budget("speedup", 1.25), met, measured=True, by_table=False)
    assert words == f"multiply-adds in place of time, measured at {1 / met.share:.2f}x, corrected once"
    met = replace(met, corrections=0)
    assert words_for(Budget("latency", 2), met, measured=True, by_table=True).startswith(
        "latencies of its groups, measu"
    )
    assert words_for(Budget("speedup", 2), met, measured=False, by_table=False) == (
        "multiply-adds in place of time, which is not measured"
    )
    assert words_for(Budget("size", 2), met, measured=False, by_table=False) == "bytes of the file, counted"
    assert words_for(Budget("macs", 0.5), met, measured=False, by_table=False) == "multiply-adds, counted"


# --- the whole job ----------------------------------------------------------------------------------------------------


def run(files: Path, out: Path, bench: bool = False, **fields: Any) -> Report:
    setting = {"out": out, "data": str(files / "images"), "bench": bench}
    usual: Any = {"signals": ("magnitude",), "strategies": ("balanced",), "input_sizes": "none", "recover": "bn"}
    asked: Any = {**usual, **fields}

    def read() -> LoadedModel:
        return load_model(str(files / "net.pt"), LoadOptions(input_size=(3, 32, 32)))

    return run_job(read, make_request(**setting, **asked), Stages())


def run_timed(files: Path, out: Path, **fields: Any) -> Report:
    """Run with real times. On a busy machine they may meet no limit; the report is written then too."""
    try:
        return run(files, out, bench=True, **fields)
    except ConstraintError:
        return from_json(Report, json.loads((out / "report.json").read_text()))


@pytest.mark.slow
def test_a_size_is_met_to_the_byte_and_the_report_says_who_won(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = run(files, tmp_path / "dense", recover="none").dense.file_bytes
    assert dense is not None
    limit = int(0.6 * dense)
    report = run(files, tmp_path / "run", recover="closed-form", constraints=Constraints(size_bytes=limit))
    rows = {row.id: row for row in report.candidates}
    scaled, allocated = (rows[f"{name}/size_{limit}/structured/fp32"] for name in ("magnitude", "sensitivity"))
    for row in (scaled, allocated):
        assert row.file_bytes is not None and 0.94 * limit <= row.file_bytes <= limit
        assert row.planned_by is not None and row.planned_by.startswith("bytes of the file, counted")
    (outcome,) = report.budgets
    assert outcome.asked == f"--size {limit}" and outcome.winner in rows
    assert outcome.reason.startswith(f"{outcome.winner} won under --size {limit} (top-1 ")
    assert "Mix-and-Match" in outcome.reason or "measured sensitivity" in outcome.reason
    assert f"- {outcome.reason.split(' won ')[0]}".replace("_", "\\_") in (tmp_path / "run" / "report.md").read_text()

    def refuse(*args: Any, **rest: Any) -> None:
        raise AssertionError("measured again")

    # What groups and blocks cost is measured once for all budgets.
    monkeypatch.setattr(networks, "measure_branches", refuse)
    monkeypatch.setattr(networks, "measure_sensitivities", refuse)
    again = run(files, tmp_path / "run", recover="closed-form", constraints=Constraints(size_bytes=limit - 2000))
    assert {row.strategy for row in again.candidates} == {"balanced", f"size_{limit - 2000}"}


def test_without_a_measurement_multiply_adds_stand_in_for_time_and_it_is_said(files: Path, tmp_path: Path) -> None:
    report = run(files, tmp_path, recover="bn", constraints=Constraints(speedup=1.5))
    (row,) = [row for row in report.candidates if row.strategy == "speedup_1.5"]
    assert 0.97 / 1.5 <= row.macs / report.dense.macs <= 1 / 1.5
    assert row.planned_by == "multiply-adds in place of time, which is not measured"
    assert report.chosen is not None
    if report.chosen.id == row.id:
        assert report.chosen.reason.endswith("planned by multiply-adds in place of time, which is not measured")


def test_time_is_measured_on_the_plan_and_corrected(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer is a law in which a third of the time never goes; the plans know it by measuring alone."""
    asked: list[float] = []
    dense_macs: list[float] = []

    def law(timer: DeviceTimer, key: Any, raw: RawGraph, structure: Structure, keep: Keep, *, quiet: bool) -> float:
        path = tmp_path / "plan.onnx"
        ir.save(materialise(raw, structure, keep), path)
        macs = read_structure(raw_from_onnx(path)).macs()
        if not dense_macs:
            dense_macs.append(read_structure(raw_from_onnx(timer.dense)).macs())
        asked.append(1 / 3 + 2 / 3 * macs / dense_macs[0])
        return asked[-1]

    monkeypatch.setattr(DeviceTimer, "share", law)
    report = run_timed(files, tmp_path / "run", recover="none", constraints=Constraints(speedup=1.3))
    (row,) = [row for row in report.candidates if row.strategy == "speedup_1.3"]
    share = 1 / 3 + 2 / 3 * row.macs / report.dense.macs
    assert share in [pytest.approx(item, abs=1e-6) for item in asked]
    assert 0.93 / 1.3 <= share <= 1 / 1.3
    assert row.planned_by == f"multiply-adds in place of time, measured at {1 / share:.2f}x, corrected once"
    assert row.latency_ms.p50 is not None  # the row itself was timed for real


@pytest.mark.slow
def test_plans_are_timed_once(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"recover": "none", "constraints": Constraints(latency_ms=1e-4)}
    with pytest.raises(ConstraintError, match=r"^no candidate meets --latency 0.0001; the nearest is magnitude/"):
        run(files, tmp_path, bench=True, **asked)
    kept = sorted((tmp_path / ".mm-edge" / "timed").iterdir())
    assert kept

    def refuse(*args: Any, **rest: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("mm_edge.run.timing.measure_pair", refuse)
    with pytest.raises(ConstraintError):
        run(files, tmp_path, bench=True, **asked)
    assert sorted((tmp_path / ".mm-edge" / "timed").iterdir()) == kept


def test_a_budget_that_dense_meets_adds_nothing(files: Path, tmp_path: Path) -> None:
    report = run(files, tmp_path, recover="none", constraints=Constraints(speedup=0.9))
    assert [item.id for item in report.candidates] == ["magnitude/balanced/structured/fp32"]


def test_nothing_is_planned_for_a_latency_where_time_is_emulated(tmp_path: Path) -> None:
    emulated: Any = SimpleNamespace(source="emulated")
    store = RunStore(tmp_path)
    budgets = asked_budgets((), Constraints(latency_ms=2, speedup=2), ("structured",))
    request = SimpleNamespace(allocate_by="macs")
    parts = {
        "budgets": budgets,
        "dense_file": tmp_path / "dense.onnx",
        "target": None,
        "transport": emulated,
        "store": store,
    }
    notes: list[str] = []
    job: Any = SimpleNamespace(**parts, request=request, note=lambda *texts: notes.extend(texts))
    dense: Any = None
    found = planning.measures_of(job, dense)
    assert [(item.budget, item.measured) for item in found] == [(Budget("speedup", 2), False)]
    assert notes == ["--latency 2: no time is measured here, so no candidate is planned for it"]
    request.allocate_by = "latency"
    planning.measures_of(job, dense)
    assert notes[2:] == ["--allocate-by latency: no time is measured here, so widths are allocated by multiply-adds"]


@pytest.mark.slow
def test_a_latency_table_is_measured_once_and_widths_are_taken_by_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer alone takes time here: the plan narrows it, and leaves most others as they are."""
    asked: list[int] = []
    slow = "layer4.0.conv1.weight"

    def law(timer: DeviceTimer, key: Any, raw: RawGraph, structure: Structure, keep: Keep, *, quiet: bool) -> float:
        shape = materialise(raw, structure, keep).graph.initializers[slow].shape
        assert shape is not None
        asked.append(int(shape.numpy()[0]))
        return 0.1 + 0.9 * asked[-1] / max(asked)

    def with_wide_steps(target: Target) -> Target:
        """This machine with steps of 16 channels: with narrower ones more groups lose a step, whatever they cost."""
        return replace(resolve_host(target), multiples=load_target("x86_64-avx512").multiples)

    monkeypatch.setattr(DeviceTimer, "share", law)
    monkeypatch.setattr("mm_edge.run.start.resolve_host", with_wide_steps)
    limits = Constraints(speedup=1.3)
    fields: Any = {"recover": "closed-form", "constraints": limits, "macs": ()}
    report = run_timed(files, tmp_path, allocate_by="latency", **fields)
    (row,) = [row for row in report.candidates if row.signal == "sensitivity"]
    assert row.planned_by is not None and row.planned_by.startswith("latencies of its groups, measured at ")
    assert row.masked_state_dict is not None
    state = load_file(tmp_path / row.masked_state_dict)
    narrowed = {name for name, array in state.items() if array.ndim == 4 and not array.any(axis=(1, 2, 3)).all()}
    assert slow in narrowed and len(narrowed) < len([array for array in state.values() if array.ndim == 4]) / 2
    with pytest.raises(UsageError, match=r"^--allocate-by latency times the network, and nothing is measured here; "):
        run(files, tmp_path / "other", allocate_by="latency", **fields)
