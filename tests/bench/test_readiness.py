"""What a device lacks is named with the command that helps."""

from __future__ import annotations

from typing import Any

import pytest

from mm_edge.bench.readiness import missing

GOOD = {"python": "3.9.2", "numpy": "1.24.0", "onnxruntime": "1.17.1", "onnxruntime_error": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"python": "3.7.3"}, ["Python 3.7.3 is too old: install 3.8 or later"]),
        ({"numpy": None}, ["numpy is missing: run 'python3 -m pip install numpy' there"]),
        (
            {"onnxruntime": None, "onnxruntime_error": "ModuleNotFoundError: No module named 'onnxruntime'"},
            ["onnxruntime is missing: run 'python3 -m pip install onnxruntime' there"],
        ),
        (
            {"onnxruntime": None, "onnxruntime_error": "ImportError: x.so: wrong ELF class: ELFCLASS64"},
            [
                "onnxruntime does not load (ImportError: x.so: wrong ELF class: ELFCLASS64): its build may be for "
                "another architecture or C library; run 'python3 -m pip install --force-reinstall onnxruntime' there"
            ],
        ),
        (
            {"onnxruntime": "1.9.0"},
            ["onnxruntime 1.9.0 is too old: run 'python3 -m pip install --upgrade onnxruntime' there (1.16 or later)"],
        ),
    ],
)
def test_missing(changes: dict[str, Any], expected: list[str]) -> None:
    assert missing({**GOOD, **changes}) == expected
