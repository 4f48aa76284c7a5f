"""Boxes that non-maximum suppression inside the graph makes are not compared, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from onnx_files import write

from mm_edge.cli.main import main

BODY = """
    a = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c)
    e = Conv(d, p) f = Reshape(e, four) boxes = Transpose<perm=[0, 2, 1]>(f)
    g = Conv(d, q) h = Sigmoid(g) scores = Reshape(h, three) y = NonMaxSuppression(boxes, scores, most, iou, least)
"""
WEIGHTS = {"w": (16, 3, 3, 3), "v": (16, 16, 1, 1), "p": (4, 16, 1, 1), "q": (3, 16, 1, 1)}


def test_a_file_that_ends_in_suppression_is_pruned_and_nothing_is_recommended(tmp_path: Path) -> None:
    constants = {
        "four": np.array([1, 4, -1]), "three": np.array([1, 3, -1]), "most": np.array([9]),
        "iou": np.array([0.5], np.float32), "least": np.array([0.3], np.float32),
    }  # fmt: skip
    net = write(tmp_path / "net.onnx", f"(float[1,3,16,16] x) {{ {BODY} }}", WEIGHTS, constants, outputs="int64[n,3] y")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32))
    arguments = ["prune-export", str(net), "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*arguments, "--strategies", "balanced", "--no-bench"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["candidates"] and report["chosen"] is None
    assert (
        "nothing was compared with the dense network, because the sizes of its outputs depend on the image, as those "
        "of boxes after non-maximum suppression do; none is recommended: give the .onnx without that step, or --metric "
        "FILE.py:CALLABLE"
    ) in report["warnings"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "because the sizes of its outputs depend on the image, and none" in " ".join(text.split())
