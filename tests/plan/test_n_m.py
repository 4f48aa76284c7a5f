"""n:m: the best pattern by brute force, reasons for dense layers, the check on exported weights, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mm_edge.arrays import BoolArray
from mm_edge.bench.target import load_target
from mm_edge.errors import ParityError, UsageError
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.layers import read_layers
from mm_edge.plan.n_m import (
    Pattern,
    Projection,
    check_pattern,
    compensate,
    parse_pattern,
    project,
    project_mask,
    reduced_axes,
    require_pattern,
    require_support,
    runtime_instructions,
)
from mm_edge.plan.plans import Plan, plan_n_m
from mm_edge.records import Assignment, Candidate, Layer
from mm_edge.run.finish import notes_of_shared_names

TWO_FOUR = Pattern(2, 4)


class Net(nn.Module):
    """A convolution with BatchNorm, a linear layer on tokens (exported as a transposed MatMul) and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.mix = nn.Linear(16, 12)
        self.same = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.wide(torch.relu(self.conv(x)))))
        x = self.same(torch.relu(self.mix(x.flatten(2).transpose(1, 2))))
        answer: torch.Tensor = self.head(x.mean(1))
        return answer


Exported = tuple[Net, RawGraph, tuple[Layer, ...]]


@pytest.fixture(scope="module")
def net() -> Exported:
    torch.manual_seed(0)
    module = Net().eval()
    raw = export_raw(module, torch.zeros(1, 3, 4, 4))
    return module, raw, read_layers(raw)


def projected(module: Net, raw: RawGraph, layers: tuple[Layer, ...]) -> Projection:
    scores = {name: parameter.detach().abs().numpy() for name, parameter in module.named_parameters()}
    sparsity = {layer.fqn: 0.5 for layer in layers}
    return project(layers, scores, sparsity, reduced_axes(raw.model), TWO_FOUR, least_channels=8)


def exported(raw: RawGraph, masks: Mapping[str, BoolArray]) -> ir.Model:
    model = raw.model.clone()
    for name, mask in masks.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(np.where(mask, value.const_value.numpy(), np.float32(0)), name=name)
    return deploy(model)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.integers(1, 3))
def test_the_kept_pattern_is_the_best_of_all(values: list[int], n: int) -> None:
    score = np.array(values, np.float32).reshape(1, 4)
    mask = project_mask(score, Pattern(n, 4), axis=1)
    best = max(sum(values[i] for i in chosen) for chosen in itertools.combinations(range(4), n))
    assert mask.sum() == n and score[mask].sum() == best


def test_by_hand_with_ties_to_the_lower_index() -> None:
    score = np.array([[1, 4, 4, 4, 9, 0, 0, 0]], np.float32)
    assert project_mask(score, TWO_FOUR, 1).tolist() == [[False, True, True, False, True, True, False, False]]


def test_convolutions_are_grouped_along_input_channels_at_each_kernel_position() -> None:
    score = np.random.default_rng(0).random((3, 8, 3, 3), dtype=np.float32)
    mask = project_mask(score, TWO_FOUR, 1)
    assert (mask.reshape(3, 2, 4, 3, 3).sum(axis=2) == 2).all()
    expected = project_mask(score[:, :, 1, 2], TWO_FOUR, 1)
    np.testing.assert_array_equal(mask[:, :, 1, 2], expected)


def test_a_short_last_group_counts_as_filled_with_zeros() -> None:
    mask = project_mask(np.array([[5, 1, 2, 3, 7, 8, 9], [0, 0, 0, 0, 0, 0, 1]], np.float32), TWO_FOUR, 1)
    assert mask[0].tolist() == [True, False, False, True, False, True, True]
    assert mask[1].tolist()[4:] == [True, False, True]


def test_reduced_axes_of_a_torch_network(net: Exported) -> None:
    _, raw, _ = net
    axes = reduced_axes(raw.model)
    assert {axes[f"{name}.weight"] for name in ("conv", "wide", "mix", "same", "head")} == {1}


