"""Fine-tuning on small networks: masks hold, a killed run ends as an unbroken one, the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_job import CLASSES, write_images
from torch import nn

from mm_edge.arrays import Arrays
from mm_edge.errors import UsageError
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.load.data import ImageSet, open_data
from mm_edge.plan.n_m import parse_pattern, project_mask, reduced_axes, require_pattern
from mm_edge.quality.parity import compare, onnx_runner, torch_runner
from mm_edge.records import InputSpec
from mm_edge.recover.closed_form.batchnorm import reestimate_batch_norm_
from mm_edge.recover.training import finetune as module_under_test
from mm_edge.recover.training.finetune import (
    Checkpoints,
    FineTuned,
    Score,
    Settings,
    Student,
    autocast_type,
    choose_device,
    finetune,
    rate,
)
from mm_edge.recover.training.shrink import group_slices
from mm_edge.store import RunStore

SPEC = InputSpec((3, 16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0)
QUICK = Settings(epochs=3, batch=8, peak=1e-2, seed=5)


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual block, dropout: everything whose state a resumed run must find again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.drop: nn.Module = nn.Dropout(0.2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(self.bn(self.stem(x)).relu())).relu()
        x = x + self.bn2(self.conv2(x)).relu()
        found: torch.Tensor = self.head(self.drop(x.mean((2, 3))))
        return found


class Dropless(Net):
    """Without what draws other random numbers for another width."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()


