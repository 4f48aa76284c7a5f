"""The registries of precisions and formats: one entry is enough, and refusals keep their texts and order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mm_edge.bench.target import Target, load_target
from mm_edge.errors import UsageError
from mm_edge.formats.bundle import write_bundle
from mm_edge.formats.context import FormatContext
from mm_edge.formats.registry import FORMATS, Format
from mm_edge.records import Candidate, InputSpec
from mm_edge.run.checks import check_request
from mm_edge.run.request import Request


def check_precisions(names: tuple[str, ...], target: Target, has_data: bool) -> None:
    """Check as a run does: in the registry's order."""
    images = SimpleNamespace(calibration=[1] if has_data else [], validation=[])
    data: Any = images if has_data else None
    check_request(Request(precision=names), data, target, measured=False)


def test_precisions_are_checked_in_the_order_of_the_registry() -> None:
    pi = load_target("raspberry-pi-5")
    check_precisions(("fp32",), pi, False)
    check_precisions(("fp32", "int8"), pi, True)
    with pytest.raises(UsageError, match=r"^--precision int8 needs calibration images; give --data PATH$"):
        check_precisions(("fp16", "int8"), pi, False)
    with pytest.raises(UsageError, match=r"^--precision fp16 is not for raspberry-pi-5: .*; use fp32 or int8$"):
        check_precisions(("fp16", "int8"), pi, True)


def test_a_format_is_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write_name(source: Path, folder: Path, context: FormatContext) -> list[Path]:
        path = folder / f"{source.stem}.txt"
        path.write_text(context.kind)
        return [path]

    monkeypatch.setitem(FORMATS, "name", Format("Also write the kind of inputs.", write_name))
    spec = InputSpec((3, 8, 8), (0.5,), (0.5,))
    context = FormatContext(spec, load_target("raspberry-pi-5"), np.zeros((1, 3, 8, 8), np.float32), "noise")
    chosen = Candidate("a", "a", "b", "structured", "fp32", 0.5, 1, 1, (3, 8, 8), artifact="candidates/a.onnx")
    (path,) = write_bundle(tmp_path, chosen, context, ("name",))
    assert path == tmp_path / "bundle" / "a.txt" and path.read_text() == "noise"
    assert write_bundle(tmp_path, chosen, context, ()) == []
