"""Reading and splitting images: what comes out, in which order, and one clear line for what cannot be used."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from mm_edge.arrays import IntArray
from mm_edge.errors import DataError
from mm_edge.load import data, sources
from mm_edge.load.data import ImageSet, noise_of, open_data
from mm_edge.load.network import ModelInput
from mm_edge.records import InputSpec, to_json

SPEC = InputSpec((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.8)


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (24, 20)) -> Path:
    """Write `counts` images of each class; every image of the folder has its own pixels."""
    generator = np.random.default_rng(len(str(root)))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    return path


def pixels_of(images: ImageSet) -> list[bytes]:
    return [images.raw(index).tobytes() for index in range(len(images))]


def labels_of(images: ImageSet) -> IntArray:
    assert images.labels is not None
    return images.labels


def stored_pixels(folder: Path) -> set[bytes]:
    found = set()
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            found.add(image.convert("RGB").tobytes())
    return found


def refuse(path: object, num_classes: int | None = None, split: tuple[float, float, float] = (0.5, 0.25, 0.25)) -> str:
    with pytest.raises(DataError) as caught:
        open_data(str(path), SPEC, num_classes, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"class2": 8, "class10": 8, "class1": 8})


def test_one_pool_is_split_by_seed_into_disjoint_sets(folder: Path) -> None:
    splits = open_data(str(folder), SPEC, 3, seed=7)
    sets = (splits.calibration, splits.validation, splits.test)
    assert [len(images) for images in sets] == [12, 6, 6]
    assert [np.bincount(labels_of(images)).tolist() for images in sets] == [[4, 4, 4], [2, 2, 2], [2, 2, 2]]
    assert len({pixels for images in sets for pixels in pixels_of(images)}) == 24
    again = open_data(str(folder), SPEC, 3, seed=7)
    assert pixels_of(again.calibration) == pixels_of(splits.calibration)
    assert pixels_of(open_data(str(folder), SPEC, 3, seed=8).calibration) != pixels_of(splits.calibration)
    assert splits.describe() == {
        "source": str(folder),
        "classes": 3,
        "labelled": True,
        "calibration": 12,
        "validation": 6,
        "test": 6,
        "split": "0.5,0.25,0.25 of one pool by seed",
        "seed": 7,
        "unreadable": 0,
        "kind": "photos",
        "preprocessing": to_json(SPEC),
    }
    assert splits.warnings == ()


def test_classes_are_in_natural_order_in_folder_and_tar(folder: Path, tmp_path: Path) -> None:
    packed = open_data(str(tar_of(folder, tmp_path / "images.tar")), SPEC, 3)
    loose = open_data(str(folder), SPEC, 3)
    assert loose.classes == packed.classes == ("class1", "class2", "class10")
    assert pixels_of(loose.test) == pixels_of(packed.test)
    assert labels_of(loose.test).tolist() == labels_of(packed.test).tolist()


def test_preprocessing_is_timms(folder: Path) -> None:
    splits = open_data(str(folder), SPEC, 3, split=(1, 0, 0))
    transform = create_transform(SPEC.shape, mean=SPEC.mean, std=SPEC.std, interpolation="bilinear", crop_pct=0.8)
    expected = {}
    for label, name in enumerate(splits.classes):
        for file in (folder / name).iterdir():
            with Image.open(file) as image:
                expected[transform(image.convert("RGB")).numpy().round(3).tobytes()] = label
    for _ in range(2):  # from the files, then from memory
        images = [
            (image, int(label))
            for batch, labels in splits.calibration.batches(7)
            for image, label in zip(batch, labels, strict=True)
        ]
        assert {image.round(3).tobytes(): label for image, label in images} == expected
        assert images[0][0].dtype == np.float32


def test_batches_are_of_the_size_asked_and_repeatable(folder: Path) -> None:
    images = open_data(str(folder), SPEC, 3).calibration
    first, second = list(images.batches(5)), list(images.batches(5))
    assert [len(labels) for _, labels in first] == [5, 5, 2]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert np.concatenate([labels for _, labels in first]).tolist() == labels_of(images).tolist()


def test_images_are_decoded_once_and_again_only_beyond_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = sources._ReaderSource.decode

    def counted(source: sources._ReaderSource, index: int) -> Image.Image:
        decoded.append(index)
        return decode(source, index)

    monkeypatch.setattr(sources._ReaderSource, "decode", counted)
    monkeypatch.setattr(data, "CACHE_BYTES", 3 * 16 * 16 * 10)  # ten of the twelve images
    images = open_data(str(folder), SPEC, 3).calibration
    first = np.concatenate([batch for batch, _ in images.batches(4)])
    assert len(decoded) == 12
    assert np.array_equal(np.concatenate([batch for batch, _ in images.batches(4)]), first)
    assert len(decoded) == 14


def test_take_is_the_start_and_of_mixed_classes(folder: Path) -> None:
    images = open_data(str(folder), SPEC, 3).calibration
    taken = images.take(6)
    assert len(taken) == 6
    assert pixels_of(taken) == pixels_of(images)[:6]
    assert len(set(labels_of(taken).tolist())) > 1
    assert len(images.take(100)) == 12


def test_raw_is_the_image_as_it_is_stored(folder: Path) -> None:
    raw = open_data(str(folder), SPEC, 3).test.raw(0)
    assert raw.shape == (20, 24, 3)
    assert raw.dtype == np.uint8


def test_grey_models_get_one_channel(folder: Path) -> None:
    grey = InputSpec((1, 16, 16), (0.0,), (1.0,), "bilinear", 1.0)
    images = open_data(str(folder), grey, 3).test
    batch, _ = next(images.batches(2))
    assert batch.shape == (2, 1, 16, 16)
    assert 0.3 < batch.mean() < 0.7
    with pytest.raises(DataError, match="images have 1 or 3 channels; the model takes 4"):
        open_data(str(folder), InputSpec((4, 16, 16), (0.0,) * 4, (1.0,) * 4), 3)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_inside(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "set"
    for part, count in {"train": 5, "val": 3, "test": 2}.items():
        write_images(root / part, {"a": count, "b": count})
    path = tar_of(root, tmp_path / "set.tar") if packed else root
    splits = open_data(str(path), SPEC, 2)
    assert [len(s) for s in (splits.calibration, splits.validation, splits.test)] == [10, 6, 4]
    assert splits.classes == ("a", "b")
    stored = stored_pixels(root / "test")
    assert set(pixels_of(splits.test)) == stored
    assert splits.describe()["split"].startswith("by the parts it has: ")
    assert len(open_data(str(path), SPEC, 2, split=(1, 0, 0)).test) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_parts_beside(tmp_path: Path, packed: bool) -> None:
    for part, count in {"c-train": 6, "c-test": 2}.items():
        write_images(tmp_path / part, {"a": count, "b": count})
        if packed:
            tar_of(tmp_path / part, tmp_path / f"{part}.tar")
    path = tmp_path / ("c-train.tar" if packed else "c-train")
    splits = open_data(str(path), SPEC, 2)
    assert [len(s) for s in (splits.calibration, splits.validation, splits.test)] == [8, 4, 4]
    assert not set(pixels_of(splits.calibration)) & set(pixels_of(splits.validation))
    stored = stored_pixels(tmp_path / "c-test")
    assert set(pixels_of(splits.test)) == stored


def test_parts_that_differ_in_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "c-train", {"a": 1, "b": 1})
    write_images(tmp_path / "c-test", {"a": 1, "z": 1})
    message = refuse(tmp_path / "c-train")
    assert message == f"'{tmp_path / 'c-test'}' and its train part differ in their classes: b, z"


def test_a_tar_of_tars(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 2, "b": 2})
    (tmp_path / "outer").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "outer" / f"{name}.tar", "w") as archive:
            for file in sorted((tmp_path / "images" / name).iterdir()):
                archive.add(file, arcname=file.name)
    nested = open_data(str(tar_of(tmp_path / "outer", tmp_path / "nested.tar")), SPEC, 2, split=(1, 0, 0))
    assert nested.classes == ("a", "b")
    loose = open_data(str(tmp_path / "images"), SPEC, 2, split=(1, 0, 0))
    assert sorted(pixels_of(nested.calibration)) == sorted(pixels_of(loose.calibration))


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "vehicles", {"train": 4, "test": 4})
    assert open_data(str(tmp_path / "vehicles"), SPEC, 2).classes == ("test", "train")


def test_unreadable_images_are_named_counted_and_left_out(folder: Path) -> None:
    (folder / "class1" / "0.png").write_bytes(b"")
    (folder / "class2" / "0.png").write_text("no image")
    splits = open_data(str(folder), SPEC, 3)
    sizes = [len(s) for s in (splits.calibration, splits.validation, splits.test)]
    assert sum(sizes) == 22
    assert splits.warnings == ("2 of 24 images cannot be read and are left out: class1/0.png, class2/0.png",)
    assert splits.describe()["unreadable"] == 2


def write_short_png(path: Path) -> None:
    """Write a PNG with half its pixels and right checksums: only decoding shows the damage."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    content = buffer.getvalue()
    at = content.index(b"IDAT")
    body = content[at + 4 : at + 4 + int.from_bytes(content[at - 4 : at], "big") // 2]
    check = zlib.crc32(b"IDAT" + body)
    end = content[content.index(b"IEND") - 4 :]
    path.write_bytes(content[: at - 4] + struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", check) + end)


def test_damage_found_while_decoding_is_left_out_too(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"a": 6, "b": 6})
    write_short_png(folder / "a" / "damaged.png")
    images = open_data(str(folder), SPEC, 2, split=(1, 0, 0))
    identity = images.identity
    assert len(images.calibration) == 13
    part = images.calibration.take(13)
    counts = [len(labels) for _, labels in images.calibration.batches(4)]
    assert sum(counts) == len(images.calibration) == len(labels_of(images.calibration)) == len(part) == 12
    assert images.warnings == ("1 of 13 images cannot be read and are left out: a/damaged.png",)
    assert sum(len(labels) for _, labels in part.batches(5)) == 12
    assert open_data(str(folder), SPEC, 2, split=(1, 0, 0)).identity == images.identity == identity


def test_a_jpeg_cut_short_is_left_out_at_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"a": 6, "b": 6})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut", "whole", "padded"):
        Image.fromarray(pixels).save(folder / "a" / f"{name}.jpg")
    (folder / "a" / "cut.jpg").write_bytes((folder / "a" / "cut.jpg").read_bytes()[:1500])
    (folder / "a" / "padded.jpg").write_bytes((folder / "a" / "padded.jpg").read_bytes() + bytes(5000))
    images = open_data(str(folder), SPEC, 2, split=(1, 0, 0))
    assert len(images.calibration) == 14
    assert images.warnings == ("1 of 15 images cannot be read and are left out: a/cut.jpg",)


