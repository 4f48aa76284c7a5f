"""Measuring through a transport: records, what is refused, what is reused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_models import save_convs
from scripted import HOST, Scripted

from mm_edge.bench import session, transport
from mm_edge.bench.transport import LocalTransport
from mm_edge.errors import BenchError


def samples(**changes: Any) -> dict[str, Any]:
    """Return what each of the four processes of a measurement of 200 pairs sends."""
    state = {"frequency_khz": 1_800_000, "temperature_c": None, "throttled": None}
    return {
        "dense_ns": [2_000_000] * 50,
        "candidate_ns": [1_000_000] * 50,
        "disturbed": [0] * 50,
        "sittings": [25] * 2,
        "clocks_khz": [],
        "load": {"cores": 4, "others": 0.0, "stolen": 0.0},
        "block": 4,
        "threads": 2,
        "warm_up_runs": 20,
        "warm_up_stable": True,
        "before": state,
        "after": state,
        **changes,
    }


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return save_convs(tmp_path / "dense.onnx", 32), save_convs(tmp_path / "small.onnx", 8)


def test_local_measurement(models: tuple[Path, Path]) -> None:
    with LocalTransport() as here:
        measured = session.measure_pair(*models, HOST, transport=here)
        machine = session.environment(HOST, here)
        peak = session.measure_memory(models[0], HOST, transport=here)
    assert 100 <= measured.latency.samples <= 404
    assert measured.verdict in ("stable", "noisy", "unusable")
    assert measured.latency.source == "host"
    times = [measured.latency.p50, measured.latency.p90, measured.latency.p99]
    assert None not in times
    assert times == sorted(time or 0.0 for time in times)
    assert measured.ratio is not None and measured.ratio > 1
    assert measured.ratio_ci is not None
    assert measured.ratio_ci[0] <= measured.ratio <= measured.ratio_ci[1]
    assert measured.speedup == (None if measured.verdict == "unusable" else measured.ratio)
    assert len(machine["fingerprint"]) == 16
    assert machine["transport"] == "this machine"
    assert peak is not None and peak >= 0


def test_speedup_of_steady_times(models: tuple[Path, Path]) -> None:
    device = Scripted(samples(candidate_ns=[500_000] * 50))
    measured = session.measure_pair(*models, HOST, transport=device)
    assert measured.speedup == pytest.approx(4) and measured.speedup_ci == pytest.approx((4, 4))
    assert measured.verdict == measured.latency.verdict == measured.dense_latency.verdict == "stable"
    assert measured.latency.p50 == 0.5
    assert measured.dense_latency.source == "device"
    assert measured.latency.threads == 2
    assert measured.doubts == ()


def test_a_pair_is_timed_in_several_processes(models: tuple[Path, Path]) -> None:
    quick, slow = samples(), samples(candidate_ns=[1_100_000] * 50, warm_up_stable=False)
    loads: list[dict[str, Any]] = [{"cores": 4, "others": busy, "stolen": 0.0} for busy in (0.0, 0.4)]
    device = Scripted({**quick, "load": loads[0]}, {**slow, "load": loads[1]})
    measured = session.measure_pair(*models, HOST, transport=device, pairs=200)
    assert [options["pairs"] for _, _, options in device.asked] == [50] * 4
    assert measured.ratio == pytest.approx(2 / 1.1**0.5)  # the mean of both, although each process was steady
    assert measured.latency.samples == 200 and measured.verdict == "noisy"
    assert [doubt.kind for doubt in measured.doubts] == ["warm-up"]
    unknown = Scripted({**quick, "load": {**loads[0], "others": None}}, {**slow, "load": loads[1]})
    assert session.measure_pair(*models, HOST, transport=unknown).ratio_ci is not None


def test_emulated_times_are_not_even_taken(models: tuple[Path, Path]) -> None:
    device = Scripted({}, source="emulated")
    measured = session.measure_pair(*models, HOST, transport=device)
    assert (measured.speedup, measured.latency.p50, measured.latency.source) == (None, None, None)
    assert measured.doubts == (session.EMULATED,)
    assert session.measure_memory(models[0], HOST, transport=device) is None
    assert session.measure_footprint(models[0], HOST, transport=device).file_bytes == models[0].stat().st_size
    assert session.measure_null(HOST, transport=device) is None
    assert device.asked == []


def test_doubtful_runs_say_so_and_name_the_remedy(models: tuple[Path, Path]) -> None:
    changes = {
        "candidate_ns": [1_000_000, 3_000_000] * 25,
        "after": {"frequency_khz": 900_000},
        "warm_up_stable": False,
    }
    replies = [
        samples(**changes, dense_ns=[dense_ns] * 50) for dense_ns in (1_000_000, 1_000_000, 1_200_000, 1_200_000)
    ]
    measured = session.measure_pair(*models, HOST, transport=Scripted(*replies))
    text = "\n".join(doubt.text for doubt in measured.doubts)
    assert "the spread of the samples is 100% of their median: stop other programs" in text
    assert "ended 20% slower than it began" in text
    assert "the clock was between 900 and 1800 MHz while measuring" in text
    assert "warm-up did not settle" in text


def sittings_of(*ratios: float) -> dict[str, Any]:
    """Return samples of two sittings of each process, whose ratios are `ratios` over and over."""
    wanted = [ratios[index % len(ratios)] for index in range(2)]
    return samples(dense_ns=[round(1_000_000 * ratio) for ratio in wanted for _ in range(25)])


def test_verdicts_by_the_width_of_the_interval(models: tuple[Path, Path]) -> None:
    def measure(reply: dict[str, Any]) -> session.Measurement:
        return session.measure_pair(*models, HOST, transport=Scripted(reply))

    stable, noisy, unusable = (measure(sittings_of(2 - d, 2 + d)) for d in (0.02, 0.12, 0.4))
    assert [stable.verdict, noisy.verdict, unusable.verdict] == ["stable", "noisy", "unusable"]
    assert stable.speedup is not None and noisy.speedup is not None and noisy.speedup_ci is not None
    assert (unusable.speedup, unusable.speedup_ci) == (None, None)
    assert unusable.ratio is not None and unusable.latency.p50 == 1.0
    assert unusable.doubts[0].text == (
        "times are unusable and no speed-up is stated: stop other programs and measure again (the interval is +-18%); "
        "other programs kept 0.0 of 4 cores busy; 0% of the pairs were disturbed"
    )
    assert session.merge_doubts([noisy, unusable])[0].startswith("times are unusable")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"disturbed": [0, 1] * 25},
            "the device was busy while measuring: other programs kept 0.0 of 4 cores busy; 50% of the pairs were "
            "disturbed; stop other programs and measure again",
        ),
        (
            {"load": {"cores": 2, "others": 1.04, "stolen": 0.2}},
            "the device was busy while measuring: other programs kept 1.0 of 2 cores busy, the hypervisor took 0.2; 0% "
            "of the pairs were disturbed; stop other programs and measure again",
        ),
        (
            {"clocks_khz": [1_800_000, 1_200_000]},
            "the clock was between 1200 and 1800 MHz while measuring: let the device cool, or fix its clock",
        ),
        (
            {"before": {"throttled": 3}, "after": {"throttled": 5}},
            "the cores were slowed down against heat 2 times while measuring: let the device cool",
        ),
    ],
)
def test_what_disturbs_makes_a_measurement_noisy(models: tuple[Path, Path], changes: dict[str, Any], text: str) -> None:
    measured = session.measure_pair(*models, HOST, transport=Scripted(samples(**changes)))
    assert measured.verdict == "noisy"
    assert [doubt.text for doubt in measured.doubts] == [text]
    assert measured.speedup == pytest.approx(2)


def test_disturbed_pairs_do_not_count(models: tuple[Path, Path]) -> None:
    """Every tenth pair was disturbed, and its dense run took ten times as long."""
    marks = [int(index % 10 == 0) for index in range(50)]
    slow = [20_000_000 if mark else 2_000_000 for mark in marks]
    measured = session.measure_pair(*models, HOST, transport=Scripted(samples(dense_ns=slow, disturbed=marks)))
    assert measured.verdict == "stable" and measured.speedup == pytest.approx(2)
    assert measured.latency.samples == 180 and measured.dense_latency.p99 == 2.0


def test_a_machine_that_says_nothing_of_its_load_is_believed(models: tuple[Path, Path]) -> None:
    quiet = samples(load={"cores": 1, "others": None, "stolen": None})
    assert session.measure_pair(*models, HOST, transport=Scripted(quiet)).verdict == "stable"


def test_one_sentence_per_kind_of_doubt_the_worst_with_its_count(models: tuple[Path, Path]) -> None:
    def measure(**changes: Any) -> session.Measurement:
        return session.measure_pair(*models, HOST, transport=Scripted(samples(**changes)))

    mild, wild = [1_000_000, 1_500_000] * 25, [1_000_000, 3_000_000] * 25
    rows = [measure(candidate_ns=mild), measure(candidate_ns=wild), measure(), measure(warm_up_stable=False)]
    spread, warm_up = session.merge_doubts(rows)
    assert spread.startswith("the spread of the samples is 100% of their median: stop other programs")
    assert spread.endswith("and measure again (the worst of 2 such among 4 measurements)")
    assert warm_up == "warm-up did not settle: stop other programs and measure again"
    assert session.merge_doubts(rows[2:3]) == []


def test_samples_are_kept_and_reused_only_where_they_belong(models: tuple[Path, Path], tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "a.json"
    device = Scripted(samples())

    def measure(**changes: Any) -> session.Measurement:
        arguments: dict[str, Any] = {"transport": device, "raw_samples": raw, "fingerprint": "machine-a", **changes}
        return session.measure_pair(*models, HOST, **arguments)

    first = measure()
    assert json.loads(raw.read_text())["result"]["dense_ns"] == [2_000_000] * 200
    assert measure() == first
    assert len(device.asked) == 4
    measure(fingerprint="machine-b")
    assert len(device.asked) == 8
    raw.write_text('{"samples_version": damaged')
    measure(fingerprint="machine-b")
    assert len(device.asked) == 12
    save_convs(models[1], 12)
    measure(fingerprint="machine-b")
    assert len(device.asked) == 16
    raw.write_text(raw.read_text().replace("2000000", "2000001", 1))
    measure(fingerprint="machine-b")
    assert len(device.asked) == 20
    assert [p.name for p in raw.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_ns": ["fast"] * 50}, "the board sent dense_ns that are not times; the answer was refused"),
        ({"dense_ns": [-1] * 50}, "the board sent dense_ns that are not times"),
        ({"dense_ns": [1] * 20}, "the board sent 20 dense_ns where 50 were asked for"),
        ({"dense_ns": [1] * 100_000}, "the board sent 100000 dense_ns where 50 were asked for"),
        ({"dense_ns": [1] * 54}, "the board sent unequal numbers of samples"),
        ({"block": 0}, "the board sent block 0"),
        ({"threads": "all"}, "the board sent threads 'all'"),
        ({"warm_up_stable": "yes"}, "the board sent no warm_up_stable"),
        ({"after": None}, "the board sent after 'no record'"),
        ({"after": {"throttled": -1}}, "the board sent after -1"),
        ({"disturbed": [0] * 10}, "the board sent disturbed that does not mark 50 pairs; the answer was refused"),
        ({"disturbed": [2] * 50}, "the board sent disturbed that does not mark 50 pairs"),
        ({"sittings": [25] * 3}, r"the board sent sittings \[25, 25, 25\] for 50 pairs"),
        ({"sittings": [50, 0]}, r"the board sent sittings \[50, 0\] for 50 pairs"),
        ({"clocks_khz": None}, "the board sent sittings"),
        ({"load": {"cores": 0}}, r"the board sent load \{'cores': 0\}; the answer was refused"),
        ({"load": {"cores": 2, "others": -1.0}}, "the board sent load"),
    ],
)
def test_a_lying_device_is_refused(models: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        session.measure_pair(*models, HOST, transport=Scripted(samples(**changes)))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"shape": [2, 2], "data": "AAAA"}, r"sent 3 bytes for outputs of shape \[2, 2\]"),
        ({"shape": [2, -2], "data": ""}, r"sent outputs of shape \[2, -2\]"),
        ({"shape": [3, 1], "data": ""}, r"sent outputs of shape \[3, 1\] for 2 images"),
        ({"shape": [2], "data": "?!"}, "sent outputs that are not base64"),
    ],
)
def test_evaluate_refuses_what_does_not_fit(tmp_path: Path, reply: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "i.npy", np.zeros((2, 1), np.float32))
    with pytest.raises(BenchError, match=message):
        session.run_model(tmp_path / "m.onnx", tmp_path / "i.npy", HOST, transport=Scripted(reply))


def test_evaluate_here(models: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 24, 24), np.float32))
    outputs = session.run_model(models[1], tmp_path / "images.npy", HOST, transport=LocalTransport())
    assert outputs.shape == (2, 8)
    np.testing.assert_array_equal(outputs, 0)


def test_environment_refuses_a_wrong_record() -> None:
    with pytest.raises(BenchError, match="the board sent isa None; the answer was refused"):
        session.environment(HOST, Scripted({}))


def fake_worker(tmp_path: Path, body: str) -> LocalTransport:
    script = tmp_path / "fake.py"
    script.write_text(body)
    return LocalTransport(python=[sys.executable, str(script)])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('hello')", r"^the worker on this machine did not answer in JSON; it printed: hello$"),
        ("print('MM-EDGE-RESULT {')", "did not answer in JSON"),
        ("print('MM-EDGE-RESULT [1]')", "did not answer in JSON"),
        ("print('MM-EDGE-RESULT {\"schema_version\": 1}')", "sent an answer without a result"),
        ("print('MM-EDGE-RESULT {\"schema_version\": 9}')", "speaks schema 9; this is 1"),
        ("import sys; sys.exit('no such library')", "ended with status 1: no such library"),
        ("import os; os.kill(os.getpid(), 9)", "was killed, most likely for want of memory"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "sent more than 1 MB; the answer was refused"),
        (
            "import time; time.sleep(60)",
            "did not answer within 2 s and was stopped; see that the device is up",
        ),
        ("print('\\x1b[31mred')", r"it printed: \\x1b\[31mred$"),
    ],
)
def test_workers_that_go_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 1 << 20)
    with pytest.raises(BenchError, match=message):
        fake_worker(tmp_path, body).ask("info", {}, {}, timeout_s=2.0)


def test_a_login_banner_is_not_the_answer(tmp_path: Path) -> None:
    body = 'print(\'Welcome!\'); print(\'MM-EDGE-RESULT {"schema_version": 1, "result": {"a": 1}}\')'
    assert fake_worker(tmp_path, body).ask("info", {}, {}) == {"a": 1}


def test_missing_interpreter() -> None:
    with pytest.raises(BenchError, match=r"^cannot run /no/python: No such file or directory$"):
        LocalTransport(python=["/no/python"]).ask("info", {}, {})