class Normless(nn.Module):
    """Nothing that looks at a batch as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = write_images(tmp_path_factory.mktemp("images") / "images", per_class=7)
    return open_data(str(folder), SPEC, CLASSES, (1.0, 0.0, 0.0)).calibration


def make(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    network = kind()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.5, 1.5)
    return network.eval()


def state_of(network: nn.Module) -> Arrays:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def masked(network: nn.Module, fraction: float = 0.5) -> Student:
    """Return a student whose every weight matrix lost a random `fraction`."""
    rng = np.random.default_rng(0)
    masks = {name: rng.random(item.shape) >= fraction for name, item in network.named_parameters() if item.ndim > 1}
    start = {name: np.asarray(array * masks.get(name, True)) for name, array in state_of(network).items()}
    return Student(network, start, masks, {}, frozenset(dict(network.named_parameters())))


def better_each_time() -> Callable[[Arrays], Score]:
    count = 0

    def judge(state: Arrays) -> Score:
        nonlocal count
        count += 1
        return Score(count / 100, None)

    return judge


def run(student: Student, images: ImageSet, settings: Settings = QUICK, **more: Any) -> FineTuned:
    return finetune(student, images, SPEC, more.pop("judge", better_each_time()), settings, **more)


def same(one: FineTuned, other: FineTuned) -> bool:
    assert one.tensors is not None and other.tensors is not None
    return all(np.array_equal(array, other.tensors[name]) for name, array in one.tensors.items())


def test_masks_hold_and_everything_else_moves(images: ImageSet) -> None:
    student = masked(make())
    found = run(student, images)
    assert (found.epochs, found.reason) == (3, "all 3 epochs done; epoch 3 is the best")
    assert found.tensors is not None
    for name, mask in student.masks.items():
        np.testing.assert_array_equal(found.tensors[name] != 0, mask)
        assert not np.array_equal(found.tensors[name], student.start[name])
    assert not np.array_equal(found.tensors["bn.running_mean"], student.start["bn.running_mean"])
    assert not np.array_equal(student.dense.state_dict()["bn.running_mean"], found.tensors["bn.running_mean"])


def test_the_teacher_is_left_alone_and_so_are_the_callers_generators(images: ImageSet) -> None:
    network = make()
    before = state_of(network)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    run(masked(network), images)
    assert (torch.rand(1), np.random.rand()) == expected
    assert not network.training
    assert all(np.array_equal(array, before[name]) for name, array in state_of(network).items())


def test_what_the_graph_does_not_hold_by_name_stays(images: ImageSet) -> None:
    student = masked(make())
    found = run(replace(student, trainable=student.trainable - {"head.bias"}), images)
    assert found.tensors is not None
    np.testing.assert_array_equal(found.tensors["head.bias"], student.start["head.bias"])


def structured(network: nn.Module) -> tuple[RawGraph, Structure, Keep, Student]:
    raw = export_raw(network, torch.zeros(1, *SPEC.shape))
    structure = read_structure(raw)
    keep: Keep = {group.leaf: np.arange(group.size) % 3 > 0 for group in structure.groups}
    masks = {name: mask.dense() for name, mask in mask_tensors(structure, keep).items()}
    idle = {}
    for name in raw.buffers & set(structure.tensor_axes):
        (idle[name],) = structure.kept(name, keep)
    start = {name: np.asarray(array * masks.get(name, True)) for name, array in state_of(network).items()}
    groups = group_slices(structure, keep, raw.parameters | raw.buffers)
    return raw, structure, keep, Student(network, start, masks, idle, raw.parameters, groups)


def test_a_structured_network_stays_exact(images: ImageSet) -> None:
    network = make()
    raw, structure, keep, student = structured(network)
    assert len(structure.groups) == 2 and student.idle
    found = run(student, images)
    assert found.tensors is not None
    trained = make()
    trained.load_state_dict({name: torch.from_numpy(array) for name, array in found.tensors.items()})
    compact = deploy(materialise(raw, structure, keep, found.tensors))
    inputs = np.random.default_rng(0).standard_normal((4, *SPEC.shape)).astype(np.float32)
    assert compare(onnx_runner(compact), torch_runner(trained), inputs, "noise").max_rel_err < 1e-5
    assert compare(torch_runner(network), torch_runner(trained), inputs, "noise").max_rel_err > 1e-2
    for name, stays in student.idle.items():
        np.testing.assert_array_equal(found.tensors[name][~stays], student.start[name][~stays])
        assert not np.array_equal(found.tensors[name][stays], student.start[name][stays])


def test_the_small_module_learns_what_the_masked_one_does(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things aside: in the dense shapes the norm that is clipped counts the gradients of removed weights, and the
    gradient of a bias before a BatchNorm is rounding, which AdamW makes a step of.
    """
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: None)
    *_, student = structured(make(Dropless))
    student = replace(student, trainable=student.trainable - {"conv1.bias"})
    small, large = run(student, images), run(replace(student, groups=()), images)
    assert small.tensors is not None and large.tensors is not None
    for name, array in small.tensors.items():
        np.testing.assert_allclose(array, large.tensors[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_of_four_holds_on_the_exported_weights(images: ImageSet) -> None:
    network = make()
    raw = export_raw(network, torch.zeros(1, *SPEC.shape))
    axes, pattern = reduced_axes(raw.model), parse_pattern("2:4")
    weights = {name: array for name, array in state_of(network).items() if name in ("conv1.weight", "conv2.weight")}
    masks = {name: project_mask(np.abs(array), pattern, axes[name]) for name, array in weights.items()}
    start = {name: np.asarray(array * masks.get(name, True)) for name, array in state_of(network).items()}
    found = run(Student(network, start, masks, {}, raw.parameters), images)
    assert found.tensors is not None
    assert not np.array_equal(found.tensors["conv2.weight"], start["conv2.weight"])
    exported = deploy(materialise(raw, read_structure(raw), {}, found.tensors))
    require_pattern(exported, masks, axes, pattern)
    assert "BatchNormalization" not in {node.op_type for node in exported.graph}, "the exported weights hold the norms"


class Killed(Exception):
    pass


def stored_in(store: RunStore) -> Checkpoints:
    return Checkpoints(
        load=lambda: store.load_arrays("unfinished", {"a": 1}),
        save=lambda arrays: store.save_arrays("unfinished", {"a": 1}, arrays),
    )


@pytest.mark.parametrize("how", ["masks of weights", "channels in bfloat16"])
def test_killed_anywhere_and_resumed_equals_unbroken_bit_for_bit(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """21 images, batches of 8: two steps an epoch, six in all; killed after each of them, stored through the store."""
    student, always = masked(make()), replace(QUICK, checkpoint_s=0)
    if how == "channels in bfloat16":
        *_, student = structured(make())
        monkeypatch.setattr(module_under_test, "autocast_type", lambda module, device: torch.bfloat16)

    def judge(state: Arrays) -> Score:
        return Score(float(state["bn.num_batches_tracked"]), None)

    unbroken = run(student, images, judge=judge)
    assert unbroken.tensors is not None
    for last in range(1, 6):
        checkpoints = stored_in(RunStore(tmp_path / f"run{last}"))

        def kill(done: int, total: int, last: int = last) -> None:
            assert total == 6
            if done == last + 1:
                raise Killed

        with pytest.raises(Killed):
            run(student, images, always, judge=judge, checkpoints=checkpoints, advance=kill)
        steps: list[int] = []
        resumed = run(
            student,
            images,
            always,
            judge=judge,
            checkpoints=checkpoints,
            advance=lambda done, total, steps=steps: steps.append(done),
        )
        assert steps == list(range(last + 1, 7))
        assert same(resumed, unbroken)
        assert (resumed.epochs, resumed.reason) == (unbroken.epochs, unbroken.reason)


def test_a_finished_run_is_not_trained_on(images: ImageSet) -> None:
    kept: list[Arrays] = []
    student = masked(make())
    first = run(student, images, checkpoints=Checkpoints(lambda: None, kept.append))
    steps: list[int] = []
    again = run(
        student,
        images,
        checkpoints=Checkpoints(lambda: kept[-1]),
        advance=lambda done, total: steps.append(done),
    )
    assert steps == [] and same(first, again)


def test_a_batch_in_parts_is_the_same_step(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUICK, batch=16, epochs=1, mixed=0.0)
    whole = run(masked(make(Normless)), images, settings)
    monkeypatch.setattr(module_under_test, "PIXELS_AT_ONCE", 0)
    monkeypatch.setattr(module_under_test, "LEAST_AT_ONCE", 5)
    sizes: list[int] = []
    student = masked(make(Normless))
    teacher = student.dense

    class Counting(Normless):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                sizes.append(len(x))
            return super().forward(x)

    teacher.__class__ = Counting
    parts = run(student, images, settings)
    assert sizes == [4, 4, 4, 4]
    assert whole.tensors is not None and parts.tensors is not None
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(parts.tensors[name], array, atol=1e-6)


def test_labels_are_optional(images: ImageSet) -> None:
    def shuffled() -> ImageSet:
        class Wrong(ImageSet):
            def at(self, place: int) -> Any:
                found = super().at(place)
                return None if found is None else (found[0], (found[1] + 1) % CLASSES)

        return Wrong(images._pool, images._members)

    student = masked(make())
    unlabelled = replace(QUICK, label_share=0.0)
    assert same(run(student, images, unlabelled), run(student, shuffled(), unlabelled))
    assert not same(run(student, images), run(student, shuffled()))


def test_distillation_brings_the_student_to_the_teacher(images: ImageSet) -> None:
    network = make()
    pixels = np.concatenate([batch for batch, _ in images.batches(8)])
    reestimate_batch_norm_(network, [torch.from_numpy(pixels)])
    student = masked(network, 0.3)
    wanted = torch_runner(network)(pixels)[0]

    def error(state: Arrays) -> float:
        trained = make()
        trained.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        return float(np.square(torch_runner(trained)(pixels)[0] - wanted).mean())

    found = run(
        student,
        images,
        replace(QUICK, epochs=30, label_share=0.0, patience=30),
        judge=lambda state: Score(None, error(state)),
    )
    assert found.tensors is not None
    assert error(found.tensors) < 0.5 * error(dict(student.start))


@pytest.mark.parametrize(
    ("scores", "epochs", "best", "reason"),
    [
        ((0.5, 0.6, 0.4, 0.4, 0.4, 0.9), 4, 1, "validation images found no better state in the last 3 epochs; epoch 1"),
        ((0.5, 0.4, 0.4, 0.4, 0.9), 3, 0, "validation images found no better state in the last 3 epochs; none was"),
        ((0.5, 0.6, 0.5, 0.7, 0.6, 0.6), 5, 3, "all 5 epochs done; epoch 3 is the best"),
    ],
)
def test_the_best_state_is_kept(
    images: ImageSet, scores: tuple[float, ...], epochs: int, best: int, reason: str
) -> None:
    seen: list[Arrays] = []

    def judge(state: Arrays) -> Score:
        seen.append(state)
        return Score(scores[len(seen) - 1], 0.1)

    found = run(masked(make()), images, replace(QUICK, epochs=5), judge=judge)
    assert found.epochs == epochs == len(seen) - 1
    assert found.reason.startswith(reason)
    if best == 0:
        assert found.tensors is None
    else:
        assert found.tensors is seen[best]


def test_equal_accuracy_is_decided_by_divergence_and_the_earlier_of_equals_stays(images: ImageSet) -> None:
    scores = iter([Score(0.5, 0.3), Score(0.5, 0.2), Score(0.5, 0.2), Score(0.4, 0.1)])
    found = run(masked(make()), images, judge=lambda state: next(scores))
    assert found.reason == "all 3 epochs done; epoch 1 is the best"


def test_without_validation_images_the_last_state_is_kept(images: ImageSet) -> None:
    seen: list[Arrays] = []

    def judge(state: Arrays) -> None:
        seen.append(state)

    found = run(masked(make()), images, judge=judge)
    assert found.tensors is seen[-1] and len(seen) == 4
    assert (found.epochs, found.reason) == (3, "all 3 epochs done")


def test_the_average_follows_the_weights(images: ImageSet) -> None:
    """One step: d = min(1 - 1 / max(1, 1 / 20), (1 + 1) / (10 + 1)) = 0, so the average is the weight itself."""
    settings = replace(QUICK, batch=21, epochs=1)
    stored: list[Arrays] = []
    run(masked(make()), images, settings, checkpoints=Checkpoints(lambda: None, stored.append))
    np.testing.assert_array_equal(stored[0]["average/head.weight"], stored[0]["module/head.weight"])
    # 60 steps: 1 - 1 / 3, once (1 + t) / (10 + t) has passed it.
    long = replace(QUICK, batch=21, epochs=60, patience=60, checkpoint_s=0)
    stored.clear()
    run(masked(make()), images, long, checkpoints=Checkpoints(lambda: None, stored.append))
    for step, d in ((2, 3 / 12), (60, 2 / 3)):
        before, after = stored[step - 2], stored[step - 1]
        expected = d * before["average/head.weight"] + (1 - d) * after["module/head.weight"]
        np.testing.assert_allclose(after["average/head.weight"], expected, atol=1e-6)


def test_rates() -> None:
    settings = Settings(peak=1.0, warm_up=0.1)
    assert [rate(step, 20, settings) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate(11, 20, settings) == pytest.approx(0.5)
    assert rate(19, 20, settings) == pytest.approx((1 + math.cos(math.pi * 17 / 18)) / 2)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=4)
    data = open_data(str(folder), SPEC, CLASSES, (1.0, 0.0, 0.0))
    (folder / "class0" / "0.png").write_bytes(b"\x89PNG nothing")
    found = run(masked(make()), data.calibration, replace(QUICK, batch=12, epochs=1))
    assert found.tensors is not None and np.isfinite(found.tensors["head.weight"]).all()
    assert (len(data.calibration), data.calibration.position_count) == (11, 12)


def test_too_few_images(images: ImageSet) -> None:
    with pytest.raises(UsageError) as caught:
        run(masked(make()), images.take(1))
    assert str(caught.value) == "--recover finetune has 1 calibration images; give at least 2"


def test_the_device_is_found() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device().type == expected


def test_bfloat16_is_for_wide_ungrouped_networks_on_cpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Conv2d(128, 8, 3)), make()
    grouped = nn.Sequential(*wide, nn.Conv2d(128, 128, 3, groups=128))
    monkeypatch.setattr(module_under_test, "_has_bfloat16", lambda: True)
    assert autocast_type(wide, torch.device("cpu")) is torch.bfloat16
    assert autocast_type(wide, torch.device("cuda")) is None
    assert autocast_type(narrow, torch.device("cpu")) is None
    assert autocast_type(grouped, torch.device("cpu")) is None
    monkeypatch.setattr(module_under_test, "_has_bfloat16", lambda: False)
    assert autocast_type(wide, torch.device("cpu")) is None


def test_bfloat16_trains_fp32_weights_and_masks_hold(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(module_under_test, "autocast_type", lambda module, device: torch.bfloat16)

    class Watched(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = super().forward(x)
            seen.append(found.dtype)
            return found

    student = masked(make(Watched))
    found = run(student, images)
    assert set(seen[1:]) == {torch.bfloat16}, "the first call counts the classes"
    assert found.tensors is not None
    for name, mask in student.masks.items():
        assert found.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(found.tensors[name] != 0, mask)


def test_an_image_is_decoded_once_while_there_is_room(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(ImageSet):
        def at(self, place: int) -> Any:
            read.append(place)
            return super().at(place)

    student, counted = masked(make()), Counting(images._pool, images._members)
    read: list[int] = []
    kept = run(student, counted)
    assert len(read) == len(set(read))
    read.clear()
    monkeypatch.setattr(module_under_test, "DECODED_BYTES", 5 * 40 * 40 * 3)
    assert same(run(student, counted), kept)
    times = {place: read.count(place) for place in read}
    assert [times[place] for place in read[:5]] == [1] * 5 and max(times.values()) > 1


def test_tied_and_integer_state_goes_through(images: ImageSet) -> None:
    found = run(masked(make()), images)
    assert found.tensors is not None
    assert found.tensors["bn.num_batches_tracked"] == 6
    ir.tensor(found.tensors["bn.num_batches_tracked"])
