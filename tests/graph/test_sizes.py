"""Input sizes: what a network takes, how it is made again, and the rows that come of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import timm
import torch
from tiny_job import CLASSES, save_checkpoint, write_images
from torch import nn

from mm_edge.api import run_job
from mm_edge.errors import UsageError
from mm_edge.formats.device_files import read_metadata
from mm_edge.graph.compact import mask_tensors, masked_model, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.groups import read_structure
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.graph.sizes import auto_sizes, export_at, match_groups, remake, total_stride
from mm_edge.load.data import _PhotoPool, open_data
from mm_edge.load.models import LoadedModel, LoadOptions, load_model, wrap_module
from mm_edge.progress import Stages
from mm_edge.quality.evaluation import run_onnx
from mm_edge.quality.parity import compare, onnx_runner, torch_runner
from mm_edge.records import Report, file_name
from mm_edge.run.request import make_request

pytestmark = pytest.mark.slow

SIDE = 128
OTHER = 96


def load(name: str, side: int | None = None) -> LoadedModel:
    options = LoadOptions() if side is None else LoadOptions(input_size=(3, side, side))
    return load_model(f"timm:{name}", options)


def noise(side: int, count: int = 2) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32)


@pytest.mark.parametrize(
    ("side", "stride", "expected"),
    [
        (224, 32, (192, 160)),
        (224, 16, (208, 176)),
        (384, 32, (352, 320, 288)),
        (32, 8, (24,)),
        (28, 4, (24, 20)),
        (32, 32, ()),
        (16, 1, (15, 13)),
    ],
)
def test_auto_goes_down_to_seven_tenths_in_multiples_of_the_stride(
    side: int, stride: int, expected: tuple[int, ...]
) -> None:
    assert auto_sizes(side, stride) == expected


def test_what_the_option_takes() -> None:
    for given, read in {"auto": "auto", "none": "none", "224,192": (224, 192)}.items():
        assert make_request(input_sizes=given).input_sizes == read
    assert make_request(input_sizes=(224, 192, 192)).input_sizes == (224, 192)
    assert make_request().input_sizes is None
    with pytest.raises(
        UsageError, match=r"^--input-sizes 'small' is not auto, none or sides in pixels such as 224,192$"
    ):
        make_request(input_sizes="small")
    with pytest.raises(UsageError, match=r"^--input-sizes '192,0': give sides of 1 pixel or more, such as 224,192$"):
        make_request(input_sizes=(192, 0))


class Strided(nn.Module):
    """Strides 2, 2 and 3; the global pooling after them is no stride."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, 3, stride=3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = torch.max_pool2d(torch.relu(self.a(images)), 2)
        found = torch.relu(self.b(found))
        result: torch.Tensor = self.head(nn.functional.avg_pool2d(found, found.shape[-2:]).flatten(1))
        return result


def strided() -> LoadedModel:
    return wrap_module(Strided(), torch.zeros(1, 3, 36, 36), name="strided")


def test_the_stride_is_read_off_the_graph_where_nothing_states_it() -> None:
    model = strided()
    assert total_stride(model, read_raw(model)) == 12
    assert total_stride(load("test_vit"), read_raw(model)) == 16