def test_identity_follows_the_files_the_labels_and_the_split(folder: Path) -> None:
    first = open_data(str(folder), SPEC, 3).identity
    assert open_data(str(folder), SPEC, 3).identity == first
    assert open_data(str(folder), SPEC, 3, seed=1).identity != first
    assert open_data(str(folder), SPEC, 3, split=(0.5, 0.5, 0)).identity != first
    image = folder / "class1" / "0.png"
    os.utime(image, ns=(0, 0))
    assert open_data(str(folder), SPEC, 3).identity != first


def test_nothing_readable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text("no image")
    assert refuse(tmp_path) == f"'{tmp_path}' holds no image that can be read"


def test_paths_and_formats_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert refuse(path) == (
        f"data '{path}' does not exist; give a folder or tar of photos or class folders, an .npz of inputs, "
        "FILE.py:CALLABLE, or a data set as timm names them (hfds/NAME, wds/NAME, torch/NAME:ROOT)"
    )
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    assert refuse(tmp_path / "x.tar.gz") == (
        f"'{tmp_path / 'x.tar.gz'}' is no folder, .tar, .npz or .npy; unpack it, or give a folder of photos"
    )
    (tmp_path / "x.tar").write_bytes(b"no tar at all")
    assert refuse(tmp_path / "x.tar").startswith(f"'{tmp_path / 'x.tar'}' is not a tar, or it is cut short: ")
    (tmp_path / "empty").mkdir()
    message = f"'{tmp_path / 'empty'}' holds no images (.png, .jpg, .jpeg)"
    assert refuse(tmp_path / "empty") == message
    empty = tar_of(tmp_path / "empty", tmp_path / "empty.tar")
    assert refuse(empty) == f"'{empty}' holds no images (.png, .jpg, .jpeg)"


