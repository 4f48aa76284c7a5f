"""The examples of docs/extending.md: each is added to the running package, and one job is run with all of them."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from tiny_job import SIDE

from mm_edge.api import run_job
from mm_edge.bench.connect import open_transport
from mm_edge.bench.target import load_target
from mm_edge.cli.prune_export import prune_export
from mm_edge.graph.groups import read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.quality.divergences import divergence_for, divergence_per_image
from mm_edge.records import Report
from mm_edge.run.request import make_request

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
BLOCK = re.compile(r"^```(python|toml)\n# (entry in )?([\w./-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, *, entries: bool) -> list[tuple[str, str]]:
    """Return (path, text) of the page's files, or of its entries."""
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    return [(path, text) for kind, entry, path, text in found if kind == language and bool(entry) is entries]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module", autouse=True)
def extended() -> Iterator[None]:
    """The package with the page's files and entries; every registry is as it was afterwards."""
    added = []
    for path, text in blocks("python", entries=False):
        module = types.ModuleType(module_name(path))
        sys.modules[module.__name__] = module
        added.append(module.__name__)
        exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    saved = []
    for path, text in blocks("python", entries=True):
        registry = importlib.import_module(module_name(path))
        table = getattr(registry, text.partition("[")[0])
        saved.append((table, dict(table)))
        exec(compile(text, path, "exec", dont_inherit=True), dict(vars(registry)))
        assert len(table) == len(saved[-1][1]) + 1
    yield
    for table, before in reversed(saved):
        table.clear()
        table.update(before)
    for name in added:
        del sys.modules[name]


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A job with every example that a job can use."""
    out = tmp_path_factory.mktemp("extended")
    request = make_request(
        data=str(files / "images"),
        out=out,
        bench=False,
        input_sizes="none",
        strategies="deeper",
        signals="square",
        recover="shift-bias",
        precision="fp32,rounded",
        formats="checksum",
    )
    return out, run_job(
        lambda: load_model(str(files / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE))), request, Stages()
    )


def test_every_extension_point_has_an_example() -> None:
    names = {path.rpartition("/")[0] for path, _ in blocks("python", entries=False)}
    assert names == {
        "mm_edge/plan",
        "mm_edge/run",
        "mm_edge/formats",
        "mm_edge/quality",
        "mm_edge/bench",
        "mm_edge/graph/rules",
    }
    assert len(blocks("python", entries=True)) == len(blocks("python", entries=False)) == 8
    assert [path for path, _ in blocks("toml", entries=False)] == ["targets/my-board.toml"]


def test_strategy_signal_and_recovery_make_candidates(done: tuple[Path, Report]) -> None:
    _, report = done
    ids = {item.id: item for item in report.candidates}
    assert {"square/deeper/structured/fp32", "square/deeper/structured/rounded"} <= set(ids)
    made = ids["square/deeper/structured/fp32"]
    assert made.recovered_by == "shift-bias" and 0 < made.sparsity < 1
    assert made.parity is not None and made.parity.max_rel_err <= 1e-4


def test_a_precision_is_converted_and_judged(done: tuple[Path, Report]) -> None:
    out, report = done
    made = next(item for item in report.candidates if item.id == "square/deeper/structured/rounded")
    assert made.recovered_by == "shift-bias + cast rounded" and made.kl_to_dense is not None
    assert made.artifact is not None and made.artifact.endswith("square-deeper-structured-rounded.onnx")
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(out / made.artifact).graph.initializer]
    assert all((w.view(np.uint32) & 0xFFFF == 0).all() for w in weights if w.dtype == np.float32)


def test_a_format_is_written_beside_the_chosen_model(done: tuple[Path, Report]) -> None:
    out, report = done
    assert report.chosen is not None
    chosen = next(item for item in report.candidates if item.id == report.chosen.id)
    assert chosen.artifact is not None
    path = out / chosen.artifact
    text = (out / "bundle" / f"{path.name}.sha256").read_text()
    assert text == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def test_a_specific_divergence_takes_over() -> None:
    assert divergence_for((4, 3)).unit == "nats"
    assert divergence_for((4, 3, 2, 2)).unit == "shares of the deviation"
    dense = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    assert divergence_per_image(dense, dense).tolist() == [0.0] * 4
    assert divergence_per_image(dense, np.zeros_like(dense)).mean() == pytest.approx(1.0, abs=0.2)


def test_a_transport_is_opened_by_the_profile_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, profile), *_ = blocks("toml", entries=False)
    (tmp_path / "my-board.toml").write_text(profile.replace('"ssh"', '"recorded"'))
    (tmp_path / "answers.json").write_text('{"null": {"null_ns": [1]}}')
    monkeypatch.chdir(tmp_path)
    with open_transport(load_target(str(tmp_path / "my-board.toml")), None) as device:
        assert device.ask("null", {}, {}) == {"null_ns": [1]}


def test_a_target_is_one_file(tmp_path: Path) -> None:
    (_, profile), *_ = blocks("toml", entries=False)
    (tmp_path / "my-board.toml").write_text(profile)
    target = load_target(str(tmp_path / "my-board.toml"))
    assert (target.multiple("conv", "int8"), target.threads) == (16, 2)


def test_an_operator_rule_lets_channels_through(tmp_path: Path) -> None:
    first, second = (np.ones(shape, np.float32) for shape in ((8, 3, 1, 1), (2, 8, 1, 1)))
    nodes = [
        onnx.helper.make_node("Conv", ["x", "a"], ["h"]),
        onnx.helper.make_node("Shrink", ["h"], ["s"], lambd=0.0),
        onnx.helper.make_node("Conv", ["s", "b"], ["y"]),
    ]
    shapes = [onnx.helper.make_tensor_value_info(n, 1, [1, c, 4, 4]) for n, c in (("x", 3), ("y", 2))]
    weights = [onnx.numpy_helper.from_array(array, name) for array, name in ((first, "a"), (second, "b"))]
    graph = onnx.helper.make_graph(nodes, "g", shapes[:1], shapes[1:], weights)
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    assert isinstance(ir.load(path), ir.Model)
    (group,) = read_structure(raw_from_onnx(path)).groups
    assert group.size == 8


def test_the_command_line_offers_them() -> None:
    text = " ".join(CliRunner().invoke(prune_export, ["--help"], terminal_width=200).output.split())
    for name in ("deeper", "square", "shift-bias", "rounded", "--checksum"):
        assert name in text, name
