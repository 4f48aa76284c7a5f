"""Seeded generators of damaged and hostile files, texts and answers, for tests/attacks and benchmarks/attacks.py.

Everything is made from a `random.Random`, so that a seed names a case. Nothing here is dangerous beyond the folder it
is written in: what would run creates the file CANARY there.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from torch import nn

CANARY = "canary"
CLASSES, SIDE = 2, 16
NETWORK = """import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)
    def forward(self, images):
        x = self.norm(self.stem(images)).relu()
        return self.head(self.body(x).relu().mean((2, 3)))
"""
# Texts that lie on a terminal, or that code might take for something else.
TEXTS = (
    "\x1b[2J\x1b[31mdone", "\u202egnp.exe", "\n\nmm-edge: all is well", "\x00", "\x07\x08\r", "x" * 100_000,
    "[red]b[/]", "../../etc/passwd", "%s%n{0}{x}", "<script>alert(1)</script>", "\ud7ff\ufffe", "\U0001d4b3" * 400, "",
    " ", "-", "--out", "~", "\u2066a\u2069", "\x9b31m", "$(touch canary)", "`touch canary`", "; touch canary",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, 5e-324, float("nan"), float("inf"), True)


class Net(nn.Module):
    """The network of NETWORK."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).relu()
        head: torch.Tensor = self.head(self.body(x).relu().mean((2, 3)))
        return head


# ---- honest files


def make_onnx(sizes: Sequence[int] = (1, 3, SIDE, SIDE)) -> onnx.ModelProto:
    """Return a small network as ONNX: two convolutions and a classifier."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), name)

    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["images", "stem.weight", "stem.bias"], ["a"], pads=[1] * 4, strides=[2, 2]),
        make("Relu", ["a"], ["b"]),
        make("Conv", ["b", "body.weight", "body.bias"], ["c"], pads=[1] * 4),
        make("Relu", ["c"], ["d"]),
        make("GlobalAveragePool", ["d"], ["e"]),
        make("Flatten", ["e"], ["f"]),
        make("Gemm", ["f", "head.weight", "head.bias"], ["scores"], transB=1),
    ]
    weights = [
        weight("stem.weight", 8, 3, 3, 3), weight("stem.bias", 8), weight("body.weight", 8, 8, 3, 3),
        weight("body.bias", 8), weight("head.weight", CLASSES, 8), weight("head.bias", CLASSES),
    ]  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    inputs, outputs = [value("images", 1, list(sizes))], [value("scores", 1, [sizes[0], CLASSES])]
    graph = onnx.helper.make_graph(nodes, "net", inputs, outputs, weights)
    return onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)])


def write_photos(folder: Path, count: int = 3, side: int = SIDE) -> Path:
    """Write photos of two classes."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{label}{number}.{('png', 'jpg')[number % 2]}")
    return folder


