"""Parity: the error's definition by hand, what passes for the same answer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import noise, tiny
from torch import nn

from mm_edge.errors import ParityError
from mm_edge.quality.parity import Run, compare, onnx_runner, require, torch_runner
from mm_edge.records import Parity, ParityInputs

ZEROS = np.zeros((2, 1), np.float32)


def always(*outputs: list[float]) -> Run:
    return lambda inputs: [np.array([output], np.float32) for output in outputs]


def test_the_error_is_relative_to_the_reference_s_largest_magnitude() -> None:
    parity = compare(always([1.0, -3.9]), always([1.0, -4.0]), ZEROS, "noise")
    assert parity.max_abs_err == pytest.approx(0.1, rel=1e-5)
    assert parity.max_rel_err == pytest.approx(0.1 / 4, rel=1e-5)
    assert (parity.top1_agreement, parity.inputs) == (1.0, ParityInputs(2, "noise"))


def test_every_output_counts_on_its_own_scale_and_the_worst_input_decides() -> None:
    parity = compare(always([1.0], [0.011]), always([1.0], [0.01]), ZEROS, "noise")
    assert parity.max_rel_err == pytest.approx(0.1, rel=1e-4)

    def second_only(inputs: np.ndarray) -> list[np.ndarray]:
        return [np.array([[2.0 if inputs[0, 0] else 1.0]], np.float32)]

    parity = compare(second_only, always([1.0]), np.array([[0], [1]], np.float32), "images")
    assert parity.max_rel_err == 1.0


def test_an_input_with_small_outputs_is_held_to_the_scale_of_all_inputs() -> None:
    """A sigmoid is exact to about 1e-7, whether it is 1 or 1e-4."""

    def probability(error: float) -> Run:
        return lambda inputs: [np.array([[1.0 if inputs[0, 0] else 1e-4 + error]], np.float32)]

    inputs = np.array([[0], [1]], np.float32)
    assert compare(probability(1e-7), probability(0.0), inputs, "images").max_rel_err == pytest.approx(1e-7, rel=0.1)
    assert compare(probability(1e-3), probability(0.0), inputs, "images").max_rel_err == pytest.approx(1e-3, rel=0.1)
    small = np.array([[0]], np.float32)
    assert compare(probability(1e-7), probability(0.0), small, "images").max_rel_err <= 1e-4
    assert compare(probability(1e-6), probability(0.0), small, "images").max_rel_err > 1e-4
    assert compare(always([-1e-4 + 1e-7]), always([-1e-4]), small, "images").max_rel_err > 5e-4


def test_top1_counts_ties_to_rounding_as_the_same_answer() -> None:
    assert compare(always([1.0, 2.0]), always([2.0, 1.0]), ZEROS, "noise").top1_agreement == 0.0
    assert compare(always([2.00001, 2.0]), always([2.0, 2.00001]), ZEROS, "noise").top1_agreement == 1.0


@pytest.mark.parametrize(("got", "want"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan), (np.inf, 1.0)])
def test_what_is_no_number_never_passes(got: float, want: float) -> None:
    with np.errstate(invalid="ignore"):
        parity = compare(always([got, 0.0]), always([want, 0.0]), ZEROS, "noise")
    with pytest.raises(ParityError):
        require(parity, "a")
    assert not parity.max_rel_err <= 1e-4


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ParityError) as caught:
        compare(always([1.0, 2.0]), always([1.0]), ZEROS, "noise")
    assert str(caught.value) == "outputs have the shapes [(1, 2)], the masked model's [(1, 1)]"


def test_require_names_the_artifact_and_both_figures() -> None:
    fine = Parity(1.0, 1e-4, 1.0, ParityInputs(8, "noise"))
    require(fine, "a")
    with pytest.raises(ParityError) as caught:
        require(Parity(1.0, 2e-4, 0.875, ParityInputs(8, "noise")), "magnitude/balanced")
    assert str(caught.value) == (
        "magnitude/balanced differs from its masked model: relative error 2.0e-04 (allowed 1e-04), "
        "top-1 agreement 87.5%; it was not kept as an artifact"
    )
    with pytest.raises(ParityError):
        require(Parity(1.0, 1e-5, 0.5, ParityInputs(8, "noise")), "a")


def test_runners_of_a_graph_a_file_and_a_module_agree(tmp_path: Path) -> None:
    raw = tiny("float[1,3] x", "y = Gemm<transB=1>(x, w, b)", {"w": (4, 3), "b": (4,)})
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        for parameter, name in ((layer.weight, "w"), (layer.bias, "b")):
            value = raw.model.graph.initializers[name].const_value
            assert value is not None
            parameter.copy_(torch.from_numpy(value.numpy().copy()))
    ir.save(raw.model, tmp_path / "a.onnx")
    inputs = noise(raw)
    for run in (onnx_runner(raw.model), onnx_runner(tmp_path / "a.onnx")):
        assert compare(run, torch_runner(layer), inputs, "noise").max_rel_err < 1e-6


def test_nested_outputs_are_compared_in_order() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"a": x, "b": [x + 1, (x + 2,)]}

    outputs = torch_runner(Two().eval())(np.zeros((1, 2), np.float32))
    assert [float(item[0, 0]) for item in outputs] == [0, 1, 2]
