"""Texts and archives that would take all memory, time or stack: refused in one line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import hostile_files as hostile
import numpy as np
import onnx
import onnx.helper
import pytest
import torch

from mm_edge.bench.target import load_target
from mm_edge.errors import ModelError, UsageError
from mm_edge.load.exported import _is_arithmetic
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.load.weights import EXPANSION_BYTES, read_weights
from mm_edge.records import LONGEST_JSON, parse_json
from mm_edge.report import read_report

DEEP = "[" * 100_000


def test_json_that_is_deep_long_or_of_huge_numbers_is_a_value_error() -> None:
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for text in (DEEP, DEEP.encode(), '{"a": ' + "9" * 10_000 + "}", '{"a": ' * 100_000, " " * (LONGEST_JSON + 1)):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_report_a_config_and_metadata_nested_deep_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(DEEP)
    with pytest.raises(UsageError, match="is not JSON; run mm-edge prune-export again to write it"):
        read_report(tmp_path)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(DEEP)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError):
        load_model(str(folder), LoadOptions())
    conv = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    shapes = [onnx.helper.make_tensor_value_info(name, 1, [1, 2, 4, 4]) for name in ("x", "y")]
    weight = onnx.numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    graph = onnx.helper.make_graph([conv], "g", shapes[:1], shapes[1:], [weight])
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.metadata_props.add(key="mm_edge.input", value=DEEP)
    onnx.save(model, tmp_path / "m.onnx")
    assert load_model(str(tmp_path / "m.onnx"), LoadOptions()).input.shape == (2, 4, 4)


@pytest.mark.parametrize("text", [f"name = {DEEP}", "name = " + "9" * 10_000])
def test_a_target_that_cannot_be_parsed_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"t\.toml"):
        load_target(str(path))


def test_an_archive_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl2", b"\0" * (EXPANSION_BYTES + (1 << 20)))
    with pytest.raises(ModelError, match="unpacks to 65 MB, far more than the file"):
        read_weights(path, trust_pickle=False)
    exported = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(exported, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/archive_format", "pt2")
        archive.writestr("archive/models/model.json", b" " * (EXPANSION_BYTES + (1 << 20)))
    with pytest.raises(ModelError, match="unpacks to 65 MB, far more than the file"):
        load_model(str(exported), LoadOptions())


def test_members_nested_deep_in_an_exported_program_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "deep.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/archive_format", "pt2")
        archive.writestr("archive/models/model.json", DEEP)
    with pytest.raises(ModelError, match="is damaged; save it again with torch"):
        load_model(str(path), LoadOptions())


@pytest.mark.parametrize("good", ["s0", "s0**2", "2*s0 + 1", "Mod(s0, 8)", "Pow(s0, 2)", "Eq(s0**2, 4)", "(s0 + 1)//2"])
def test_plain_arithmetic_is_taken(good: str) -> None:
    assert _is_arithmetic(good)


@pytest.mark.parametrize(
    "bad",
    ["9**9**9**9", "s0**9", "s0**2**9", "(9)**9", "Pow(9, Pow(9, 9))", "Pow(s0, 99)", "9" * 30, "s0 + " * 5000 + "1",
     "__import__('os')", "s0.x"],
)  # fmt: skip
def test_expressions_that_take_time_or_run_code_are_not(bad: str) -> None:
    assert not _is_arithmetic(bad)


def test_json_of_this_size_is_read() -> None:
    assert len(parse_json(json.dumps(list(range(10_000))))) == 10_000


def test_an_input_of_petabytes_is_refused_before_it_is_made(tmp_path: Path) -> None:
    proto = hostile.make_onnx()
    del proto.graph.initializer[:], proto.graph.node[:], proto.graph.output[:]
    proto.graph.node.append(onnx.helper.make_node("Relu", [proto.graph.input[0].name], ["y"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
    for dimension, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, (1, 1 << 40, 16, 16), strict=True):
        dimension.dim_value = size
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"images is too large: an input has at most 67108864 values; give other"):
        load_model(str(tmp_path / "net.onnx"), LoadOptions())
