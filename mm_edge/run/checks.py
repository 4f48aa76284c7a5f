"""Checks before any work is done: what the data, the target or the device do not allow is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mm_edge.bench.target import Target
from mm_edge.errors import UsageError
from mm_edge.formats.precisions import PRECISIONS
from mm_edge.formats.preprocess import require_bakeable
from mm_edge.load.data import DataSplits
from mm_edge.load.models import LoadedModel
from mm_edge.plan.n_m import require_support
from mm_edge.plan.plans import PATTERN
from mm_edge.records import InputSpec
from mm_edge.run.recoveries import RECOVERIES
from mm_edge.run.request import Request

_NO_LABELS = "the images have no labels; give class folders"


@dataclass(frozen=True)
class Circumstances:
    """What a request is checked against: the images, the target, whether anything is measured, and the network."""

    request: Request
    data: DataSplits | None
    target: Target
    measured: bool
    spec: InputSpec | None = None
    is_classifier: bool = True

    @property
    def has_calibration_images(self) -> bool:
        """Whether there are calibration images."""
        return self.data is not None and len(self.data.calibration) > 0

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.data is not None and self.data.labelled

    @property
    def has_validation_images(self) -> bool:
        """Whether there are validation images."""
        return self.data is not None and len(self.data.validation) > 0


def check_request(
    request: Request,
    data: DataSplits | None,
    target: Target,
    measured: bool,
    spec: InputSpec | None = None,
    is_classifier: bool = True,
) -> None:
    """Refuse what cannot be done. `spec` is the input of the model, and `is_classifier` says whether it is one.

    Raises:
        UsageError: an option needs data or a device that is not there, or the target gains nothing from it.
    """
    given = Circumstances(request, data, target, measured, spec, is_classifier)
    for check in CHECKS:
        check(given)


def require_trainable(model: LoadedModel, recover: str) -> None:
    """Refuse to train a network without a PyTorch module.

    Raises:
        UsageError: the recovery takes gradient steps, and the network exists only as .onnx or as a traced program.
    """
    if not RECOVERIES[recover].trains:
        return
    if model.module is None or isinstance(model.module, torch.fx.GraphModule):
        what = "an .onnx file" if model.module is None else "an exported program"
        raise UsageError(
            f"--recover {recover} trains a PyTorch module, and {what} holds none; "
            "give the checkpoint with --arch, or use --recover closed-form"
        )
    if len(model.inputs) > 1:
        raise UsageError(
            f"--recover {recover} trains networks with one input, and this one takes {len(model.inputs)}; "
            "use --recover closed-form"
        )


def require_gradients(model: LoadedModel, loss: str | None) -> None:
    """Refuse a training loss for a network without gradients.

    Raises:
        UsageError: there is a loss, and the network exists only as .onnx.
    """
    if loss is not None and model.module is None:
        raise UsageError(
            f"--loss {loss} needs gradients, and an .onnx file has none; give the checkpoint with --arch, or a .pt2"
        )


def _precisions(given: Circumstances) -> None:
    # In the registry's order, so that the same request is always refused for the same reason.
    for name, precision in PRECISIONS.items():
        if name in given.request.precision and precision.check is not None:
            precision.check(given.target, given.has_calibration_images)


def _kinds(given: Circumstances) -> None:
    if "n:m" in given.request.kinds:
        require_support(given.target, PATTERN)


def _accuracy_on_device(given: Circumstances) -> None:
    if given.request.accuracy_on != "device":
        return
    if not given.measured:
        raise UsageError("--accuracy-on device needs a device, and nothing is measured here; give --host USER@HOST")
    if not given.has_validation_images:
        raise UsageError("--accuracy-on device needs validation images, and there are none; give --data PATH")
    if not given.has_labels:
        raise UsageError(f"--accuracy-on device needs accuracy, and {_NO_LABELS}")


def _training_images(given: Circumstances) -> None:
    least = RECOVERIES[given.request.recover].least_images
    if least and (given.data is None or given.data.calibration.position_count < least):
        raise UsageError(
            f"--recover {given.request.recover} trains on calibration images, and there are none; "
            "give --split a first part"
        )


def _augmentation(given: Circumstances) -> None:
    spec = given.spec
    if spec is None or not given.is_classifier or not RECOVERIES[given.request.recover].least_images:
        return
    plain = InputSpec(spec.shape, spec.mean, spec.std)
    for name in ("resize", "colours", "scale", "layout"):
        value = getattr(spec, name)
        if value != getattr(plain, name):
            raise UsageError(
                f"--recover {given.request.recover} augments photos as classifiers take them, and this network's "
                f"{name} is {value}; use --recover tune"
            )


def _ready_inputs(given: Circumstances) -> None:
    sizes = isinstance(given.request.input_sizes, tuple)
    trains = given.is_classifier and RECOVERIES[given.request.recover].least_images > 0
    if given.data is None or not (sizes or trains) or given.data.holds_photos:
        return
    if trains:
        raise UsageError(
            f"--recover {given.request.recover} augments photos, and {given.request.data} holds inputs that are ready; "
            "use --recover tune"
        )
    raise UsageError(f"--input-sizes needs photos, and {given.request.data} holds inputs for one size")


def _baking(given: Circumstances) -> None:
    if given.spec is not None and "bake-preprocess" in given.request.formats:
        require_bakeable(given.spec)


def _largest_drop(given: Circumstances) -> None:
    if given.request.max_drop is not None and not given.has_validation_images:
        raise UsageError("--max-drop needs accuracy, and there are no validation images; give --data PATH")


def _times(given: Circumstances) -> None:
    if given.measured:
        return
    if given.request.allocate_by == "latency":
        raise UsageError("--allocate-by latency times the network, and nothing is measured here; give --host USER@HOST")
    if given.request.latency is not None:
        raise UsageError("--latency needs a measurement, and nothing is measured here; give --target host or a device")


CHECKS: tuple[Callable[[Circumstances], None], ...] = (
    _precisions,
    _kinds,
    _accuracy_on_device,
    _training_images,
    _ready_inputs,
    _augmentation,
    _baking,
    _largest_drop,
    _times,
)
