"""Labels beside photos: what is read, where it lies in the input, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_edge.errors import DataError
from mm_edge.load.annotations import BoxLabels, MaskLabels, open_labels, require_photos
from mm_edge.load.photos import pixels_of
from mm_edge.load.presets import RESIZES
from mm_edge.records import InputSpec

COCO: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "height": 100, "width": 200},
        {"id": 3, "file_name": "folder/b.jpg", "height": 300, "width": 150},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [20, 10, 100, 50]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [150, 90.5, 60, 20.0]},
        {"id": 4, "image_id": 7, "category_id": 2, "bbox": [50, 50, 0, 10]},
    ],
}


def write(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "coco.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def spec(resize: str = "stretch", height: int = 100, width: int = 200) -> InputSpec:
    return InputSpec((3, height, width), (0.0,) * 3, (1.0,) * 3, resize=resize, pad=114)


def read(tmp_path: Path) -> BoxLabels:
    labels = open_labels(write(tmp_path, COCO))
    assert isinstance(labels, BoxLabels)
    return labels


def test_boxes_as_the_file_has_them(tmp_path: Path) -> None:
    labels = read(tmp_path)
    assert labels.categories == {2: "cat", 5: "dog"} and list(labels.categories) == [2, 5]
    found = labels.find("a.jpg")
    assert found is not None and found.size == (100, 200)
    # The crowd and the box without an area are left out, and the second box ends at the edge of the photo.
    assert found.boxes.tolist() == [[20, 10, 120, 60], [150, 90.5, 200, 100]]
    assert found.categories.tolist() == [5, 2]
    empty = labels.find("folder/b.jpg")
    assert empty is not None and empty.boxes.shape == (0, 4)


def test_photos_are_found_by_their_path_or_the_only_last_part(tmp_path: Path) -> None:
    labels = read(tmp_path)
    assert labels.find("elsewhere/a.jpg") is labels.find("a.jpg") is not None
    assert labels.find("b.jpg") is labels.find("folder/b.jpg") is not None
    assert labels.find("c.jpg") is None
    twice = open_labels(
        write(tmp_path, {**COCO, "images": [*COCO["images"], {**COCO["images"][0], "id": 8, "file_name": "x/a.jpg"}]})
    )
    assert twice.find("a.jpg") is not None and twice.find("y/a.jpg") is None
    assert require_photos(labels, "coco.json", ["a.jpg", "c.jpg"]) == 1
    with pytest.raises(DataError) as caught:
        require_photos(labels, "coco.json", ["n01/c.jpg"])
    assert str(caught.value) == (
        "--labels 'coco.json' has labels for none of the photos: it names 'a.jpg', the photos 'n01/c.jpg'; "
        "give the labels of these photos"
    )


def test_boxes_in_the_input_by_hand(tmp_path: Path) -> None:
    labels = read(tmp_path)
    halved = labels.in_input("a.jpg", spec(height=50, width=100))
    assert halved is not None
    np.testing.assert_allclose(halved[0], np.array([[10, 5, 60, 30], [75, 45.25, 100, 50]]), atol=0.3)
    # A letterbox of 200 x 200 has 50 pixels of border above and below.
    boxed = labels.in_input("a.jpg", spec("letterbox", 200, 200))
    assert boxed is not None and boxed[1].tolist() == [5, 2]
    np.testing.assert_allclose(boxed[0], np.array([[20, 60, 120, 110], [150, 140.5, 200, 150]]), atol=1e-6)
    assert labels.in_input("c.jpg", spec()) is None


def test_a_box_that_the_input_does_not_show_is_left_out(tmp_path: Path) -> None:
    # The centre crop of 200 x 100 to a square keeps the columns 50 to 150.
    found = read(tmp_path).in_input("a.jpg", InputSpec((3, 100, 100), (0.0,), (1.0,), crop_pct=1.0))
    assert found is not None and found[1].tolist() == [5]
    np.testing.assert_allclose(found[0], np.array([[0, 10, 70, 60]]), atol=0.3)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(90, 60), (61, 333), (700, 1100)])
def test_a_box_lies_where_the_photo_shows_it(tmp_path: Path, resize: str, size: tuple[int, int]) -> None:
    height, width = size
    box = [round(width * 0.4), round(height * 0.45), round(width * 0.2), round(height * 0.15)]
    image = {"id": 7, "file_name": "a.jpg", "height": height, "width": width}
    content = {**COCO, "images": [image], "annotations": [{"image_id": 7, "category_id": 5, "bbox": box}]}
    wanted = InputSpec((1, 160, 192), (0.0,), (1.0,), resize=resize, interpolation="nearest")
    found = open_labels(write(tmp_path, content)).in_input("a.jpg", wanted)
    assert isinstance(found, tuple)
    photo = np.zeros(size, np.uint8)
    photo[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
    rows, columns = np.nonzero(pixels_of(wanted)(Image.fromarray(photo))[0])
    shown = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found[0], np.array([shown]), atol=1.01)


def save_masks(tmp_path: Path) -> Path:
    folder = tmp_path / "masks"
    (folder / "sub").mkdir(parents=True)
    mask = np.zeros((4, 8), np.uint8)
    mask[:2, :4], mask[2:, 4:] = 3, 255
    Image.fromarray(mask).save(folder / "a.png")
    palette = Image.fromarray(mask).convert("P")
    palette.putdata(mask.ravel().tolist())
    palette.save(folder / "sub" / "b.png")
    return folder


def test_masks_are_resized_as_their_photo(tmp_path: Path) -> None:
    labels = open_labels(save_masks(tmp_path))
    assert isinstance(labels, MaskLabels) and set(labels.masks) == {"a", "sub/b"}
    found = labels.in_input("a.jpg", spec(height=2, width=4))
    assert found is not None and found.tolist() == [[3, 3, 0, 0], [0, 0, -1, -1]]
    by_palette = labels.in_input("sub/b.jpeg", spec(height=2, width=4))
    assert by_palette is not None and np.array_equal(found, by_palette)
    boxed = labels.in_input("x/b.jpg", spec("letterbox", 8, 8))
    assert boxed is not None and (boxed[:2] == -1).all() and (boxed[6:] == -1).all()
    assert boxed[2:4].tolist() == [[3, 3, 3, 3, 0, 0, 0, 0]] * 2
    assert labels.in_input("c.jpg", spec()) is None


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        labels = open_labels(path)
        labels.in_input("a.jpg", spec())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "PATH")


def change(place: str, index: int, **values: object) -> dict[str, Any]:
    entries = [dict(entry) for entry in COCO[place]]
    entries[index].update(values)
    return {**COCO, place: entries}


BAD: dict[str, tuple[object, str]] = {
    "a list": ([], "it has no list 'categories'"),
    "no images": ({**COCO, "images": None}, "it has no list 'images'"),
    "no object": ({**COCO, "annotations": [3]}, "annotations[0] is no object"),
    "an id that is no number": (change("images", 0, id="7"), "images[0] has no whole number 'id'"),
    "one id twice": (change("images", 1, id=7), "images[1] has the id 7 of another image"),
    "no name": (change("images", 0, file_name=None), "images[0] has no file_name"),
    "a side of 0": (change("images", 1, width=0), "images[1] has the width 0; it must be from 1 to 65536 pixels"),
    "a foreign image": (
        change("annotations", 0, image_id=1),
        "annotations[0] belongs to image 1, which is not among its images",
    ),
    "a foreign category": (
        change("annotations", 2, category_id=1),
        "annotations[2] has the category 1, which is not among its categories",
    ),
    "three numbers": (
        change("annotations", 0, bbox=[1, 2, 3]),
        "annotations[0] has the bbox [1, 2, 3]; it must be [x, y, width, height], finite and not negative",
    ),
    "NaN": (
        change("annotations", 0, bbox=[1, 2, float("nan"), 4]),
        "annotations[0] has the bbox [1, 2, NaN, 4]; it must be [x, y, width, height], finite and not negative",
    ),
    "a huge number": (
        change("annotations", 0, bbox=[1, 2, 10**19, 4]),
        "annotations[0] has the bbox [1, 2, 10000000000000000000, 4]; it must be [x, y, width, height], finite and not "
        "negative",
    ),
    "a negative width": (
        change("annotations", 0, bbox=[1, 2, -3, 4]),
        "annotations[0] has the bbox [1, 2, -3, 4]; it must be [x, y, width, height], finite and not negative",
    ),
    "outside": (
        change("annotations", 0, bbox=[200, 2, 3, 4]),
        "annotations[0] has a bbox outside of its photo, which is 200 x 100",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_of_boxes_is_one_line(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    assert refusal(write(tmp_path, content)) == f"--labels 'PATH' is not of COCO's format: {reason}"


def test_what_is_no_label_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "give a .json file of COCO's format or a folder of masks"
    assert refusal(tmp_path / "none") == f"--labels 'PATH' does not exist; {advice}"
    assert refusal(tmp_path) == "--labels 'PATH' holds no .png masks; give the folder with one mask for each photo"
    assert refusal(write(tmp_path, "{")).startswith("--labels 'PATH' is not JSON: JSONDecodeError: ")
    nested = "--labels 'PATH' is not JSON: ValueError: JSON that is nested too deep"
    assert refusal(write(tmp_path, "[" * 100_000)).startswith(nested)
    monkeypatch.setattr("mm_edge.load.annotations.MOST_BYTES", 10)
    reason = "is larger than 0 MiB; leave out photos not in --data"
    assert refusal(write(tmp_path, COCO)) == f"--labels 'PATH' {reason}"


def test_a_bad_mask_is_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert refusal(tmp_path) == (
        "mask 'PATH/a.png' has the mode RGB; a mask has one class index from 0 to 254 for each pixel, "
        "in 8 bits or by a palette, and 255 where there is no class"
    )
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert refusal(tmp_path).startswith("mask 'PATH/a.png' cannot be read: UnidentifiedImageError: ")
