"""The stages that progress names as those to come, against the stages that ran."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_job import SIDE

from mm_edge.api import run_job
from mm_edge.load.models import LoadedModel, LoadOptions, load_model
from mm_edge.progress import Advance, Stages
from mm_edge.run.request import make_request


class Recording(Stages):
    """Keeps the names of the stages that ran and of those expected."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []
        self.expected: tuple[str, ...] = ()

    def expect(self, names: Any) -> None:
        super().expect(names)
        self.expected = tuple(names)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        self.ran.append(name)
        with super().stage(name) as advance:
            yield advance


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE)))


@pytest.mark.parametrize(
    "asked",
    [
        {"recover": "none", "data": None, "signals": "magnitude"},
        {"recover": "bn", "macs": (0.6,), "precision": "fp32,int8", "input_sizes": "none"},
    ],
)
def test_every_stage_that_runs_was_expected_in_its_order(files: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    stages = Recording()
    fields = {"data": str(files / "images"), "strategies": "balanced", "bench": False, **asked}
    run_job(lambda: load(files), make_request(out=tmp_path / "run", target="x86_64-avx2", **fields), stages)
    left = iter(("load", *stages.expected))
    ran = [name for name, _ in groupby(stages.ran)]
    assert [name for name in ran if name in left] == ran
    assert set(stages.expected) <= set(ran)


def test_progress_names_the_time_left_and_the_stages_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    now = [0.0]
    monkeypatch.setattr("mm_edge.progress.time.monotonic", lambda: now[0])
    stages = Stages(Console(file=out, width=200))
    stages.expect(["a", "b", "c", "d", "e", "f"])
    with stages.stage("b") as advance:
        now[0] = 20.0
        advance(1, 16)
        now[0] = 40.0
        advance(4, 16)
    with stages.stage("f") as advance:
        now[0] = 60.0
        advance(0, 2)
    assert out.getvalue().splitlines() == [
        "stages to come: a, b, c, d, e, f",
        "b: 1 of 16, about 5 min left; then c, d, e and 1 more",
        "b: 4 of 16, about 2 min left; then c, d, e and 1 more",
        "b: 40.0 s",
        "f: 0 of 2",
        "f: 20.0 s",
    ]