def make_boxes(names: Sequence[str]) -> dict[str, Any]:
    """Return labels of COCO's format for photos of SIDE pixels."""
    images = [{"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 5, 6], "iscrowd": 0} for i in range(len(names))]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}


def state_of_net() -> dict[str, torch.Tensor]:
    """Return the tensors of the small network."""
    torch.manual_seed(0)
    return Net().eval().state_dict()


def save_bytes(value: Any, *, legacy: bool = False) -> bytes:
    """Return what torch.save writes of `value`."""
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=not legacy)
    return content.getvalue()


# ---- damage to bytes


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with one to four changes of random kinds."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        rng.choice(_DAMAGES)(data, rng)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))


def _number(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 8] = struct.pack("<q", rng.choice((-1, 2**31, 2**63 - 1, 0, 2**40)))


def _zero(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    length = min(rng.choice((1, 16, 256)), len(data) - at)
    data[at : at + length] = bytes(length)


def _repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.choice((8, 128, 1024))]
    data[at:at] = piece


def _head(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(min(len(data), 64))
    data[at] = rng.randrange(256)


_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _cut,
    _insert,
    _number,
    _zero,
    _repeat,
    _head,
)


# ---- damage to JSON


def hostile_value(rng: random.Random) -> Any:
    """Return a value that no field expects."""
    return rng.choice(
        (rng.choice(TEXTS), rng.choice(NUMBERS), None, [], {}, [[]], "9" * 400, [0] * 1000, {"a": {"": 1}})
    )


def damage_json(value: Any, rng: random.Random) -> str:
    """Return `value` as text with one or two places replaced, removed or added, or the text itself broken."""
    tree = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        _change_place_(tree, rng)
    text = json.dumps(tree)
    kind = rng.randrange(12)
    if kind == 0:
        return "[" * rng.choice((900, 100_000)) + text
    if kind == 1:
        return text.replace("1", "9" * 5000, 1)
    if kind == 2:
        return text[: rng.randrange(len(text) + 1)]
    return text


def _change_place_(tree: Any, rng: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        item = pending.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += [(item, key) for key in keys]
        pending += [item[key] for key in keys]
    if not places:
        return
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)[:2000]] = holder[key]
    else:
        holder[key] = hostile_value(rng)


# ---- pickles


class Payload:
    """Creates CANARY through one of several functions when it is unpickled."""

    def __init__(self, rng: random.Random) -> None:
        self._kind = rng.randrange(5)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        import os
        import subprocess

        return (
            (open, (CANARY, "w")),
            (os.system, (f"touch {CANARY}",)),
            (eval, (f"open('{CANARY}','w')",)),
            (subprocess.check_call, (["touch", CANARY],)),
            (os.mkdir, (CANARY,)),
        )[self._kind]


_GLOBALS = (
    "os system", "posix system", "builtins eval", "builtins exec", "subprocess Popen", "torch.hub load", "torch.load x",
    "torch.serialization load", "numpy.testing._private.utils runstring", "torch._utils _import_dotted_name",
    "torch.utils.collect_env run", "collections OrderedDict.__init__", "argparse FileType", "timm create_model",
    "torch.jit load", "pty spawn", "webbrowser open", "socket create_connection", "numpy load", "torch os.system",
)  # fmt: skip


def raw_pickle(rng: random.Random) -> bytes:
    """Return a pickle written by hand that calls a dangerous name."""
    module, _, name = rng.choice(_GLOBALS).partition(" ")
    argument = b"X" + struct.pack("<I", 12) + f"touch {CANARY}"[:12].encode()
    kind = rng.randrange(4)
    if kind == 0:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."
    if kind == 1:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        return b"\x80\x04" + texts + b"\x93" + argument + b"\x85R."
    if kind == 2:
        return b"\x80\x02(" + argument + b"i" + f"{module}\n{name}\n".encode() + b"."
    return b"\x80\x02(c" + f"{module}\n{name}\n".encode() + argument + b"o."


