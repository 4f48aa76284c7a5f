"""Labels against answers: how classes are numbered, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detector_outputs import IMAGES, SIZE, Box, yolo
from PIL import Image

from mm_edge.errors import UsageError
from mm_edge.load.annotations import open_labels
from mm_edge.quality.answers import AnswerReader, Answers, find_reader
from mm_edge.records import InputSpec, MetricValue
from mm_edge.run.labels import expect, score

SPEC = InputSpec((3, *SIZE), (0.0,) * 3, (1.0,) * 3, resize="stretch")
PHOTOS = [f"{index}.jpg" for index in range(len(IMAGES))]


def coco(tmp_path: Path, numbers: list[int], images: list[list[Box]] = IMAGES) -> Path:
    """The boxes in photos of twice the size of the input; `numbers` are those of the categories."""
    content = {
        "images": [
            {"id": index, "file_name": name, "height": 2 * SIZE[0], "width": 2 * SIZE[1]}
            for index, name in enumerate(PHOTOS)
        ],
        "categories": [{"id": number, "name": str(number)} for number in numbers],
        "annotations": [
            {
                "image_id": index,
                "category_id": numbers[box[5]],
                "bbox": [2 * box[0], 2 * box[1], 2 * (box[2] - box[0]), 2 * (box[3] - box[1])],
            }
            for index, image in enumerate(images)
            for box in image
        ],
    }
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(content))
    return file


def detector() -> tuple[AnswerReader, Answers]:
    reader = find_reader(yolo(), SIZE)
    assert reader is not None
    return reader, reader.read(yolo())


@pytest.mark.parametrize("numbers", [[3, 17, 90], [0, 1, 2], [1, 2, 3]])
def test_boxes_of_photos_against_a_detector(tmp_path: Path, numbers: list[int]) -> None:
    reader, dense = detector()
    labels = open_labels(coco(tmp_path, numbers))
    found = score(dense, expect(labels, reader, PHOTOS, SPEC, dense), reader)
    assert found is not None and found.name == "mAP" and found.is_fraction and found.higher_is_better
    assert found.others["mAP50"] == pytest.approx(1) and found.value > 0.85


def test_a_network_that_numbers_classes_as_the_file_does(tmp_path: Path) -> None:
    # The file has the categories 1, 2 and 9, and objects of 1 and 2 alone: by rank they would be 0 and 1.
    images = [[(*box[:5], box[5] - 1) for box in image if box[5]] for image in IMAGES]
    reader, dense = detector()
    labels = open_labels(coco(tmp_path, [1, 2, 9], images))
    found = score(dense, expect(labels, reader, PHOTOS, SPEC, dense), reader)
    assert found is not None and found.others["mAP50"] == pytest.approx(1)


def test_a_photo_without_labels_is_left_out(tmp_path: Path) -> None:
    reader, dense = detector()
    labels = open_labels(coco(tmp_path, [0, 1, 2]))
    expected = expect(labels, reader, [*PHOTOS[:2], "other.jpg"], SPEC, dense)
    assert expected.boxes is not None and expected.boxes[2] is None
    found = score(dense, expected, reader)
    assert found is not None and found.others["mAP50"] == pytest.approx(1)


def test_masks_of_photos_against_a_segmenter(tmp_path: Path) -> None:
    classes = np.zeros((2, 8, 12), np.int64)
    classes[:, 2:5, 3:9] = 1
    for index, mask in enumerate(classes):
        Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / f"{index}.png")
    outputs = {"mask": np.where(classes, 0.99, 0.01).astype(np.float32)[:, None]}
    reader = find_reader(outputs, (32, 48))
    assert reader is not None
    dense = reader.read(outputs)
    spec = InputSpec((3, 32, 48), (0.0,) * 3, (1.0,) * 3, resize="stretch")
    expected = expect(open_labels(tmp_path), reader, PHOTOS[:2], spec, dense)
    assert score(dense, expected, reader) == MetricValue("mIoU", 1, is_fraction=True)


def test_labels_of_another_task_are_refused(tmp_path: Path) -> None:
    boxes = open_labels(coco(tmp_path, [0, 1, 2]))
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    masks = open_labels(tmp_path)
    reader, dense = detector()
    with pytest.raises(UsageError) as caught:
        expect(boxes, None, PHOTOS, SPEC, Answers())
    assert str(caught.value) == (
        "--labels are boxes, and no layout of a detector is recognised; give --metric FILE.py:CALLABLE"
    )
    with pytest.raises(UsageError) as caught:
        expect(masks, reader, PHOTOS, SPEC, dense)
    assert str(caught.value) == (
        "--labels are masks, and no output is known to hold classes of pixels; give --metric FILE.py:CALLABLE"
    )