def test_reduced_axis_of_a_matmul_that_is_stored_transposed() -> None:
    weight = ir.Value(name="w", shape=ir.Shape([6, 8]), const_value=ir.tensor(np.zeros((6, 8), np.float32), name="w"))
    x = ir.Value(name="x", shape=ir.Shape([1, 6]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20})
    assert reduced_axes(ir.Model(graph, ir_version=10)) == {"w": 0}


def test_layers_take_the_pattern_or_say_why_not(net: Exported) -> None:
    module, raw, layers = net
    result = projected(module, raw, layers)
    assert set(result.masks) == {"wide.weight", "mix.weight", "same.weight"}
    assert result.dense == {
        "conv.weight": "3 inputs and 8 outputs: sparse kernels gain from 8 of both on",
        "head.weight": "12 inputs and 4 outputs: sparse kernels gain from 8 of both on",
    }


@pytest.mark.parametrize(
    ("kind", "shape", "rho", "reason"),
    [
        ("linear", (512, 512), 0.2, "its sparsity 20% is below 25%, the pattern would take 50%"),
        (
            "depthwise",
            (512, 1, 3, 3),
            0.5,
            "depthwise: every output reads one channel, there is no group to choose from",
        ),
        ("conv", (512, 128, 3, 3), 0.5, "128 inputs and 512 outputs: sparse kernels gain from 256 of both on"),
        ("linear", (512, 510), 0.5, "510 inputs are no multiple of 4"),
    ],
)
def test_reasons(kind: str, shape: tuple[int, ...], rho: float, reason: str) -> None:
    layer = Layer("w", kind, "mlp", shape, 0, 0, 1)
    result = project([layer], {"w": np.zeros(shape, np.float32)}, {"w": rho}, {"w": 1}, TWO_FOUR)
    assert result.dense == {"w": reason} and not result.masks


def test_a_layer_whose_axis_is_unknown_stays_dense() -> None:
    layer = Layer("w", "linear", "mlp", (512, 512), 0, 0, 1)
    result = project([layer], {"w": np.zeros((512, 512), np.float32)}, {"w": 0.5}, {}, TWO_FOUR)
    assert result.dense["w"].startswith("its weight is reshaped before it is used")


def test_exported_weights_follow_the_pattern(net: Exported, tmp_path: Path) -> None:
    module, raw, layers = net
    result = projected(module, raw, layers)
    model = exported(raw, result.masks)
    names = set(model.graph.initializers)
    assert "wide.weight" in names and "mix.weight" not in names  # one kept its name, one was transposed and renamed
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    axes = reduced_axes(raw.model)
    assert check_pattern(path, result.masks, axes, TWO_FOUR) == ()
    require_pattern(model, result.masks, axes, TWO_FOUR)


@pytest.mark.parametrize("fqn", ["wide.weight", "mix.weight"])
def test_a_broken_artifact_fails(net: Exported, fqn: str) -> None:
    module, raw, layers = net
    result = projected(module, raw, layers)
    broken = {name: mask.copy() for name, mask in result.masks.items()}
    place = tuple(np.argwhere(~broken[fqn])[0])
    broken[fqn][place] = True
    model = exported(raw, broken)
    (violation,) = check_pattern(model, result.masks, reduced_axes(raw.model), TWO_FOUR)
    assert (violation.fqn, violation.groups) == (fqn, 1)
    with pytest.raises(ParityError) as caught:
        require_pattern(model, result.masks, reduced_axes(raw.model), TWO_FOUR)
    assert str(caught.value) == (
        f"1 of 3 layers do not keep 2:4: '{fqn}' has 1 groups with more; it was not kept as an artifact"
    )


def test_an_artifact_without_the_zeros_fails(net: Exported) -> None:
    module, raw, layers = net
    result = projected(module, raw, layers)
    found = {v.fqn: v.groups for v in check_pattern(exported(raw, {}), result.masks, reduced_axes(raw.model), TWO_FOUR)}
    assert found["mix.weight"] is None and found["wide.weight"] == 16 * 2 * 9


