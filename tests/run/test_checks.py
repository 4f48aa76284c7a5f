"""What the data and the input of the model do not allow is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mm_edge.bench.target import load_target
from mm_edge.errors import UsageError
from mm_edge.records import InputSpec
from mm_edge.run.checks import check_request
from mm_edge.run.request import make_request

SPEC = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


class Images(list[int]):
    """As many images as numbers."""

    @property
    def position_count(self) -> int:
        return len(self)


def refuse(spec: InputSpec = SPEC, labelled: bool = True, photos: bool = True, **options: Any) -> str:
    images = Images(range(4))
    data: Any = SimpleNamespace(calibration=images, validation=images, labelled=labelled, holds_photos=photos)
    request = make_request(data="x", **options)
    check_request(make_request(data="x"), data, load_target("host"), True, spec)
    with pytest.raises(UsageError) as caught:
        check_request(request, data, load_target("host"), True, spec)
    return str(caught.value)


def test_without_labels_nothing_counts_in_accuracy() -> None:
    text = "the images have no labels; give class folders"
    assert refuse(labelled=False, accuracy_on="device") == f"--accuracy-on device needs accuracy, and {text}"


def test_finetuning_needs_no_labels_and_for_other_networks_than_classifiers_no_plain_photos() -> None:
    images = Images(range(4))
    request, target = make_request(data="x", recover="finetune"), load_target("host")
    boxed = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, resize="letterbox")
    unlabelled: Any = SimpleNamespace(calibration=images, validation=images, labelled=False, holds_photos=True)
    check_request(request, unlabelled, target, True, SPEC)
    ready: Any = SimpleNamespace(calibration=images, validation=images, labelled=False, holds_photos=False)
    check_request(request, ready, target, True, boxed, is_classifier=False)


def test_ready_inputs_are_not_augmented_or_resized() -> None:
    assert refuse(photos=False, recover="finetune") == (
        "--recover finetune augments photos, and x holds inputs that are ready; use --recover tune"
    )
    assert refuse(photos=False, input_sizes="16,24") == "--input-sizes needs photos, and x holds inputs for one size"


def test_finetuning_takes_photos_as_classifiers_do() -> None:
    boxed = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, resize="letterbox")
    assert refuse(boxed, recover="finetune") == (
        "--recover finetune augments photos as classifiers take them, and this network's resize is letterbox; "
        "use --recover tune"
    )


def test_baking_is_refused_at_the_start() -> None:
    boxed = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, resize="fit-height")
    assert refuse(boxed, formats="bake-preprocess") == (
        "--bake-preprocess writes the resizings crop and stretch; this network's is fit-height"
    )