def test_classes_that_cannot_be_used(folder: Path) -> None:
    assert refuse(folder, 10) == (
        f"'{folder}' has 3 classes (class1, class2, class10, ...) and the model 10; "
        "give the images the model was trained for, one folder per class"
    )


@pytest.mark.parametrize(
    ("split", "given"), [((0.5, 0.5, 0.5), "0.5,0.5,0.5"), ((-0.1, 0.5, 0.5), "-0.1,0.5,0.5"), ((0, 0, 0), "0,0,0")]
)
def test_fractions_that_cannot_be_used(folder: Path, split: tuple[float, float, float], given: str) -> None:
    message = f"--split {given} must be three fractions from 0 to 1 with a sum above 0 and at most 1"
    assert refuse(folder, split=split) == message


def test_a_split_too_small_to_fill_is_said(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "few", {"a": 1, "b": 1})
    splits = open_data(str(folder), SPEC, 2, split=(0.8, 0.1, 0.1))
    assert splits.warnings == (
        f"the validation split is empty: '{folder}' holds too few images for it",
        f"the test split is empty: '{folder}' holds too few images for it",
    )


def test_a_data_set_by_timms_specification(folder: Path, tmp_path: Path) -> None:
    by_name = open_data(f"torch/image_folder:{folder}", SPEC, 3)
    assert [len(s) for s in (by_name.calibration, by_name.validation, by_name.test)] == [12, 6, 6]
    for part in ("train", "validation"):
        write_images(tmp_path / "parts" / part, {"a": 4, "b": 4})
    parts = open_data(f"torch/image_folder:{tmp_path / 'parts'}", SPEC, 2)
    stored = stored_pixels(tmp_path / "parts" / "validation")
    assert set(pixels_of(parts.test)) == stored
    assert refuse("torch/nothing:x").startswith("data set 'torch/nothing:x' cannot be opened: AssertionError")