def test_compensation_is_the_least_squares_answer_within_the_pattern() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8))
    weight = rng.standard_normal((5, 8)).astype(np.float32)
    mask = project_mask(np.abs(weight), TWO_FOUR, 1)
    mask[0, 0] = not mask[0, 0]  # rows may keep different numbers
    made = compensate(weight, inputs.T @ inputs / 400, mask, ridge=0.0)
    assert not made[~mask].any()
    for row in range(5):
        kept = np.flatnonzero(mask[row])
        best = np.linalg.lstsq(inputs[:, kept], inputs @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(made[row, kept], best, rtol=1e-4)


def test_a_strong_ridge_leaves_the_masked_weight() -> None:
    weight = np.array([[1, 2, 3, 4]], np.float32)
    mask = np.array([[False, False, True, True]])
    np.testing.assert_allclose(
        compensate(weight, np.ones((4, 4)), mask, ridge=1e9), np.array([[0, 0, 3, 4]]), atol=1e-6
    )


def test_refused_where_no_kernel_exists() -> None:
    with pytest.raises(UsageError) as caught:
        require_support(load_target("raspberry-pi-5"), TWO_FOUR)
    assert str(caught.value) == (
        "2:4 gains nothing on raspberry-pi-5: ONNX Runtime has no n:m kernel for CPUs; "
        "use --kinds structured, which removes whole channels"
    )
    with pytest.raises(UsageError, match="1:4 gains nothing on nvidia-a100: it has 2:4; use --kinds structured"):
        require_support(load_target("nvidia-a100"), Pattern(1, 4))


def test_instructions_for_a_target_with_kernels() -> None:
    found = runtime_instructions(load_target("nvidia-a100"), TWO_FOUR, "out/m.onnx")
    assert found.trtexec == (
        "trtexec", "--onnx=out/m.onnx", "--saveEngine=out/m.engine", "--fp16", "--sparsity=enable",
    )  # fmt: skip
    assert found.provider_options["trt_sparsity_enable"] == "1"
    with pytest.raises(UsageError):
        runtime_instructions(load_target("raspberry-pi-5"), TWO_FOUR, "m.onnx")


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "a:b", ""])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(UsageError, match="is not a pattern n:m with n below m, such as 2:4"):
        parse_pattern(text)
    assert parse_pattern("2:4") == TWO_FOUR


def test_strategies_that_come_to_the_same_masks_are_one_plan() -> None:
    torch.manual_seed(0)
    raw = export_raw(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval(), torch.zeros(1, 256))
    layers = read_layers(raw)
    scores = {"magnitude": {layer.fqn: np.abs(raw_array(raw, layer.fqn)) for layer in layers}}
    rho = {"low": (0.1, 0.1), "one": (0.3, 0.1), "both": (0.4, 0.6), "more": (0.9, 0.3)}
    assignments = [
        Assignment("magnitude", (name,), dict(zip([layer.fqn for layer in layers], values, strict=True)))
        for name, values in rho.items()
    ]
    plans, _ = plan_n_m(raw, layers, scores, assignments)
    assert [plan.assignment.names for plan in plans] == [("one",), ("both", "more")]
    assert [plan.id for plan in plans] == ["magnitude/one/n:m/fp32", "magnitude/both/n:m/fp32"]
    assert notes_of_shared_names([candidate(plan) for plan in plans]) == [
        "both and more coincide under the pattern: made, measured and listed once, under both names"
    ]


def raw_array(raw: RawGraph, name: str) -> np.ndarray:
    value = raw.model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def candidate(plan: Plan) -> Candidate:
    names = plan.assignment.names
    return Candidate(plan.id, "magnitude", names[0], "n:m", "fp32", 0.5, 0, 0, (256,), also_named=names[1:])