def rezip(content: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]], *, packed: bool = False) -> bytes:
    """Return a zip with what `change` makes of each member."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            for made, data in change(name, old.read(name)):
                new.writestr(made, data)
    return out.getvalue()


def damage_zip(content: bytes, rng: random.Random) -> bytes:
    """Return a zip with one member damaged, renamed, doubled, dropped, replaced by a pickle, or all of it packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        victim = rng.choice(archive.namelist())
    kind = rng.randrange(7)

    def change(name: str, data: bytes) -> list[tuple[str, bytes]]:
        if name != victim:
            return [(name, data)]
        if kind == 0:
            return [(name, damage(data, rng))]
        if kind == 1:
            return [(rng.choice((name.upper(), "../" + name, "/" + name, "a" * 300, "\x1b[2Jx", "")) or "x", data)]
        if kind == 2:
            return [(name, data), (name + rng.choice(("", "2")), damage(data, rng))]
        if kind == 3:
            return []
        if kind == 4:
            return [(name, raw_pickle(rng))]
        if kind == 5:
            return [(name, data + bytes(rng.choice((1, 1 << 20, 80 << 20))))]
        return [(name, b"")]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rezip(content, change, packed=kind == 5 or rng.random() < 0.2)


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as torch's deprecated quantised type holds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    """Return a nested tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def odd_state(rng: random.Random) -> dict[str, Any]:
    """Return a state_dict whose tensors are not what a network holds."""
    state: dict[str, Any] = dict(state_of_net())
    name = rng.choice(list(state))
    tensor = state[name].float()
    state[name] = rng.choice(
        (
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: tensor.to(torch.float8_e5m2),
            lambda: tensor.to_sparse(),
            lambda: quantised(tensor),
            lambda: torch.empty_like(tensor, device="meta"),
            lambda: torch.zeros(1).expand(1 << 20, 1 << 10),
            lambda: torch.zeros(1).expand(1 << 40),
            lambda: torch.tensor(1.0),
            lambda: torch.full_like(tensor, float("nan")),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.to(torch.bfloat16),
            lambda: tensor.double(),
            lambda: tensor.bool(),
            lambda: torch.zeros((1,) * 60),
            lambda: torch.zeros(0, 3),
            nested,
            lambda: tensor.reshape(-1)[::2],
            lambda: tensor.numpy(),
            lambda: "not a tensor",
        )
    )()
    if rng.random() < 0.2:
        state[rng.choice(TEXTS)] = torch.zeros(3)
    return state


def hostile_arguments(rng: random.Random) -> dict[str, Any]:
    """Return arguments for timm that a file must not give."""
    choices: tuple[tuple[str, Any], ...] = (
        ("checkpoint_path", "x.pth"), ("pretrained", True), ("pretrained_cfg", {"url": "http://192.0.2.1/w.pth"}),
        ("pretrained_cfg_overlay", {"file": "x.pth"}), ("cache_dir", "/"), ("layers", [10_000] * 4), ("in_chans", 0),
        ("num_classes", 10**9), ("features_only", True), ("img_size", [3, 30_000, 30_000]), ("drop_rate", float("nan")),
        ("norm_layer", "os.system"), ("act_layer", "eval"), ("depths", [1] * 1000), ("scriptable", True),
        ("exportable", True), ("embed_dim", 2**40), (rng.choice(TEXTS), rng.choice(NUMBERS)), ("block_args", [["x"]]),
    )  # fmt: skip
    return dict(rng.sample(choices, rng.choice((1, 1, 2))))


# ---- ONNX


def hostile_onnx(rng: random.Random) -> bytes:
    """Return a small network with one or two fields of the message changed to what nobody writes."""
    proto = make_onnx(rng.choice(((1, 3, SIDE, SIDE), (1, 3, SIDE, SIDE), (0, 3, 0, 0))))
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(_ONNX_CHANGES)(proto, rng)
    return bytes(proto.SerializeToString())