class Stream(torch.utils.data.IterableDataset[tuple[Image.Image, int]]):
    """What timm makes of tfds, wds and hfids: images in a row, without an index."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for index in range(8):
            yield Image.new("RGB", (20, 20), (index, 0, 0)), index % 2


def test_a_stream_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "create_dataset", lambda name, root, split: Stream() if split == "train" else 1 / 0)
    splits = open_data("wds/some", SPEC, 2)
    assert splits.classes == ("0", "1")
    assert [len(s) for s in (splits.calibration, splits.validation, splits.test)] == [4, 2, 2]
    reds = {
        int(images.raw(i)[0, 0, 0])
        for images in (splits.calibration, splits.validation, splits.test)
        for i in range(len(images))
    }
    assert reds == set(range(8))


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 99),
)
def test_every_cut_is_exact_disjoint_and_stratified(counts: list[int], cuts: list[float], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    source: Any = type("Source", (), {"labels": labels})
    pool: Any = type("Pool", (), {"source": source})
    fractions = (cuts[0], cuts[1] - cuts[0], 1 - cuts[1])
    parts = data._cut(pool, np.arange(len(labels)), fractions, np.random.default_rng(seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * len(labels)) <= 1
        for label, count in enumerate(counts):
            assert abs(int((labels[part] == label).sum()) - fraction * count) < 2 + 1e-9


def test_noise_is_the_same_for_the_same_seed() -> None:
    first, second = noise_of(SPEC, (), 8, 3), noise_of(SPEC, (), 8, 3)
    assert first.shape == (8, 3, 16, 16)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], noise_of(SPEC, (), 1, 4)[0])


def test_noise_of_several_inputs_has_a_field_for_each() -> None:
    picture = ModelInput("picture", (1, 3, 4, 6), (1, 3, 4, 6), (1, 3, 4, 6))
    words = ModelInput("words", (1, 5), (1, 5), (1, 5), "int64")
    noise = noise_of(SPEC, (picture, words), 2, 0)
    assert noise.dtype.names == ("picture", "words") and noise["picture"].shape == (2, 3, 4, 6)
    assert noise["words"].dtype == np.int64 and set(noise["words"].ravel().tolist()) <= {0, 1}


@pytest.mark.parametrize("packed", [False, True])
def test_photos_in_one_folder_have_no_labels(tmp_path: Path, packed: bool) -> None:
    folder = write_images(tmp_path / "set", {"photos": 12}) / "photos"
    path = tar_of(folder, tmp_path / "photos.tar") if packed else folder
    splits = open_data(str(path), SPEC, 3, seed=7)
    assert not splits.labelled
    assert splits.classes == ()
    sets = (splits.calibration, splits.validation, splits.test)
    assert [len(images) for images in sets] == [6, 3, 3]
    assert all(images.labels is None for images in sets)
    assert [labels.tolist() for _, labels in splits.calibration.batches(4)] == [[-1] * 4, [-1] * 2]
    assert {pixels for images in sets for pixels in pixels_of(images)} == stored_pixels(folder)
    assert splits.warnings == (
        f"'{path}' has no class folders: its images count as unlabelled, so no accuracy is measured",
    )
    assert splits.describe()["labelled"] is False
    assert pixels_of(open_data(str(path), SPEC, 3, seed=8).calibration) != pixels_of(splits.calibration)


def test_one_class_folder_is_no_label(tmp_path: Path) -> None:
    one = write_images(tmp_path / "one", {"airplane": 8})
    assert open_data(str(one), SPEC, 10).warnings == (
        f"'{one}' has one class (airplane): its images count as unlabelled, so no accuracy is measured",
    )


def test_labels_are_not_used_where_the_network_is_no_classifier(folder: Path) -> None:
    splits = open_data(str(folder), SPEC, None)
    assert not splits.labelled
    assert len(splits.calibration) == 12
    assert splits.warnings == (f"the model is no classifier: the 3 class folders of '{folder}' are not used as labels",)


def test_parts_of_photos_without_classes(tmp_path: Path) -> None:
    for part, count in {"train": 5, "val": 3}.items():
        write_images(tmp_path / "set", {part: count})
    splits = open_data(str(tmp_path / "set"), SPEC, None, split=(0.5, 0.5, 0))
    assert [len(images) for images in (splits.calibration, splits.validation)] == [5, 3]
    assert set(pixels_of(splits.validation)) == stored_pixels(tmp_path / "set" / "val")
