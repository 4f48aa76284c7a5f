"""Inputs that are ready: arrays of a file, batches of the user's code, and one line for what does not fit."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_edge.arrays import Array
from mm_edge.errors import DataError, UsageError
from mm_edge.load import ready
from mm_edge.load.data import DataSplits, open_data
from mm_edge.load.network import ModelInput
from mm_edge.records import InputSpec

SPEC = InputSpec((3, 4, 6), (0.5,) * 3, (0.2,) * 3)
LAST = InputSpec((3, 4, 6), (0.5,) * 3, (0.2,) * 3, layout="NHWC")
IMAGES = (ModelInput("images", (None, 3, 4, 6), (1, 3, 4, 6), (2, 3, 4, 6)),)
EXAMPLES = np.random.default_rng(0).normal(size=(8, 3, 4, 6)).astype(np.float32)
UNLABELLED = "has no labels: its inputs count as unlabelled, so no accuracy is measured"


def refuse(path: object, num_classes: int | None = 3, inputs: tuple[ModelInput, ...] = IMAGES) -> str:
    with pytest.raises(UsageError) as caught:
        open_data(str(path), SPEC, num_classes, inputs=inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_inputs(splits: DataSplits) -> np.ndarray[Any, Any]:
    sets = (splits.calibration, splits.validation, splits.test)
    return np.concatenate([batch for images in sets for batch, _ in images.batches(3)])


def rows(array: np.ndarray[Any, Any]) -> list[bytes]:
    return sorted(example.tobytes() for example in array)


def write_code(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(f"import numpy as np\n{body}")
    return f"{folder / 'mine.py'}:give"


def test_an_npz_by_the_name_of_the_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=EXAMPLES)
    splits = open_data(str(tmp_path / "x.npz"), SPEC, 3, seed=1, inputs=IMAGES)
    assert [len(s) for s in (splits.calibration, splits.validation, splits.test)] == [4, 2, 2]
    assert rows(all_inputs(splits)) == rows(EXAMPLES)
    assert not splits.labelled and splits.calibration.labels is None
    assert splits.warnings == (f"'{tmp_path / 'x.npz'}' {UNLABELLED}",)
    described = splits.describe()
    assert (described["kind"], described["preprocessing"], described["classes"]) == ("inputs", None, 0)
    with pytest.raises(DataError, match="holds inputs for one size; give photos for other input sizes"):
        splits.prepared_for(SPEC)


def test_labels_beside_the_inputs(tmp_path: Path) -> None:
    labels = np.arange(8) % 3
    np.savez(tmp_path / "x.npz", images=EXAMPLES.astype(np.float64), labels=labels)
    splits = open_data(str(tmp_path / "x.npz"), SPEC, 3, split=(0, 0, 1), inputs=IMAGES)
    assert splits.classes == ("0", "1", "2") and splits.warnings == ()
    by_example = {example.tobytes(): int(label) for example, label in zip(EXAMPLES, labels, strict=True)}
    for batch, found in splits.test.batches(3):
        assert batch.dtype == np.float32
        assert [by_example[example.tobytes()] for example in batch] == found.tolist()
    unused = open_data(str(tmp_path / "x.npz"), SPEC, None, inputs=IMAGES)
    assert unused.warnings == (f"the model is no classifier: the labels in '{tmp_path / 'x.npz'}' are not used",)
    assert not unused.labelled


def test_an_npy_and_any_name_for_a_module(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", EXAMPLES.transpose(0, 2, 3, 1))
    assert all_inputs(open_data(str(tmp_path / "x.npy"), LAST, None)).shape == (8, 4, 6, 3)
    np.savez(tmp_path / "x.npz", anything=EXAMPLES)
    assert rows(all_inputs(open_data(str(tmp_path / "x.npz"), SPEC, None))) == rows(EXAMPLES)


def test_identity_follows_the_values(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        np.save(tmp_path / "x.npy", EXAMPLES + number)
        found.append(open_data(str(tmp_path / "x.npy"), SPEC, None).identity)
    np.save(tmp_path / "x.npy", EXAMPLES)
    assert found[0] != found[1]
    assert open_data(str(tmp_path / "x.npy"), SPEC, None).identity == found[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": EXAMPLES[:, :2]}, "images has shape (8, 2, 4, 6); the model takes (examples, 3, 4, 6)"),
        ({"images": EXAMPLES[0]}, "images has shape (3, 4, 6); the model takes (examples, 3, 4, 6)"),
        ({"images": EXAMPLES[:0]}, "images holds no examples"),
        (
            {"images": (EXAMPLES * 9).astype(np.int16)},
            "images holds int16 values; the model takes float32, scaled and normalised already: convert them",
        ),
        (
            {"images": np.where(np.arange(8).reshape(8, 1, 1, 1) < 6, EXAMPLES, np.nan)},
            "images holds NaN or infinite values in 2 of 8 examples, the first in number 6",
        ),
        (
            {"images": np.full((1, 3, 4, 6), 1e300)},
            "images holds NaN or infinite values in 1 of 1 examples, the first in number 0",
        ),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert refuse(path) == f"'{path}': {message}"


@pytest.mark.parametrize(
    ("arrays", "found"),
    [({"x": EXAMPLES}, "x"), ({"images": EXAMPLES, "more": EXAMPLES}, "images, more"), ({}, "no arrays")],
)
def test_names_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], found: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert refuse(path) == (f"'{path}' holds {found}; the model takes the input 'images': give one array of that name")


TWO = (*IMAGES, ModelInput("scale", (1, 2), (1, 2), (1, 2), "int64"))


def test_two_inputs_come_as_one_structured_array(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=EXAMPLES, scale=np.arange(2 * len(EXAMPLES)).reshape(-1, 2))
    splits = open_data(str(path), SPEC, None, (1.0, 0.0, 0.0), inputs=TWO)
    batch: Array = next(splits.calibration.batches(len(EXAMPLES)))[0]
    assert batch.dtype.names == ("images", "scale") and batch["scale"].dtype == np.int64
    for number in range(len(EXAMPLES)):
        place = int(batch["scale"][number, 0]) // 2
        np.testing.assert_array_equal(batch["images"][number], EXAMPLES[place])


def test_what_two_inputs_need(tmp_path: Path) -> None:
    two = TWO
    np.save(tmp_path / "x.npy", EXAMPLES)
    assert refuse(tmp_path / "x.npy", inputs=two) == (
        f"'{tmp_path / 'x.npy'}' holds images; the model takes images, scale: give one array of each name in an .npz"
    )
    path = tmp_path / "y.npz"
    np.savez(path, images=EXAMPLES, scale=np.zeros((1, 2), np.int64))
    assert refuse(path, inputs=two) == (
        f"'{path}' holds different numbers of examples: images {len(EXAMPLES)}, scale 1; give one of each input per "
        "example"
    )
    np.savez(path, images=EXAMPLES, scale=np.zeros((len(EXAMPLES), 2), np.float32))
    assert refuse(path, inputs=two) == f"'{path}': scale holds float32 values; the model takes int64: convert them"
    assert refuse(tmp_path, inputs=two) == (
        "the model takes images (1, 3, 4, 6), scale (1, 2); photos feed models with one input of images"
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(7, np.int64), "has shape (7,) and type int64; give one whole number for each of the 8 examples"),
        (np.zeros(8), "has shape (8,) and type float64; give one whole number for each of the 8 examples"),
        (np.arange(8), "are from 0 to 7; the model has classes 0 to 2"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: np.ndarray[Any, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=EXAMPLES, labels=labels)
    assert refuse(path) == f"'{path}': labels {message}"


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([object(), 1], dtype=object)
    np.savez(tmp_path / "x.npz", images=objects, allow_pickle=True)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    text = "holds Python objects, which are not read; save arrays of numbers"
    assert refuse(tmp_path / "x.npz") == f"'{tmp_path / 'x.npz'}': images {text}"
    assert refuse(tmp_path / "x.npy") == f"'{tmp_path / 'x.npy'}' {text}"


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 3, 224, 224)}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    assert refuse(tmp_path / "x.npz") == (
        f"'{tmp_path / 'x.npz'}' holds 574,219 MB of arrays, and at most 1,536 MB are kept in memory; "
        "give fewer examples"
    )


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"no archive")
    (tmp_path / "x.npy").write_bytes(b"no array")
    assert refuse(tmp_path / "x.npz").startswith(f"'{tmp_path / 'x.npz'}' cannot be read as an .npz of arrays: ")
    assert refuse(tmp_path / "x.npy").startswith(f"'{tmp_path / 'x.npy'}' cannot be read as an .npy array: ")
    np.save(tmp_path / "x.npy", EXAMPLES)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:300])
    assert refuse(tmp_path / "x.npy").startswith(f"'{tmp_path / 'x.npy'}' cannot be read as an .npy array: ")


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [("x", False), ("{'images': x}", False), ("(x, y)", True), ("[{'images': x}, y]", True), ("(x,)", False)],
)
def test_batches_of_the_users_code(tmp_path: Path, batch: str, labelled: bool) -> None:
    body = "def give():\n  for i in range(4):\n    x, y = np.full((2, 3, 4, 6), i / 4, 'f4'), np.full(2, i % 3)\n"
    path = write_code(tmp_path, f"{body}    yield {batch}\n")
    splits = open_data(path, SPEC, 3, split=(0, 0, 1), inputs=IMAGES)
    assert splits.labelled is labelled
    found = all_inputs(splits)[:, 0, 0, 0]
    assert sorted(found.tolist()) == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    if labelled:
        assert splits.test.labels is not None and splits.test.labels.tolist() == (found * 4 % 3).astype(int).tolist()


def test_code_that_yields_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "READY_EXAMPLES", 6)
    path = write_code(tmp_path, "def give():\n  while True:\n    yield np.zeros((4, 3, 4, 6), 'f4')\n")
    splits = open_data(path, SPEC, None, split=(1, 0, 0))
    assert len(splits.calibration) == 8
    assert splits.warnings == (f"'{path}' {UNLABELLED}", f"only the first 8 examples of '{path}' are used")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  yield np.zeros((2, 3, 4, 6))\n  1 / 0\n", " failed after 1 batches: ZeroDivisionError: division by zero"),
        ("  return 5\n", " failed after 0 batches: TypeError: 'int' object is not iterable"),
        ("  return []\n", " yields nothing; yield batches of inputs"),
        ("  yield 'text'\n", ": batch 1 holds str; yield arrays of numbers"),
        ("  yield 1, 2, 3\n", ": batch 1 has 3 parts; yield inputs, or (inputs, labels)"),
        (
            "  yield np.zeros((2, 3, 4, 6))\n  yield np.zeros((2, 5))\n",
            " yields batches that differ in names or shapes: ValueError: all the input arrays must have same number of "
            "dimensions, but the array at index 0 has 4 dimension(s) and the array at index 1 has 2 dimension(s)",
        ),
    ],
)
def test_code_that_fails(tmp_path: Path, body: str, message: str) -> None:
    path = write_code(tmp_path, f"def give():\n{body}")
    assert refuse(path) == f"--data {path}{message}"


def test_code_that_is_not_there(tmp_path: Path) -> None:
    path = write_code(tmp_path, "def give():\n  return []\n")
    other = path.replace(":give", ":gave")
    assert refuse(other) == f"--data {other}: unknown callable 'gave'; did you mean give?"
    assert refuse(tmp_path / "no.py:give") == (
        f"--data {tmp_path / 'no.py:give'}: the file '{tmp_path / 'no.py'}' does not exist"
    )