def _one_weight(proto: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    tensor: onnx.TensorProto = rng.choice(list(proto.graph.initializer))
    return tensor


def _change_dims(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _one_weight(proto, rng)
    kind = rng.randrange(5)
    if kind == 0:
        tensor.dims[0] = rng.choice((0, -1, 2**62, 10**9))
    elif kind == 1:
        del tensor.dims[:]
    elif kind == 2:
        tensor.dims.extend([1] * rng.choice((1, 8, 200)))
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    else:
        tensor.raw_data = damage(tensor.raw_data, rng)


def _change_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    _one_weight(proto, rng).data_type = rng.choice((0, 2, 7, 8, 10, 11, 16, 17, 20, 22, 99))


def _change_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(list(proto.graph.node))
    name = rng.choice(("group", "pads", "strides", "dilations", "kernel_shape", "axis", "transB", "auto_pad", "x"))
    del node.attribute[:]
    value = rng.choice((0, -1, 2**40, [0, 0], [2**40] * 2, [2**31] * 4, [], "SAME_LOWER", 1.5))
    if value == []:
        value = [1]
    node.attribute.append(onnx.helper.make_attribute(name, value))


_OPERATORS = (
    "Softmax", "Tile", "Expand", "Resize", "Loop", "If", "NonZero", "Einsum", "ConvTranspose", "RandomNormal", "Pad",
    "Slice", "Shape", "QLinearConv", "Custom",
)  # fmt: skip


def _change_operator(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(list(proto.graph.node))
    if rng.random() < 0.7:
        node.op_type = rng.choice((*_OPERATORS, *TEXTS[:4]))
    else:
        node.domain = rng.choice(("com.microsoft", "x", *TEXTS[:3]))


def _change_names(proto: onnx.ModelProto, rng: random.Random) -> None:
    text = rng.choice(TEXTS)
    if rng.random() < 0.5:
        for node in proto.graph.node:
            node.name = text
        proto.graph.input[0].name = text
        proto.graph.node[0].input[0] = text
        return
    tensor = _one_weight(proto, rng)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == tensor.name:
                node.input[index] = text
    tensor.name = text


def _change_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.choice((proto.graph.input, proto.graph.output))[0].type.tensor_type
    sizes = kind.shape.dim
    if rng.random() < 0.3:
        kind.elem_type = rng.choice((0, 7, 8, 10, 11, 16, 17, 99))
    else:
        sizes[rng.randrange(len(sizes))].dim_value = rng.choice((0, -1, 2**40, 30_000, 1 << 20, 7))


def _change_metadata(proto: onnx.ModelProto, rng: random.Random) -> None:
    own = {"shape": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "layout": "NCHW", "pad": 0}
    proto.metadata_props.add(key="mm_edge.input", value=damage_json(own, rng))


def _change_graph(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(6)
    nodes = proto.graph.node
    if kind == 0:
        nodes[1].input[0] = nodes[4].output[0]  # a cycle
    elif kind == 1:
        nodes.append(nodes[rng.randrange(len(nodes))])
    elif kind == 2:
        del nodes[rng.randrange(len(nodes))]
    elif kind == 3:
        proto.graph.initializer.append(proto.graph.initializer[0])
    elif kind == 4:
        proto.ir_version, proto.opset_import[0].version = rng.choice(((0, 18), (99, 18), (9, 0), (9, 99), (9, -1)))
    else:
        nest_if_(proto, rng.choice((1, 3, 12)))


def nest_if_(proto: onnx.ModelProto, depth: int) -> None:
    """Put in front of the network's output an `If` with `depth` more inside each of its branches: 2^depth graphs."""
    make = onnx.helper.make_node

    def branch(level: int) -> onnx.GraphProto:
        result = onnx.helper.make_tensor_value_info(f"r{level}", TensorProto.FLOAT, [1, CLASSES])
        if level == depth:
            return onnx.helper.make_graph([make("Identity", ["inner"], [f"r{level}"])], "g", [], [result])
        inside = make("If", ["yes"], [f"r{level}"], then_branch=branch(level + 1), else_branch=branch(level + 1))
        return onnx.helper.make_graph([inside], "g", [], [result])

    last = proto.graph.node[-1]
    last.output[0] = "inner"
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(make("If", ["yes"], ["scores"], then_branch=branch(1), else_branch=branch(1)))


def _change_external(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _one_weight(proto, rng)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = rng.choice(
        ("w.bin", "short.bin", "../user/notes.txt", "/etc/passwd", "/dev/zero", "fifo", "zero", "", "\x00")
    )
    entries = {
        "location": location,
        "offset": rng.choice(("0", "-1", "9" * 30, "x")),
        "length": rng.choice(("864", "-5", "8")),
    }
    for key, value in entries.items():
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=value)


_ONNX_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _change_dims, _change_type, _change_attribute, _change_operator, _change_names, _change_input, _change_metadata,
    _change_graph, _change_external,
)  # fmt: skip


# ---- safetensors, arrays, tars


def hostile_safetensors(rng: random.Random) -> bytes:
    """Return a .safetensors whose header was changed."""
    folder_file = io.BytesIO()
    state = {name: tensor.contiguous() for name, tensor in state_of_net().items()}
    from safetensors.torch import save

    folder_file.write(save(state, metadata={"arch": "test_resnet", "mean": "[0.5, 0.5, 0.5]"}))
    content = folder_file.getvalue()
    length = struct.unpack("<Q", content[:8])[0]
    header = damage_json(json.loads(content[8 : 8 + length]), rng).encode("utf-8", "surrogatepass")
    stated = rng.choice((len(header), len(header), len(header), 2**60, 0))
    return struct.pack("<Q", stated) + header + content[8 + length :]


def hostile_array(rng: random.Random) -> bytes:
    """Return a .npy whose header lies, or that holds what is no input."""
    kind = rng.randrange(6)
    out = io.BytesIO()
    shape = (4, 3, SIDE, SIDE)
    if kind == 0:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10 ** rng.choice((9, 18, 400))},), }}"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    if kind == 1:
        text = "{'descr': '<f4', 'shape': " + "(" * 500 + ", }"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    if kind == 2:
        np.save(out, np.array([Payload(rng)], dtype=object), allow_pickle=True)
        return out.getvalue()
    if kind == 3:
        np.save(out, np.full(shape, rng.choice((np.nan, np.inf, 1e38)), np.float32))
        return out.getvalue()
    array = rng.choice((np.zeros(shape, "U3"), np.zeros(shape, "M8[s]"), np.zeros(()), np.zeros((0, 3, SIDE, SIDE)),
                        np.zeros((1,) * 32), np.zeros(shape, "V7"), np.zeros(shape, complex)))  # fmt: skip
    np.save(out, array)
    return damage(out.getvalue(), rng) if rng.random() < 0.5 else out.getvalue()


