"""Export: names survive, nothing is lost in silence, refusals are one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import noise, tiny
from torch import nn
from torch.nn import functional

from mm_edge.errors import ExportError, ModelError
from mm_edge.graph.export import export_raw, infer_shapes
from mm_edge.graph.groups import read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.quality.parity import compare, onnx_runner, torch_runner

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Conv, BatchNorm and a head; `extra` is a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.extra = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return result


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


# --- from PyTorch ---------------------------------------------------------------------------------


def test_parameters_and_statistics_keep_their_names_and_values() -> None:
    module = Net().eval()
    raw = export_raw(module, IMAGE)
    assert raw.parameters == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert raw.buffers == {"norm.running_mean", "norm.running_var"}
    for name in raw.parameters | raw.buffers:
        value = raw.model.graph.initializers[name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), module.state_dict()[name].numpy())
    assert compare(onnx_runner(raw.model), torch_runner(module), noise(raw), "noise").max_rel_err < 1e-5


def test_a_parameter_that_nothing_reads_is_named_as_unused() -> None:
    assert export_raw(Net(), IMAGE).unused == ("extra",)


def test_nodes_have_unique_names_and_every_shape_is_known() -> None:
    raw = export_raw(Net(), IMAGE)
    names = [node.name for node in raw.model.graph]
    assert len(set(names)) == len(names)
    assert all(value.shape is not None for node in raw.model.graph for value in node.outputs)


def test_the_module_is_left_as_it_was() -> None:
    module = Net().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_raw(module, IMAGE)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_tied_parameters_carry_their_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6, bias=False)
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(torch.relu(self.first(x)))
            return result

    raw = export_raw(Tied(), torch.zeros(1, 6))
    assert raw.parameters == {"first.weight"}
    assert [axes.reason for axes in read_structure(raw).pinned] != []


def test_cached_tensors_are_cleared_before_the_export() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6))
            self.cache: dict[str, torch.Tensor] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.table * 2
            return x + self.cache["bias"]

    module = Caching().eval()
    with torch.no_grad():
        module(torch.zeros(1, 6))
    assert export_raw(module, torch.zeros(1, 6)).parameters == {"table"}
    assert "bias" in module.cache


def test_parameters_lost_to_a_copy_are_refused_by_name() -> None:
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.copy = [self.layer.weight.detach().clone()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.copy[0] + 0 * self.layer.weight.sum().detach(), self.layer.bias)

    class Constant(Copying):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.copy[0], self.layer.bias)

    # The copy alone is not the parameter: nothing depends on it, so it is unused and not lost.
    assert export_raw(Constant(), torch.zeros(1, 6)).unused == ("layer.weight",)


def test_control_flow_is_refused_with_the_exporter_s_reason_and_a_way_out_in_one_line() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x[:, :4]

    with pytest.raises(ExportError) as caught:
        export_raw(Branching(), torch.zeros(1, 6))
    message = str(caught.value)
    assert message.startswith("torch.export refuses this network: ")
    assert message.endswith("; export it yourself and give the .onnx file")
    assert "\n" not in message


def test_networks_with_several_outputs_prune_in_what_leads_to_them() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.boxes = nn.Conv2d(8, 4, 1)
            self.classes = nn.Conv2d(8, 5, 1)

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            x = torch.relu(self.stem(x))
            boxes = self.boxes(x)
            return {"boxes": boxes, "more": (self.classes(x), {"mean": boxes.mean((2, 3))})}

    raw = export_raw(Detector(), IMAGE)
    assert [value.name for value in raw.model.graph.outputs] == ["boxes", "more.0", "more.1.mean"]
    structure = read_structure(raw)
    assert [group.id for group in structure.groups] == ["stem.weight:0"]
    assert {item.id: item.reason for item in structure.pinned}["boxes.weight:0"] == "output of the model"


# --- from a user's .onnx ----------------------------------------------------------------------------


def save(path: Path, shape: str, body: str = "y = Conv(x, w)") -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{shape}] x) => (float[] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, size in (("w", (8, 3, 1, 1)), ("v", (4, 8, 1, 1))):
        if name in body:
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name)
            )
    onnx.save(model, path)


def test_a_symbolic_batch_becomes_one(tmp_path: Path) -> None:
    save(tmp_path / "a.onnx", "N,3,4,4", "a = Conv(x, w) y = Conv(a, v)")
    raw = raw_from_onnx(tmp_path / "a.onnx")
    shape = raw.model.graph.inputs[0].shape
    assert shape is not None and shape.numpy() == (1, 3, 4, 4)
    assert raw.parameters == {"w", "v"}
    assert [group.id for group in read_structure(raw).groups] == ["w:0"]


def test_another_symbolic_size_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.onnx", "1,3,H,4")
    with pytest.raises(ModelError) as caught:
        raw_from_onnx(tmp_path / "a.onnx")
    assert str(caught.value) == (f"'{tmp_path}/a.onnx': input 'x' has the shape [1,3,H,4]; state the open sizes")


@pytest.mark.parametrize("content", [b"not a protobuf at all", None])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        raw_from_onnx(path)
    assert "\n" not in str(caught.value)


def test_batch_statistics_of_a_file_are_no_parameters(tmp_path: Path) -> None:
    body = "a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) y = Relu(n)"
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "s": (8,), "t": (8,), "m": (8,), "q": (8,)})
    ir.save(raw.model, tmp_path / "a.onnx")
    found = raw_from_onnx(tmp_path / "a.onnx")
    assert found.parameters == {"w", "s", "t"}
    assert found.buffers == {"m", "q"}


# --- folding --------------------------------------------------------------------------------------


def test_constants_are_folded_and_weights_are_not() -> None:
    raw = tiny(
        "float[1,3] x",
        "two = Add(one, one) d = Mul(x, two) e = Add(w, one) y = Add(d, e)",
        {"w": (3,)},
        {"one": np.float32(1)},
    )
    assert operators(raw.model) == {"Mul": 1, "Add": 2}
    assert "w" in raw.model.graph.initializers


def test_a_constant_with_two_readers_is_given_to_each_of_them() -> None:
    """One is read along channels that may go, the other along channels that may not."""
    body = "a = MatMul(x, w) b = Mul(a, c) d = Mul(x, c) y = MatMul(b, v) z = Abs(d)"
    raw = tiny("float[1,3,8] x", body, {"w": (8, 8), "v": (8, 4)}, {"c": np.arange(8, dtype=np.float32)})
    assert [group.id for group in read_structure(raw).groups] == ["w:1"]


def test_shapes_are_inferred_behind_group_normalisation() -> None:
    body = " ".join(
        f"n{i} = GroupNormalization<num_groups=2>({'x' if i == 0 else f'r{i - 1}'}, s, t) r{i} = Relu(n{i})"
        for i in range(3)
    )
    raw = tiny("float[1,4,2,2] x", body + " y = Conv(r2, w)", {"w": (8, 4, 1, 1), "s": (4,), "t": (4,)}, opset=21)
    for node in raw.model.graph:
        node.outputs[0].shape = None
    infer_shapes(raw.model)
    shape = list(raw.model.graph)[-1].outputs[0].shape
    assert shape is not None and shape.numpy() == (1, 8, 2, 2)
