"""Logits from ONNX Runtime, and what comparing them says, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mm_edge.errors import JobError, ModelError
from mm_edge.quality.evaluation import Evaluation, compare_logits, run_onnx


def summing_model(batch: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A network whose two outputs are the mean and the maximum over the pixels of each channel."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("ReduceMax", ["x", "axes"], ["largest"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, (batch, 3, 2, 2))],
        [helper.make_tensor_value_info(name, dtype, (batch, 3)) for name in ("mean", "largest")],
        [onnx.numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def batches(sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(generator.random((n, 3, 2, 2), dtype=np.float32), np.zeros(n, np.int64)) for n in sizes]


@pytest.mark.parametrize("batch", [1, 4, "N"])
def test_first_output_for_every_image_whatever_the_batch(batch: int | str, tmp_path: Path) -> None:
    model = summing_model(batch)
    onnx.save(model, tmp_path / "m.onnx")
    images = batches([4, 4, 3])
    expected = np.concatenate([image.mean(axis=(2, 3)) for image, _ in images])
    seen: list[int] = []
    logits = run_onnx(tmp_path / "m.onnx", images, threads=1, on_images=seen.append)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    assert seen == [4, 4, 3]
    assert np.array_equal(run_onnx(model.SerializeToString(), images, threads=3), logits)


def test_half_precision_models_are_fed_half_precision() -> None:
    images = batches([2])
    logits = run_onnx(summing_model(1, TensorProto.FLOAT16).SerializeToString(), images, threads=1)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, images[0][0].mean(axis=(2, 3)), atol=1e-3)


def test_no_images_give_no_logits() -> None:
    logits = run_onnx(summing_model(1).SerializeToString(), [], threads=1)
    assert len(logits) == 0
    assert compare_logits(logits, np.zeros(0, np.int64), None) == Evaluation(None, None, None, 0)


def test_models_that_cannot_be_loaded_or_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load '.*bad.onnx': "):
        run_onnx(path, batches([1]), threads=1)
    wrong = [(np.zeros((1, 3, 5, 5), np.float32), np.zeros(1, np.int64))]
    with pytest.raises(JobError, match="ONNX Runtime failed on the model: "):
        run_onnx(summing_model(1).SerializeToString(), wrong, threads=1)


def test_accuracy_agreement_and_divergence_by_hand() -> None:
    dense = np.log(np.array([[0.5, 0.5 / 2, 0.5 / 2], [0.2, 0.7, 0.1]], np.float32))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], np.float32))
    result = compare_logits(candidate, np.array([1, 0]), dense)
    assert result.accuracy_top1 == 0.5
    assert result.agreement_top1 == 0.5
    # First image: 0.5 ln 2 - 0.25 ln 2; second: 0. Mean of the two.
    assert result.kl_to_dense == pytest.approx(0.125 * math.log(2), rel=1e-6)
    assert result.count == 2


def test_shifting_logits_changes_nothing_and_equals_have_no_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(16, 10)).astype(np.float32)
    same = compare_logits(logits + 1000, None, logits + 1000)
    assert same == Evaluation(None, 1.0, 0.0, 16)
    sharper = compare_logits(logits * 50, None, logits)
    assert sharper.kl_to_dense is not None and sharper.kl_to_dense > 1


def test_without_the_dense_model_only_accuracy_is_known() -> None:
    logits = np.eye(3, dtype=np.float32)
    assert compare_logits(logits, np.array([0, 1, 0]), None) == Evaluation(2 / 3, None, None, 3)


def test_not_finite_logits_count_as_wrong_and_leave_the_divergence_unknown() -> None:
    logits = np.array([[np.nan, 0.0], [1.0, 0.0]], np.float32)
    dense = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    assert compare_logits(logits, np.array([0, 0]), dense) == Evaluation(0.5, 0.5, None, 2)