def hostile_npz(rng: random.Random) -> bytes:
    """Return an .npz with lying members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        archive.writestr(rng.choice(("images.npy", "../images.npy", "x.npy", "\x1b[2J.npy")), hostile_array(rng))
        if rng.random() < 0.5:
            archive.writestr("labels.npy", hostile_array(rng))
        if rng.random() < 0.2:
            archive.writestr("bomb.npy", hostile_array(rng) + bytes(100 << 20))
    return out.getvalue() if rng.random() < 0.6 else damage(out.getvalue(), rng)


def hostile_tar(rng: random.Random, photo: bytes) -> bytes:
    """Return a tar of photos with headers that lie, links, devices and names that lead outside."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for label in range(CLASSES):
            for number in range(2):
                info = tarfile.TarInfo(f"class{label}/{number}.png")
                info.size = len(photo)
                archive.addfile(info, io.BytesIO(photo))
        info = tarfile.TarInfo(
            rng.choice(("class0/x.png", "/etc/x.png", "../../x.png", "class0/\x1b[2J.png", "c" * 250 + "/x.png"))
        )
        info.type = rng.choice(
            (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        )
        info.linkname = rng.choice(("/dev/zero", "/etc/passwd", "class0/x.png", ""))
        archive.addfile(info)
    content = bytearray(out.getvalue())
    kind = rng.randrange(4)
    if kind == 0:  # the size of the first member, base 256, 2^60
        header = bytearray(content[:512])
        header[124:136] = b"\x80" + (2 ** rng.choice((33, 60))).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[:512] = header
    elif kind == 1:
        return damage(bytes(content), rng)
    return bytes(content)


def hostile_photo(rng: random.Random, photo: bytes) -> bytes:
    """Return a damaged photo, or one whose header promises billions of pixels."""
    if rng.random() < 0.3:
        side = rng.choice((2**31 - 1, 60_000, 0))
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + photo[33:]
    return damage(photo, rng)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
