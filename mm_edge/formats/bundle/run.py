#!/usr/bin/env python3
"""Answers one photo with the model of this folder.

    python run.py PHOTO [--model FILE] [--top N] [--boxes PICTURE] [--least SCORE]

It needs Python 3.8 or newer, numpy, onnxruntime and Pillow, and the files beside it: manifest.json, preprocess.json
and, where the classes have names, labels.txt.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
OVERLAP = 0.45  # of two boxes of a class, above which the less likely one is left out
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


def main():
    """Read the arguments, run the model and print its answer."""
    parser = argparse.ArgumentParser(description="Answers one photo with the model of this folder.")
    parser.add_argument("photo", help="a photo that Pillow can read")
    parser.add_argument("--model", help="the model file; without it the one that manifest.json names")
    parser.add_argument("--top", type=int, default=5, help="how many classes are printed (default 5)")
    parser.add_argument("--boxes", help="for a detector: write the photo with its boxes to this file")
    parser.add_argument("--least", type=float, default=0.25, help="for a detector: least score (default 0.25)")
    given = parser.parse_args()
    manifest, spec = read_json("manifest.json"), read_json("preprocess.json")
    labels = read_labels()
    try:
        photo = Image.open(given.photo)
        photo.load()
    except OSError as error:
        sys.exit("cannot read the photo '%s': %s" % (given.photo, error))
    model = Path(given.model) if given.model else HERE / manifest["model"]["file"]
    session = open_model(model)
    if spec["assumed"]:
        print("note: nobody stated %s of the input; it was assumed" % ", ".join(spec["assumed"]), file=sys.stderr)
    pixels, placed = prepare(photo, spec)
    names = [item.name for item in session.get_outputs()]
    feed = session.get_inputs()[0]
    outputs = dict(zip(names, session.run(None, {feed.name: pixels.astype(element_type(feed.type))})))
    found = find_boxes(outputs, spec["shape"][1:], manifest["head"], len(labels))
    if found is not None:
        answer_boxes(photo, found, placed, labels, given)
    else:
        answer_classes(outputs, labels, given.top)


def read_json(name):
    """Return the JSON of a file beside this one."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def read_labels():
    """Return the names of the classes; none where there is no labels.txt."""
    path = HERE / "labels.txt"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def open_model(path):
    """Return a session of ONNX Runtime on the CPU."""
    if not path.is_file():
        sys.exit("there is no model '%s'" % path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def element_type(name):
    """Return the NumPy type of an input that ONNX Runtime describes as tensor(float) and so on."""
    return {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}.get(
        name, np.float32
    )


# ---- from a photo to the input


def prepare(photo, spec):
    """Return the input (1, C, H, W) or (1, H, W, C), and how the photo was placed in it.

    The place is (scale in x, scale in y, left, top): pixel x of the photo is at x * scale + left of the input.
    """
    channels, height, width = spec["shape"]
    photo = photo.convert("L" if channels == 1 else "RGB")
    resampling = getattr(getattr(Image, "Resampling", Image), spec["interpolation"].upper())
    if spec["resize"] == "crop":
        fitted, placed = crop(photo, height, width, spec["crop_pct"], resampling)
    else:
        fitted, placed = paste(photo, height, width, spec, resampling)
    pixels = np.asarray(fitted, dtype=np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if spec["colours"] == "BGR" and channels == 3:
        pixels = pixels[:, :, ::-1]
    pixels = pixels / np.float32(1 / spec["scale"])
    pixels = (pixels - np.float32(spec["mean"])) / np.float32(spec["std"])
    batch = pixels[None] if spec["layout"] == "NHWC" else pixels.transpose(2, 0, 1)[None]
    return np.ascontiguousarray(batch, dtype=np.float32), placed


def crop(photo, height, width, share, resampling):
    """Fit the photo so that the input is `share` of it, and keep the centre."""
    tall, wide = math.floor(height / share), math.floor(width / share)
    w, h = photo.size
    if tall == wide:
        size = (tall, int(tall * h / w)) if w <= h else (int(tall * w / h), tall)
    else:
        ratio = min(h / tall, w / wide)
        size = (round(w / ratio), round(h / ratio))
    photo = photo if photo.size == size else photo.resize(size, resampling)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return photo.crop((left, top, left + width, top + height)), (size[0] / w, size[1] / h, -left, -top)


def paste(photo, height, width, spec, resampling):
    """Fit the photo as `resize` says and paste it into a border."""
    (w, h), left, top, kind = photo.size, 0, 0, spec["resize"]
    ratio = min(height / h, width / w)
    if kind == "stretch":
        size = (width, height)
    elif kind == "letterbox":
        size = (max(1, round(w * ratio)), max(1, round(h * ratio)))
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
    elif kind == "letterbox-corner":
        size = (max(1, int(w * ratio)), max(1, int(h * ratio)))
    elif kind == "fit-height":
        size = (min(width, math.ceil(height * w / h)), height)
    else:
        sys.exit("preprocess.json has the resizing '%s', which this script does not know" % kind)
    resized = photo if photo.size == size else photo.resize(size, resampling)
    canvas = Image.new(photo.mode, (width, height), (spec["pad"],) * len(photo.getbands()))
    canvas.paste(resized, (left, top))
    return canvas, (size[0] / w, size[1] / h, left, top)


# ---- classes


def answer_classes(outputs, labels, top):
    """Print the likeliest classes, or the shapes of outputs that are no classes."""
    name, scores = next(iter(outputs.items()))
    if scores.ndim != 2 or (labels and scores.shape[1] != len(labels)):
        for name, values in outputs.items():
            print("%s: %s %s" % (name, "x".join(map(str, values.shape)), values.dtype))
        print("these outputs are no classes and no boxes that this script reads", file=sys.stderr)
        return
    shares = as_shares(scores[0].astype(np.float64))
    for index in np.argsort(-shares, kind="stable")[:top]:
        print("%6.2f %%  %s" % (100 * shares[index], name_of(index, labels)))


def as_shares(scores):
    """Return scores that sum to 1: as they are, or by softmax."""
    if scores.min() >= 0 and abs(scores.sum() - 1) < 1e-3:
        return scores
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def name_of(index, labels):
    """Return the name of a class, or its number."""
    return labels[index] if 0 <= index < len(labels) else "class %d" % index


# ---- boxes


def find_boxes(outputs, size, head, count):
    """Return boxes (N, 4), scores and classes; None for no detector, or one of a layout that this script does not read.

    Boxes are left, top, right and bottom in pixels of the input. `head` is the layout that manifest.json names, `count`
    the number of classes, or 0 where nobody named them: what comes after the classes (masks, key points) is left out.
    """
    if head is None:
        return None
    arrays = [np.asarray(outputs[name], dtype=np.float64) for name in head["outputs"]]
    layout, rows = head["layout"], arrays[0][0]
    last = count or None
    if layout == "yolo":
        return suppressed(in_pixels(corners(rows.T[:, :4]), size), rows.T[:, 4:][:, :last])
    if layout == "yolo-anchors":
        return suppressed(in_pixels(corners(rows[:, :4]), size), rows[:, 5:][:, :last] * rows[:, 4:5])
    if layout == "rows":
        return in_pixels(rows[:, :4], size), rows[:, 4], rows[:, 5].astype(int)
    if layout == "post-processed":
        boxes, scores, classes = (value[0] if len(value) == 1 else value for value in arrays[:3])
        return in_pixels(boxes, size), scores, classes.astype(int)
    return None


def corners(boxes):
    """Return boxes given as centre and size by their corners."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def in_pixels(boxes, size):
    """Return boxes in pixels; those given as shares of the input are scaled."""
    if boxes.size and np.abs(boxes).max() <= 2:
        boxes = boxes * np.array([size[1], size[0], size[1], size[0]])
    return boxes


def suppressed(boxes, scores):
    """Return the boxes that are the likeliest of those that overlap, with their scores and classes."""
    classes, best = scores.argmax(axis=1), scores.max(axis=1)
    order = [index for index in np.argsort(-best, kind="stable")[:1000] if best[index] > 0.01]
    kept = []
    for index in order:
        same = [other for other in kept if classes[other] == classes[index]]
        if all(overlap(boxes[index], boxes[other]) <= OVERLAP for other in same):
            kept.append(index)
    return boxes[kept], best[kept], classes[kept]


def overlap(a, b):
    """Return the intersection over union of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared
    return shared / union if union > 0 else 0.0


def answer_boxes(photo, found, placed, labels, given):
    """Print the boxes in pixels of the photo, and draw them where asked for."""
    boxes, scores, classes = found
    scale = np.array([placed[0], placed[1]] * 2)
    shift = np.array([placed[2], placed[3]] * 2)
    boxes = np.clip((boxes - shift) / scale, 0, np.array([photo.width, photo.height] * 2))
    shown = [index for index in np.argsort(-scores, kind="stable") if scores[index] >= given.least]
    for index in shown:
        left, top, right, bottom = (round(float(value)) for value in boxes[index])
        name = name_of(int(classes[index]), labels)
        print("%6.2f %%  %s  from %d,%d to %d,%d" % (100 * scores[index], name, left, top, right, bottom))
    if not shown:
        print("nothing found with a score of at least %g" % given.least)
    if given.boxes:
        picture = photo.convert("RGB")
        pen = ImageDraw.Draw(picture)
        for index in shown:
            colour = COLOURS[int(classes[index]) % len(COLOURS)]
            box = [float(value) for value in boxes[index]]
            pen.rectangle(box, outline=colour, width=max(2, picture.width // 300))
            pen.text((box[0] + 3, box[1] + 3), name_of(int(classes[index]), labels), fill=colour)
        picture.save(given.boxes)


if __name__ == "__main__":
    main()
