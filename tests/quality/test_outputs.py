"""Outputs of networks that are no classifiers, run and compared with the dense network's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from mm_edge.quality.evaluation import Reference, compare_outputs, judge_model, refer_to_outputs, run_outputs

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
BATCHES = [(IMAGES[:3], np.full(3, -1)), (IMAGES[3:], np.full(2, -1))]


def save(path: Path, scale: float = 1.0, batch: str = "N") -> Path:
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[{batch},3,8,8] x)
        => (float[{batch},3,8,8] maps, int64[{batch},1,8,8] classes, float[K] kept)
        <float s = {{{scale}}}, int64[1] all = {{-1}}> {{
            maps = Mul(x, s) classes = ArgMax<axis=1>(maps)
            flat = Reshape(maps, all) on = Relu(flat) where = NonZero(on) row = Squeeze(where) kept = Cast<to=1>(row)
        }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.mark.parametrize("batch", ["N", "1", "2"])
def test_outputs_come_by_name_and_those_of_no_fixed_shape_are_left_out(tmp_path: Path, batch: str) -> None:
    found = run_outputs(save(tmp_path / "m.onnx", 2.0, batch), BATCHES, 2)
    assert set(found) == {"maps", "classes"} and found["classes"].dtype == np.int64
    np.testing.assert_array_equal(found["maps"], 2 * IMAGES)
    np.testing.assert_array_equal(found["classes"][:, 0], IMAGES.argmax(axis=1))


def test_a_candidate_is_compared_by_error_angle_and_masks(tmp_path: Path) -> None:
    reference = refer_to_outputs(run_outputs(save(tmp_path / "m.onnx"), BATCHES, 1), (8, 8))
    judged = judge_model(save(tmp_path / "half.onnx", 0.5), BATCHES, reference, 1)
    fidelity = judged["fidelity"]
    assert fidelity is not None and judged["accuracy_top1"] is None and set(fidelity.outputs) == {"maps"}
    # Half of every number: the mean of (x / 2)^2 over the variance of x is 1/4, up to the mean's square.
    assert fidelity.outputs["maps"].nmse == pytest.approx(0.25, rel=0.02)
    assert fidelity.outputs["maps"].cosine == pytest.approx(1.0)
    assert fidelity.miou_to_dense == 1.0  # the largest channel is the same everywhere


def test_what_has_other_shapes_or_is_not_finite_is_not_compared() -> None:
    reference = Reference(outputs={"y": np.ones((2, 3, 4, 4), np.float32)})
    assert compare_outputs({"y": np.ones((2, 3, 2, 2), np.float32)}, reference) is None
    assert compare_outputs({}, reference) is None
    lost = compare_outputs({"y": np.full((2, 3, 4, 4), np.nan, np.float32)}, reference)
    assert lost is not None and lost.outputs["y"].nmse is None and lost.outputs["y"].cosine is None
