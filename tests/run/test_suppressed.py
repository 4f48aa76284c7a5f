"""Boxes that non-maximum suppression inside the graph makes are not compared, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from onnx_files import write
from PIL import Image
from torch import nn

import mm_edge
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
    assert "Nothing was compared with the dense network, as the warnings explain" in " ".join(text.split())


def test_two_outputs_are_not_compared_across_input_sizes_and_the_report_says_so(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.second(torch.relu(self.first(images))).flatten(2)
            return x[:, :1], x[:, 1:]

    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    result = mm_edge.prune_export(
        Net(), torch.zeros(1, 3, 24, 24), data=tmp_path / "photos", out=tmp_path / "run", bench=False,
        strategies="balanced", signals="magnitude", input_sizes=16, recover="none",
    )  # fmt: skip
    assert result.chosen is None
    assert (
        "nothing was compared with the dense network, because its outputs have other shapes at other input sizes; none "
        "is recommended: leave --input-sizes out, or give --metric FILE.py:CALLABLE"
    ) in result.warnings