@pytest.mark.parametrize(("name", "side"), [("test_resnet", 96), ("test_vit", 96)])
def test_a_network_made_again_answers_as_timms_own_and_is_pruned_alike(name: str, side: int) -> None:
    model = load(name)
    dense = read_structure(read_raw(model))
    raw = export_at(remake(model, side))
    structure = read_structure(raw)
    leaves = match_groups(dense, structure, side)
    assert model.module is not None
    own = copy.deepcopy(model.module)
    if hasattr(own, "set_input_size"):
        resize: Any = own.set_input_size
        resize(img_size=(side, side))
    images = noise(side)
    assert compare(onnx_runner(raw.model.clone()), torch_runner(own), images, "noise").max_rel_err < 1e-5
    assert structure.macs() < 0.5 * dense.macs()
    rng = np.random.default_rng(0)
    keep = {group.leaf: rng.permutation(group.size) < max(1, group.size // 2) for group in dense.groups}
    here = {leaves[leaf]: kept for leaf, kept in keep.items()}
    masked = onnx_runner(masked_model(raw, mask_tensors(structure, here)))
    compact = deploy(materialise(raw, structure, here))
    found = compare(onnx_runner(compact), masked, images, "noise")
    assert found.max_rel_err < 1e-4 and found.top1_agreement == 1.0
    assert compare(onnx_runner(raw.model.clone()), masked, images, "noise").max_rel_err > 1e-3
    assert model.input.shape[1] != side  # the network given stays as it is


def window_sizes(module: Any) -> list[tuple[tuple[int, int], ...]]:
    """Return the window size of every block of a Swin network, by stage."""
    return [tuple(block.window_size for block in layer.blocks) for layer in module.layers]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # timm's own interpolation
def test_a_windowed_transformer_gets_smaller_windows() -> None:
    model = load_model("timm:swin_tiny_patch4_window7_224", LoadOptions(input_size=(3, 64, 64)))
    made = remake(model, 32).module
    assert made is not None and model.module is not None
    sizes = window_sizes(made)
    own: Any = copy.deepcopy(model.module)
    own.set_input_size(img_size=(32, 32))
    assert sizes == window_sizes(own)
    with torch.no_grad():
        assert torch.equal(made(torch.ones(1, 3, 32, 32)), own.eval()(torch.ones(1, 3, 32, 32)))


def refusal(model: LoadedModel, side: int) -> str:
    with pytest.raises(UsageError) as caught:
        remake(model, side)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while it exports
def test_a_size_the_network_cannot_take_is_one_line(tmp_path: Path) -> None:
    assert (
        refusal(load("test_vit"), 100) == "--input-sizes 100: test_vit takes multiples of 16; the nearest are 96, 112"
    )
    assert refusal(strided(), 1).startswith("--input-sizes 1: strided does not run at that size: RuntimeError: ")
    assert refusal(load("levit_128s"), 192) == (
        "--input-sizes 192: levit_128s fixes its input size: timm does not resample "
        "stages.0.blocks.0.attn.attention_biases, which depends on it"
    )
    wide = wrap_module(Strided(), torch.zeros(1, 3, 36, 48), name="wide")
    assert refusal(wide, 24) == "--input-sizes 24: only square inputs change size; this network takes 36 x 48"
    ir.save(read_raw(strided()).model, tmp_path / "net.onnx")
    assert refusal(load_model(str(tmp_path / "net.onnx"), LoadOptions()), 24) == (
        "--input-sizes 24: an .onnx has its input size built in; give the weights with --arch, or one .onnx a size"
    )
    program = torch.export.export(Strided().eval(), (torch.zeros(1, 3, 36, 36),))
    torch.export.save(program, tmp_path / "net.pt2")
    assert refusal(load_model(str(tmp_path / "net.pt2"), LoadOptions()), 24) == (
        "--input-sizes 24: a .pt2 has its input size built in; give the state_dict with --arch"
    )


def test_images_of_another_size_are_the_same_images_and_share_what_is_known_of_them(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    spec = load("test_resnet", 32).input
    data = open_data(str(tmp_path / "images"), spec, CLASSES)
    small = data.prepared_for(remake(load("test_resnet", 32), 16).input)
    assert small.identity == data.identity
    for own, other in ((data.calibration, small.calibration), (data.validation, small.validation)):
        assert own.labels is not None and other.labels is not None
        assert own.labels.tolist() == other.labels.tolist()
        (images, _), (smaller, _) = next(own.batches(4)), next(other.batches(4))
        assert images.shape[1:] == (3, 32, 32) and smaller.shape[1:] == (3, 16, 16)
        assert np.abs(images.mean((2, 3)) - smaller.mean((2, 3))).max() < 0.2
    pool = data.validation._pool
    assert isinstance(pool, _PhotoPool)
    pool._leave_out(int(data.validation._indices[0]))
    assert len(small.validation) == len(data.validation) == 11
    assert len(data.warnings) == 1


def run(folder: Path, out: Path, **fields: Any) -> Report:
    setting = {"out": out, "data": str(folder / "images"), "bench": False}
    asked: Any = {"signals": ("magnitude",), "strategies": ("balanced",), "recover": "bn", **fields}

    def read() -> LoadedModel:
        return load_model(str(folder / "net.pt"), LoadOptions(input_size=(3, SIDE, SIDE)))

    return run_job(read, make_request(**setting, **asked), Stages())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder / "net.pt")
    write_images(folder / "images", per_class=8)
    return folder


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("done")
    return out, run(files, out, input_sizes=(SIDE, OTHER), macs=(0.7, 0.3))


def test_every_strategy_stands_at_every_size_beside_its_control(done: tuple[Path, Report]) -> None:
    assert [row.id for row in done[1].candidates] == [
        "dense@96",
        "magnitude/balanced/structured/fp32",
        "magnitude/balanced/structured/fp32@96",
        "magnitude/macs_0.7/structured/fp32",
        "magnitude/macs_0.3/structured/fp32",
        "magnitude/macs_0.3/structured/fp32@96",
    ]
    (control, *_) = done[1].candidates
    assert (control.kind, done[1].is_control(control), control.sparsity) == ("dense", True, 0.0)
    assert control.params == done[1].dense.params


def test_rows_at_another_size_are_made_counted_and_judged_there(files: Path, done: tuple[Path, Report]) -> None:
    out, report = done
    (balanced,) = [row for row in report.candidates if row.id == "magnitude/balanced/structured/fp32"]
    spec = load("test_resnet", SIDE).input
    data = open_data(str(files / "images"), spec, CLASSES).prepared_for(remake(load("test_resnet", SIDE), OTHER).input)
    dense = run_onnx(out / "dense.onnx", open_data(str(files / "images"), spec, CLASSES).validation.batches(8), 1)
    for row in report.candidates:
        if "@96" not in row.id:
            assert row.input_shape == (3, SIDE, SIDE)
            continue
        assert row.input_shape == (3, OTHER, OTHER)
        assert row.artifact is not None and row.parity is not None
        name = file_name(row.signal, row.strategy, row.kind, row.precision, 96)
        assert name in row.artifact and row.artifact.endswith("-96px.onnx")
        assert row.parity.max_rel_err <= 1e-4 and row.parity.inputs.kind == "images"
        written = read_metadata(out / row.artifact)["input"]
        assert written["shape"] == [3, OTHER, OTHER] and written["crop_pct"] == spec.crop_pct
        logits = run_onnx(out / row.artifact, data.validation.batches(8), 1)
        assert row.accuracy_top1 == pytest.approx((logits.argmax(1) == data.validation.labels).mean())
        assert row.agreement_top1 == pytest.approx((logits.argmax(1) == dense.argmax(1)).mean())
    (same,) = [row for row in report.candidates if row.id == "magnitude/balanced/structured/fp32@96"]
    assert same.sparsity == balanced.sparsity and same.params == balanced.params
    assert same.macs == pytest.approx(balanced.macs * (OTHER / SIDE) ** 2, rel=0.02)


def test_a_budget_holds_at_every_size(done: tuple[Path, Report]) -> None:
    for row in done[1].candidates:
        for budget in (0.7, 0.3):
            if f"/macs_{budget}/" in row.id:
                assert (budget - 0.03) * done[1].dense.macs <= row.macs <= budget * done[1].dense.macs


def test_a_state_dict_at_another_size_is_that_of_the_network_made_again(done: tuple[Path, Report]) -> None:
    import safetensors.torch

    out, report = done
    row = next(row for row in report.candidates if row.id.endswith("fp32@96"))
    assert row.masked_state_dict is not None and row.artifact is not None
    model = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    model.load_state_dict(safetensors.torch.load_file(out / row.masked_state_dict), strict=True)
    images = noise(OTHER)
    found = compare(onnx_runner(out / row.artifact), torch_runner(model), images, "noise")
    assert found.max_rel_err < 1e-4


def test_only_controls_without_the_option_and_nothing_with_none(files: Path, tmp_path: Path) -> None:
    report = run(files, tmp_path / "unsaid", recover="none")
    assert [row.id for row in report.candidates] == ["dense@96", "magnitude/balanced/structured/fp32"]
    report = run(files, tmp_path / "none", recover="none", input_sizes="none")
    assert [row.id for row in report.candidates] == ["magnitude/balanced/structured/fp32"]


def test_a_size_asked_for_and_not_taken_is_refused_before_the_folder_is_made(files: Path, tmp_path: Path) -> None:
    setting = {"out": tmp_path / "out", "data": str(files / "images"), "bench": False}
    with pytest.raises(UsageError, match=r"^--input-sizes 1: strided does not run at that size"):
        run_job(strided, make_request(**setting, input_sizes=(36, 1)), Stages())
    assert not (tmp_path / "out").exists()


def test_a_budget_goes_to_the_size_blocks_and_widths_that_diverge_least(files: Path, tmp_path: Path) -> None:
    report = run(files, tmp_path, recover="closed-form", input_sizes=(SIDE, OTHER), macs=(0.45,))
    (row,) = [row for row in report.candidates if row.signal == "sensitivity"]
    assert row.recovered_by == "closed-form" and row.macs <= 0.45 * report.dense.macs
    side = row.input_shape[-1]
    assert row.id == "sensitivity/macs_0.45/structured/fp32" + ("" if side == SIDE else f"@{side}")
    (note,) = [text for text in report.warnings if text.startswith("--macs 0.45 by sensitivity: ")]
    best = f"{side} px" + (f" without {' and '.join(row.removed_blocks)}" if row.removed_blocks else "")
    assert note.startswith(f"--macs 0.45 by sensitivity: {best} diverges least (nats: {best} ")
    assert f"{SIDE} px " in note and f"{OTHER} px " in note and "px without layer1.0 " in note
    recovered = {row.recovered_by for row in report.candidates if not report.is_control(row)}
    assert recovered <= {"closed-form", "closed-form (screened)"}
    divergences = [float(text.rpartition(" ")[2].rstrip(")")) for text in note.split(", ")]
    assert divergences == sorted(divergences)
