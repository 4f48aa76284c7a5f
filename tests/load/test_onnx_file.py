"""What is read from an .onnx before anything is done with it, and what is refused there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx_files import artifact, random_weights, read, write

from mm_edge.cli.main import main
from mm_edge.errors import ModelError
from mm_edge.load.models import LoadedModel, LoadOptions, ModelInput, load_model

KERNELS = {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}
BODY = "{ a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"


def net(folder: Path, shape: str = "N,3,H,W", body: str = BODY) -> Path:
    return write(folder / "net.onnx", f"(float[{shape}] x) {body}", KERNELS)


def load(path: Path, **options: tuple[int, ...]) -> LoadedModel:
    return load_model(str(path), LoadOptions(inputs=tuple(options.items())))


def refuse(path: Path, options: LoadOptions | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(path), options or LoadOptions())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sizes ----------------------------------------------------------------------------------------


def test_open_sizes_are_fixed_for_measuring_and_other_ones_are_found(tmp_path: Path) -> None:
    (item,) = load(net(tmp_path), x=(1, 3, 8, 6)).inputs
    assert item == ModelInput("x", (None, 3, None, None), (1, 3, 8, 6), (2, 3, 40, 70))


def test_an_open_batch_is_one_and_a_fixed_one_stays(tmp_path: Path) -> None:
    assert load(net(tmp_path, "N,3,4,4")).inputs[0].measured == (1, 3, 4, 4)
    (item,) = load(net(tmp_path, "7,3,4,4")).inputs
    assert item.shape == item.measured == item.other == (7, 3, 4, 4)


def test_dimensions_of_one_symbol_have_one_size(tmp_path: Path) -> None:
    text = "(float[N,3,H,W] x, float[2,N,8] s) { a = Conv(x, w) y = Conv(a, v) z = Identity(s) }"
    path = write(tmp_path / "net.onnx", text, KERNELS, outputs="float[] y, float[] z")
    first, second = load(path, x=(4, 3, 5, 5)).inputs
    assert second == ModelInput("s", (2, None, 8), (2, 4, 8), (2, 5, 8))
    assert first.other[0] == 5


def test_a_question_mark_is_no_symbol(tmp_path: Path) -> None:
    path = net(tmp_path)
    proto = onnx.load(path)
    for size in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        size.dim_param = "?"
    onnx.save(proto, path)
    assert refuse(path) == f"'{path}' leaves sizes of its input open: x (?, 3, ?, ?); add --input x=1,3,H,W"
    assert load(path, x=(1, 3, 8, 6)).inputs[0].measured == (1, 3, 8, 6)


def test_inspect_guesses_sizes_that_the_network_accepts(tmp_path: Path) -> None:
    """A head that was made for 32 by 32 leaves one size that fits."""
    text = "(float[N,3,H,W] x) { a = Conv(x, w) f = Flatten(a) y = MatMul(f, u) }"
    path = write(tmp_path / "net.onnx", text, {"w": (8, 3, 1, 1), "u": (8 * 32 * 32, 5)})
    (item,) = load_model(str(path), LoadOptions(guess_sizes=True)).inputs
    assert item.measured == (1, 3, 32, 32)
    assert item.other == (2, 3, 32, 32)


def test_a_baked_size_may_be_replaced_where_the_network_takes_it(tmp_path: Path) -> None:
    assert load(net(tmp_path, "10,3,32,32"), x=(1, 3, 8, 8)).inputs[0].shape == (1, 3, 8, 8)
    text = "(float[1,3,4,4] x) { f = Flatten(x) y = MatMul(f, u) }"
    path = write(tmp_path / "flat.onnx", text, {"u": (48, 5)})
    message = refuse(path, LoadOptions(inputs=(("x", (1, 3, 8, 8)),)))
    assert message.startswith(f"ONNX Runtime cannot run '{path}' with the shapes x=1,3,8,8: ")
    text = "(float[1,3,H,4] x) { f = Flatten(x) y = MatMul(f, u) }"
    path = write(tmp_path / "open.onnx", text, {"u": (48, 5)})
    message = refuse(path, LoadOptions(inputs=(("x", (1, 3, 8, 4)),)))
    assert message.startswith(f"'{path}' does not run at x=1,3,8,4: ")
    assert message.endswith("; give other sizes with --input NAME=SHAPE")


def test_input_must_name_an_input_and_its_rank(tmp_path: Path) -> None:
    path = net(tmp_path)
    assert refuse(path, LoadOptions(inputs=(("y", (1,)),))) == f"--input y: '{path}' takes x"
    message = refuse(path, LoadOptions(inputs=(("x", (1, 3)),)))
    assert message == f"--input x=1,3 has 2 sizes; '{path}' takes x (?, 3, ?, ?)"


def test_channels_last(tmp_path: Path) -> None:
    body = "{ t = Transpose<perm=[0,3,1,2]>(x) a = Conv(t, w) y = Conv(a, v) }"
    model = load(net(tmp_path, "N,H,W,3", body), x=(1, 8, 6, 3))
    assert model.inputs[0].channels_last
    assert model.input.shape == (3, 8, 6)
    path = tmp_path / "net.onnx"
    assert load_model(str(path), LoadOptions(input_size=(3, 8, 6))).inputs[0].measured == (1, 8, 6, 3)
    assert refuse(path) == f"'{path}' leaves sizes of its input open: x (?, ?, ?, 3); add --input x=1,H,W,3"


def test_an_artifact_of_its_own_states_its_size(tmp_path: Path) -> None:
    path = net(tmp_path)
    model = ir.load(path)
    model.metadata_props["mm_edge.input"] = json.dumps({"shape": [3, 8, 6]})
    ir.save(model, path)
    assert load(path).inputs[0].measured == (1, 3, 8, 6)


def test_an_unknown_rank_is_asked_for(tmp_path: Path) -> None:
    path = net(tmp_path)
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, path)
    assert refuse(path) == f"'{path}' leaves sizes of its input open: x of unknown rank; add --input x=SHAPE"
    (item,) = load(path, x=(1, 3, 4, 4)).inputs
    assert (item.shape, item.measured) == ((None, 3, None, None), (1, 3, 4, 4))
    assert len(read(path).groups) == 1


# --- refusals -------------------------------------------------------------------------------------


def external(path: Path, location: str, **keys: int) -> None:
    """Let the first weight lie in another file."""
    proto = onnx.load(path)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    onnx.save(proto, path)


@pytest.mark.parametrize("location", ["../weights.data", "/etc/passwd", ""])
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights.data").write_bytes(bytes(96))
    (tmp_path / "inner").mkdir()
    path = net(tmp_path / "inner")
    external(path, location)
    assert refuse(path) == f"'{path}' names '{location}' as the file of its weights; it must lie beside the .onnx"


def test_external_data_of_another_model_is_refused(tmp_path: Path) -> None:
    path = net(tmp_path)
    (tmp_path / "a.data").write_bytes(bytes(50))
    external(path, "a.data", length=96)
    message = "reads 96 bytes of 'a.data', which has 50; it belongs to another model or is cut off"
    assert refuse(path) == f"'{path}' {message}"


def test_external_data_of_a_constant_node_is_checked(tmp_path: Path) -> None:
    path = net(tmp_path)
    external(path, "gone.data")
    proto = onnx.load(path, load_external_data=False)
    node = onnx.helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0])
    del proto.graph.initializer[0]
    proto.graph.node.insert(0, node)
    onnx.save(proto, path)
    assert refuse(path) == f"'{path}' keeps its weights in 'gone.data', which is not beside it"


def test_a_quantised_file_is_refused_for_pruning_alone(tmp_path: Path) -> None:
    text = "(float[1,3,4,4] x) { q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Conv(d, w) }"
    path = write(tmp_path / "net.onnx", text, {"w": (8, 3, 1, 1)}, {"s": np.array(0.1, np.float32)})
    assert refuse(path) == (
        f"'{path}' is quantised already (QuantizeLinear); give the float file it was made from and add --precision int8"
    )
    assert load_model(str(path), LoadOptions(only_run=True)).warnings


def test_an_operator_that_onnx_runtime_does_not_have(tmp_path: Path) -> None:
    path = net(tmp_path, "1,3,4,4", "{ a = Conv(x, w) y = com.microsoft.NoSuchThing(a) }")
    message = refuse(path)
    assert message.startswith(f"ONNX Runtime cannot run '{path}': ")
    assert "NoSuchThing" in message


@pytest.mark.parametrize("cut", [0.2, 0.9])
def test_a_damaged_file(tmp_path: Path, cut: float) -> None:
    path = net(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    assert refuse(path).startswith(f"'{path}' is not a valid ONNX model: ")


def test_not_finite_weights_of_constant_nodes(tmp_path: Path) -> None:
    path = net(tmp_path, "1,3,4,4")
    proto = onnx.load(path)
    tensor = onnx.numpy_helper.from_array(np.full((8, 3, 1, 1), np.inf, np.float32), "w")
    del proto.graph.initializer[0]
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    onnx.save(proto, path)
    assert refuse(path) == f"'{path}': 24 of 24 values of w are NaN or infinite; export it again"


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--input", "x=1,3,0,4"], ["--input", "1,3,4,4"], ["--input", "x=1,3"]])
def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, options: list[str]) -> None:
    path, out = net(tmp_path), tmp_path / "out"
    result = CliRunner().invoke(main, ["prune-export", str(path), "--out", str(out), "--no-bench", *options])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_inspect_needs_no_sizes_and_says_what_is_open(tmp_path: Path) -> None:
    path = net(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "input x: float32 (?, 3, ?, ?), ? is open; read at 1,3,224,224" in result.stdout
    document = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json", "--input", "x=2,3,8,8"]).stdout)
    assert document["inputs"] == [
        {"name": "x", "shape": [None, 3, None, None], "measured": [2, 3, 8, 8], "dtype": "float32"}
    ]
    assert [group["id"] for group in document["groups"]] == ["w:0"]


def test_weights_keep_their_values(tmp_path: Path) -> None:
    found = read(net(tmp_path, "1,3,4,4"))
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in artifact(found).graph.initializer}
    rows = random_weights(KERNELS)["w"].reshape(8, 3)
    assert all(any(np.array_equal(row, other) for other in rows) for row in weights["w"].reshape(-1, 3))


@pytest.mark.parametrize(
    ("body", "columns", "classes"),
    [
        ("y = Gemm(x, w)", 4, 4),
        ("a = Gemm(x, w) y = Softmax(a)", 4, 4),
        ("a = Gemm(x, w) y = Tanh(a)", 4, None),
        ("a = Gemm(x, w) y = LpNormalization(a)", 4, None),
        ("a = Gemm(x, w) l = ReduceL2<axes=[1]>(a) c = Clip(l, e) y = Div(a, c)", 4, None),
        ("a = Gemm(x, w) y = Div(a, e)", 4, 4),
        ("y = Gemm(x, w)", 1, None),
    ],
)
def test_class_scores_have_two_columns_and_no_fixed_length(
    tmp_path: Path, body: str, columns: int, classes: int | None
) -> None:
    path = write(
        tmp_path / "net.onnx", f"(float[1,3] x) {{ {body} }}", {"w": (3, columns)}, {"e": np.array(1e-6, np.float32)},
        outputs=f"float[1,{columns}] y",
    )  # fmt: skip
    assert load(path).info.num_classes == classes
