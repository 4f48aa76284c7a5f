"""Input that cannot be used ends with one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_files import write

from mm_edge.cli.main import main

KERNELS = {"w": (8, 3, 3, 3), "v": (4, 8, 1, 1)}
BODY = "a = Conv(x, w) b = Relu(a) y = Conv(b, v)"
METRICS = """
def raises(run):
    raise RuntimeError("no such board\\nsecond line")


def text(run):
    return "good"
"""


def net(folder: Path, body: str = BODY, inputs: str = "float[1,3,8,8] x") -> Path:
    return write(folder / "net.onnx", f"({inputs}) {{ {body} }}", KERNELS, outputs="float[1,4,6,6] y")


def arrays(folder: Path, **values: np.ndarray) -> list[str]:
    np.savez(folder / "data.npz", **values)  # type: ignore[arg-type]  # the stubs take the names for its own options
    return ["--data", str(folder / "data.npz")]


def images(count: int = 8, **changes: float) -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)
    if "first" in changes:
        found[2, 0, 0, 0] = changes["first"]
    return found


def not_onnx(folder: Path) -> list[str]:
    (folder / "net.onnx").write_bytes(b"\x08\x07hello, this is no protocol buffer")
    return []


def no_weights(folder: Path) -> list[str]:
    move_weights(folder)
    (folder / "net.data").unlink()
    return []


def weights_of_another(folder: Path) -> list[str]:
    move_weights(folder)
    (folder / "net.data").write_bytes(b"\0" * 16)
    return []


def weights_elsewhere(folder: Path) -> list[str]:
    move_weights(folder)
    proto = onnx.load(folder / "net.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../../etc/passwd" if entry.key == "location" else entry.value
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return []


def move_weights(folder: Path) -> None:
    proto = onnx.load(net(folder))
    onnx.save(proto, folder / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)


def unknown_domain(folder: Path) -> list[str]:
    proto = onnx.load(net(folder))
    proto.graph.node[1].domain = "com.example"
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return []


def wrong_shape(folder: Path) -> list[str]:
    net(folder)
    return arrays(folder, x=images()[..., :7])


def wrong_type(folder: Path) -> list[str]:
    net(folder)
    return arrays(folder, x=images().astype(np.int64))


def not_a_number(folder: Path) -> list[str]:
    net(folder)
    return arrays(folder, x=images(first=np.nan))


def one_array_for_two(folder: Path) -> list[str]:
    net(folder, "s = Add(x, z) a = Conv(s, w) b = Relu(a) y = Conv(b, v)", "float[1,3,8,8] x, float[1,3,8,8] z")
    return arrays(folder, x=images())


def unreadable_photos(folder: Path) -> list[str]:
    net(folder)
    (folder / "photos").mkdir()
    for number in range(4):
        (folder / "photos" / f"{number}.jpg").write_bytes(b"\xff\xd8 no picture")
    return ["--data", str(folder / "photos")]


def metric(name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        net(folder)
        (folder / "score.py").write_text(METRICS)
        return [*arrays(folder, x=images()), "--metric", f"{folder / 'score.py'}:{name}"]

    return make


def unknown_value(folder: Path) -> list[str]:
    net(folder)
    return [*arrays(folder, x=images()), "--judge", "bb"]


def pattern_of_no_layer(folder: Path) -> list[str]:
    """The network is exported, and dense.onnx written, before it is known that no layer takes the pattern."""
    net(folder)
    return [*arrays(folder, x=images()), "--kinds", "n:m", "--target", "jetson-orin", "--recover", "none"]


def loop_of_growing_shape(folder: Path) -> list[str]:
    made = "bool kk, float[b,4,8,8] q, float[c,d,e,f] r"
    nodes = "kk = Identity(k) q = Concat<axis=0>(p, p) r = Relu(q)"
    body = f"l (int64 i, bool k, float[a,4,8,8] p) => ({made}) {{ {nodes} }}"
    text = f"(float[1,3,8,8] x) {{ a = Conv(x, w) b, z = Loop(n, yes, a) <body = {body}> y = Conv(b, v) }}"
    constants = {"n": np.array(2), "yes": np.array(True)}
    kernels = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1)}
    write(folder / "net.onnx", text, kernels, constants, outputs="float[a,4,8,8] y")
    return []


CASES: list[tuple[Callable[[Path], list[str]], str]] = [
    (not_onnx, "is not a valid ONNX model"),
    (no_weights, "keeps its weights in 'net.data', which is not beside it"),
    (weights_of_another, "it belongs to another model or is cut off"),
    (weights_elsewhere, "it must lie beside the .onnx"),
    (unknown_domain, "com.example"),
    (wrong_shape, "has shape (8, 3, 8, 7); the model takes (examples, 3, 8, 8)"),
    (wrong_type, "holds int64 values; the model takes float32, scaled and normalised already: convert them"),
    (not_a_number, "holds NaN or infinite values in 1 of 8 examples, the first in number 2"),
    (one_array_for_two, "holds x; the model takes x, z: give one array of each name in an .npz"),
    (unreadable_photos, "photos"),
    (metric("raises"), "failed for the dense network: RuntimeError: no such board"),
    (metric("text"), "returned 'good' for the dense network"),
    (unknown_value, "--judge bb is no floating-point value of the network"),
    (pattern_of_no_layer, "--kinds n:m: no layer of this network takes 2:4: "),
    (loop_of_growing_shape, "does not run at x=1,3,8,8: Loop: Inconsistent shape in loop output"),
]


@pytest.mark.parametrize(("make", "text"), CASES, ids=[text for _, text in CASES])
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    make: Callable[[Path], list[str]], text: str, tmp_path: Path
) -> None:
    extra = make(tmp_path)
    arguments = ["prune-export", str(tmp_path / "net.onnx"), "--no-bench", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*arguments, "--strategies", "balanced", *extra])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("mm-edge: error: ") and text in line
    assert result.stderr.splitlines()[-1] == line
    assert not (tmp_path / "run").exists()


def test_branches_twelve_deep_are_read_in_seconds(tmp_path: Path) -> None:
    """Each level doubled the time before."""
    inner = "o = Identity(a)"
    for level in range(12):
        then = f"t{level} () => (float[1,4,8,8] {f'o{level - 1}' if level else 'o'}) {{ {inner} }}"
        other = f"e{level} () => (float[1,4,8,8] q{level}) {{ q{level} = Relu(a) }}"
        inner = f"o{level} = If(c) <then_branch = {then}, else_branch = {other}>"
    body = f"a = Conv(x, w) m = ReduceMean<keepdims=0>(a) c = Greater(m, zero) {inner} y = Conv(o11, v)"
    kernels = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1)}
    path = write(tmp_path / "net.onnx", f"(float[1,3,8,8] x) {{ {body} }}", kernels, {"zero": np.zeros((), np.float32)})
    started = time.process_time()
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    assert time.process_time() - started < 20


def test_a_host_that_cannot_be_reached_ends_with_exit_code_1(tmp_path: Path) -> None:
    """The files are fine and the device is not: exit code 1, unlike a --host that is none."""
    path = str(net(tmp_path))
    for host, code, text in (
        ("nobody@127.0.0.1:1", 1, "cannot connect: "),
        ("ssh://nobody@127.0.0.1", 2, "is not USER@HOST[:PORT] or an ssh alias"),
    ):
        result = CliRunner().invoke(main, ["bench", path, "--host", host])
        (line,) = result.stderr.splitlines()
        assert (result.exit_code, text in line) == (code, True), line
