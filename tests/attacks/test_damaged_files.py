"""Damaged files, odd tensors and what is no plain file: one line, exit code 2, in bounded time."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import hostile_files as hostile
import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from mm_edge.cli.main import main
from mm_edge.errors import DataError, MMEdgeError, ModelError, UsageError
from mm_edge.load import sources
from mm_edge.load.annotations import open_labels
from mm_edge.load.data import open_data
from mm_edge.load.exported import _OPERATOR
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.load.weights import read_weights
from mm_edge.records import InputSpec, parse_json
from mm_edge.report import read_report

SPEC = InputSpec((3, hostile.SIDE, hostile.SIDE), (0.5,) * 3, (0.25,) * 3)


def options(folder: Path) -> LoadOptions:
    (folder / "net.py").write_text(hostile.NETWORK)
    return LoadOptions(arch=f"{folder}/net.py:Net", input_size=(3, hostile.SIDE, hostile.SIDE))


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_file_is_taken_or_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    state = hostile.state_of_net()
    kinds: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("net.pt", lambda: hostile.damage(hostile.save_bytes(state), rng)),
        ("net.pt", lambda: hostile.damage_zip(hostile.save_bytes(state), rng)),
        ("net.pt", lambda: hostile.raw_pickle(rng)),
        ("net.pt", lambda: hostile.save_bytes(hostile.odd_state(rng))),
        ("net.safetensors", lambda: hostile.hostile_safetensors(rng)),
        ("net.onnx", lambda: hostile.hostile_onnx(rng)),
    )
    name, make = kinds[seed % len(kinds)]
    (tmp_path / name).write_bytes(make())
    own = options(tmp_path)
    try:
        load_model(str(tmp_path / name), own if name != "net.onnx" else LoadOptions())
    except ModelError as error:
        assert error.exit_code == 2
    assert not (Path.cwd() / hostile.CANARY).exists()


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    content = bytearray(hostile.save_bytes({"w": torch.ones(1000)}))
    at = content.index(torch.ones(1000).numpy().tobytes())
    content[at + 2001] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pt' is damaged or cut short; copy or save it again"):
        read_weights(tmp_path / "w.pt", trust_pickle=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "in float8_e4m3fn"),
        (lambda: torch.eye(3).to_sparse(), r"sparse \(torch.sparse_coo\)"),
        (lambda: hostile.quantised(torch.ones(3)), "quantised"),
        (lambda: torch.empty(3, device="meta"), r"without data \(a meta tensor\)"),
        (lambda: torch.zeros(1).expand(1 << 40), "1099511627776 values of which the file holds fewer"),
        (lambda: torch.ones(3, dtype=torch.complex64), "in complex64"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, make: Callable[[], torch.Tensor], said: str) -> None:
    (tmp_path / "w.pt").write_bytes(hostile.save_bytes({"stem.weight": make()}))
    with pytest.raises(ModelError, match=f"stem.weight is {said}; save the dense weights in float32"):
        read_weights(tmp_path / "w.pt", trust_pickle=False)


def test_tied_and_strided_weights_are_taken(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    (tmp_path / "w.pt").write_bytes(hostile.save_bytes({"a": shared, "b": shared.T, "c": torch.zeros(1).expand(8)}))
    content = read_weights(tmp_path / "w.pt", trust_pickle=False)
    assert not isinstance(content, torch.nn.Module) and set(content.tensors) == {"a", "b", "c"}


def test_a_directory_of_an_archive_that_lies_is_one_line(tmp_path: Path) -> None:
    content = bytearray(hostile.save_bytes({"w": torch.ones(10)}))
    content[content.index(b"PK\x01\x02") + 42] ^= 0xFF  # where the first member begins
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(tmp_path / "w.pt"), LoadOptions())


def test_operators_that_print_save_or_set_are_refused_in_exported_programs() -> None:
    for name in ("_print", "save", "warn", "set_.source_Tensor", "_assert_async.msg", "from_file", "record_stream"):
        assert not _OPERATOR.match(f"torch.ops.aten.{name}")
    for name in ("conv2d.default", "hardswish.default", "addmm.default", "slice_scatter.default", "select.int"):
        assert _OPERATOR.match(f"torch.ops.aten.{name}")


def test_torch_says_nothing_before_our_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(hostile.Net().eval(), (torch.zeros(1, 3, hostile.SIDE, hostile.SIDE),))
    torch.export.save(program, tmp_path / "good.pt2")

    def spoil(name: str, data: bytes) -> list[tuple[str, bytes]]:
        return [(name, data.replace(b'"graph_module"', b'"graph_nodule"'))]

    (tmp_path / "net.pt2").write_bytes(hostile.rezip((tmp_path / "good.pt2").read_bytes(), spoil))
    with pytest.raises(ModelError):
        load_model(str(tmp_path / "net.pt2"), LoadOptions())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["net.pt", "net.onnx", "net.pt2", "net"])
def test_a_pipe_and_a_device_are_no_model(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match="is neither a file nor a folder"):
        load_model(str(tmp_path / name), LoadOptions())
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is neither a file nor a folder"):
        load_model(str(tmp_path / name), LoadOptions())


def test_pipes_and_devices_among_photos_are_left_out(tmp_path: Path) -> None:
    folder = hostile.write_photos(tmp_path / "photos") / "class0"
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    splits = open_data(str(tmp_path / "photos"), SPEC, hostile.CLASSES)
    assert splits.warnings[-1].startswith("2 of 8 images cannot be read and are left out")
    for path in (tmp_path / "p.npz", tmp_path / "p.tar", tmp_path / "p.json"):
        os.mkfifo(path)
        with pytest.raises((DataError, UsageError)):
            open_labels(path) if path.suffix == ".json" else open_data(str(path), SPEC, hostile.CLASSES)
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(UsageError, match="is no file"):
        read_report(tmp_path)


def test_a_tar_that_promises_an_exabyte_is_refused_at_once(tmp_path: Path) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (4, 4)).save(photo, "PNG")
    content = next(
        found
        for seed in range(100)
        if (found := hostile.hostile_tar(random.Random(seed), photo.getvalue()))[124] == 0x80
    )
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"is cut short or damaged: class0/0\.png ends behind the end of the file"):
        open_data(str(tmp_path / "x.tar"), SPEC, hostile.CLASSES)


def test_tars_inside_tars_have_a_limit(tmp_path: Path) -> None:
    inner = b""
    for _ in range(sources.DEEPEST_TAR + 2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo("x.tar")
            info.size = len(inner)
            archive.addfile(info, io.BytesIO(inner))
        inner = out.getvalue()
    (tmp_path / "x.tar").write_bytes(inner)
    with pytest.raises(DataError):
        open_data(str(tmp_path / "x.tar"), SPEC, hostile.CLASSES)


def test_a_folder_that_takes_too_long_to_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.write_photos(tmp_path)
    monkeypatch.setattr(sources, "MOST_FILES", 3)
    with pytest.raises(DataError, match="is too large to be a folder of photos: 6 files were found"):
        open_data(str(tmp_path), SPEC, hostile.CLASSES)


def test_an_array_of_more_bytes_than_numbers_have_is_one_line(tmp_path: Path) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**400},), }}".encode()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(DataError, match=r"x\.npy"):
        open_data(str(tmp_path / "x.npy"), SPEC, hostile.CLASSES)


def test_whole_numbers_beyond_64_bits_are_not_read() -> None:
    assert parse_json('{"a": -9223372036854775808, "b": "123456789012345678901234567890"}')["a"] == -(2**63)
    for text in ("1" + "0" * 20, "[1, -" + "9" * 400 + "]", b"1" * 30):
        with pytest.raises(ValueError, match="a whole number of"):
            parse_json(text)


@pytest.mark.parametrize(("key", "value"), [("mean", [float("nan")] * 3), ("std", [1e-40] * 3), ("std", [10**19] * 3)])
def test_a_mean_or_std_that_no_photo_has_is_refused(tmp_path: Path, key: str, value: list[float]) -> None:
    state = {"arch": "test_resnet", "state_dict": {}}
    state["state_dict"] = timm.create_model("test_resnet").state_dict()
    (tmp_path / "net.pt").write_bytes(hostile.save_bytes({**state, key: value}))
    with pytest.raises(ModelError, match=f"the file states the {key} .*, which no photo can have; give --{key}"):
        load_model(str(tmp_path / "net.pt"), LoadOptions())


def test_an_architecture_beside_an_onnx_is_refused(tmp_path: Path) -> None:
    onnx.save(hostile.make_onnx(), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"--arch is for weights, and .*net\.onnx' holds its own network"):
        load_model(str(tmp_path / "net.onnx"), LoadOptions(arch="resnet18"))


@pytest.mark.parametrize("change", ["group", "scalar", "rank", "external", "nul"])
def test_onnx_that_nobody_writes_is_one_line(tmp_path: Path, change: str) -> None:
    proto = hostile.make_onnx()
    weight = proto.graph.initializer[0]
    if change == "group":
        proto.graph.node[0].attribute.append(onnx.helper.make_attribute("group", 0))
    elif change == "scalar":
        weight.CopyFrom(onnx.numpy_helper.from_array(np.ones((), np.float32), weight.name))
    elif change == "rank":
        weight.dims.extend([1] * 196)
    else:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="w.bin" if change == "external" else "\x00")
        (tmp_path / "w.bin").write_bytes(bytes(10))
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError):
        load_model(str(tmp_path / "net.onnx"), LoadOptions())


def test_bench_of_an_empty_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    done = CliRunner().invoke(main, ["bench", str(tmp_path / "net.onnx")])
    assert done.exit_code == 2
    assert done.stderr.endswith("net.onnx' is empty; write it again\n")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\xff" * 100, r"cannot be used \(DecodeError: .*\); bench takes \.onnx files"),
        (b"\x08\x08", "is no ONNX model: it has no output; bench takes .onnx files"),
    ],
)
def test_bench_of_what_is_no_onnx_starts_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, error: str
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    (tmp_path / "net.onnx").write_bytes(content)
    done = CliRunner().invoke(main, ["bench", str(tmp_path / "net.onnx")])
    assert done.exit_code == 2, done.output
    assert re.search(error, done.stderr)


def test_an_archive_of_photos_named_npz_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00\xff\xff(((")
    with pytest.raises(MMEdgeError):
        open_data(str(tmp_path / "x.npz"), SPEC, hostile.CLASSES)
