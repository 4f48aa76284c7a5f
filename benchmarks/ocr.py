"""What pruning costs a text reader: characters that RapidOCR reads with one stage pruned, without labels or training.

    python -m venv ENV; ENV/bin/pip install mm-edge rapidocr onnxsim==0.8.1        (an environment of its own)
    python benchmarks/ocr.py det --work WORK
    python benchmarks/ocr.py rec --work WORK
    python benchmarks/ocr.py all --exact --work WORK

The last makes the ten strategies of all three files as they are shipped, without recovery, and records how exact each
is: the artifact against the masked network on calibration photos, and whether it was exact at a second input shape too
(one that is not is no candidate of the report).

Pages are rendered with Debian's fonts (DejaVu, Liberation) from the words below. The calibration pages have other
words and another seed than the test pages. `mm-edge prune-export` is given the calibration pages (det), or the lines
that RapidOCR cuts from them (rec), as photos without labels. For every budget the row is the candidate that the report
names as the winner. RapidOCR then reads the test pages with this file in place of the stage's own.

    character_accuracy    1 - sum of edit distances / sum of lengths, over the lines of the test pages. Spaces do not
                          count. A line that was not found counts as empty, and no line costs more than its length.
    macs_fraction         multiply-adds against dense, at the input of calibration

onnxsim's structured pruning is tried on the simplified file (onnxsim_peer.py). Its sparsity is found by bisection, so
that it has at least our candidate's MACs. The result goes under the stage into benchmarks/results/ocr.json, or
--results. It is written after every row, so that a run that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
import rapidocr
from onnxsim_peer import try_onnxsim
from PIL import Image, ImageDraw, ImageFont
from rapidocr.utils.process_img import get_rotate_crop_image

from mm_edge.records import Report, from_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ocr.json"
FONTS = [
    Path("/usr/share/fonts/truetype") / name
    for name in (
        "dejavu/DejaVuSans.ttf",
        "dejavu/DejaVuSerif.ttf",
        "dejavu/DejaVuSans-Bold.ttf",
        "liberation/LiberationSans-Regular.ttf",
        "liberation/LiberationSerif-Regular.ttf",
        "liberation/LiberationMono-Regular.ttf",
    )
]
MODELS = Path(rapidocr.__file__).parent / "models"
FILES = {
    "det": "PP-OCRv6_det_small.onnx",
    "rec": "PP-OCRv6_rec_small.onnx",
    "cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
}
PRESETS = {"det": "rapidocr-det", "rec": "paddle-rec", "cls": "paddle-cls"}
INPUTS = {"det": (1, 3, 320, 320), "rec": (1, 3, 48, 320), "cls": (1, 3, 48, 192)}
PAGE = 736  # the side at which RapidOCR feeds its detector without resizing
FRACTIONS = (0.9, 0.8, 0.7, 0.6)
# Every second word is for calibration, the others for the test.
WORDS = """harbour ladder copper window thunder garden marble pocket quarter velvet kitchen jungle orange bridge
lantern mirror hollow yellow zipper wizard border candle dragon engine flavour glacier hammer island jacket kettle
lemon magnet needle oyster pepper quilt ribbon saddle timber umbrella valley whistle anchor basket castle desert ember
forest goblet helmet insect jewel kernel lizard meadow nutmeg olive pebble quiver rocket silver tunnel urchin violet
walnut yogurt zebra acorn bucket cactus dolphin elbow feather guitar hazel igloo juniper koala locket mustard napkin
otter parcel quartz raven shovel ticket uncle vessel wagon yarn bamboo cradle diamond fabric gravel horizon ivory
journey kingdom library mountain notebook opera planet question railway station theatre volume weather""".split()


@dataclass(frozen=True)
class Line:
    """A rendered line and its box: left, top, right, bottom, in pixels."""

    text: str
    box: tuple[int, int, int, int]


def make_page(words: list[str], side: int, rng: np.random.Generator) -> tuple[Image.Image, list[Line]]:
    """Render lines of 14 to 40 px with slight colours and noise on a square page."""
    page = Image.new("RGB", (side, side), tuple(int(value) for value in rng.integers(225, 256, 3)))
    draw = ImageDraw.Draw(page)
    lines, top = [], int(rng.integers(8, 24))
    while True:
        size = int(rng.integers(14, 41))
        if top + 1.4 * size > side - 8:
            break
        font = ImageFont.truetype(str(FONTS[rng.integers(len(FONTS))]), size)
        left = int(rng.integers(8, 40))
        text, wanted = make_word(words, rng), int(rng.integers(1, 8))
        for _ in range(wanted):
            longer = f"{text} {make_word(words, rng)}"
            if left + draw.textlength(longer, font) > side - 8:
                break
            text = longer
        if left + draw.textlength(text, font) <= side - 8:
            draw.text((left, top), text, font=font, fill=tuple(int(value) for value in rng.integers(0, 90, 3)))
            box = tuple(int(value) for value in draw.textbbox((left, top), text, font=font))
            lines.append(Line(text, box))
        top += int(1.4 * size + rng.integers(4, 16))
    pixels = np.asarray(page, dtype=np.float32) + rng.normal(0, rng.uniform(1, 7), (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), lines


def make_word(words: list[str], rng: np.random.Generator) -> str:
    if rng.random() < 0.15:
        return str(rng.integers(10, 100_000))
    word = words[rng.integers(len(words))]
    return (word, word.capitalize(), word.upper())[rng.choice(3, p=(0.6, 0.3, 0.1))]


def engine(**models: Path) -> Any:
    """Return RapidOCR with other files in place of its stages' own."""
    params = {f"{stage.capitalize()}.model_path": str(path) for stage, path in models.items()}
    return rapidocr.RapidOCR(params={"Global.log_level": "error", **params})


def cut_lines(reader: Any, page: Image.Image, widest: float) -> list[Image.Image]:
    """Return the lines that RapidOCR's detector finds, no wider than `widest` times their height."""
    pixels = np.ascontiguousarray(np.asarray(page)[..., ::-1])
    found = reader(pixels, use_det=True, use_cls=False, use_rec=False)
    crops = [
        get_rotate_crop_image(pixels, box.astype(np.float32)) for box in (() if found.boxes is None else found.boxes)
    ]
    return [
        Image.fromarray(np.ascontiguousarray(crop[..., ::-1]))
        for crop in crops
        if crop.shape[1] <= widest * crop.shape[0]
    ]


def write_photos(args: argparse.Namespace) -> Path:
    """Write the calibration photos of a stage into a flat folder, and return it."""
    folder: Path = args.work / f"seen-{args.stage}-{args.seen}"
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(args.seed + 1)
    photos: list[Image.Image] = []
    reader = None if args.stage == "det" else engine()
    while len(photos) < args.seen:
        if reader is None:
            photos.append(make_page(WORDS[::2], args.input[2], rng)[0])
        else:
            widest = args.input[3] / args.input[2] if args.stage == "rec" else math.inf
            photos += cut_lines(reader, make_page(WORDS[::2], PAGE, rng)[0], widest)
    folder.mkdir(parents=True)
    for index, photo in enumerate(photos[: args.seen]):
        photo.save(folder / f"{index:04}.png")
    return folder


def read_page(reader: Any, page: Image.Image, lines: list[Line]) -> tuple[int, int]:
    """Return the edit distance between what is read and what is there, and the number of characters there."""
    found = reader(np.ascontiguousarray(np.asarray(page)[..., ::-1]))
    texts: list[list[tuple[float, str]]] = [[] for _ in lines]
    boxes = () if getattr(found, "boxes", None) is None or found.txts is None else found.boxes
    for box, text in zip(boxes, found.txts if len(boxes) else (), strict=True):
        x, y = np.mean(box, axis=0)
        for index, line in enumerate(lines):
            if line.box[0] <= x <= line.box[2] and line.box[1] <= y <= line.box[3]:
                texts[index].append((float(x), text))
                break
    wrong = length = 0
    for line, pieces in zip(lines, texts, strict=True):
        there = line.text.replace(" ", "")
        read = "".join(text for _, text in sorted(pieces)).replace(" ", "")
        wrong += min(len(there), edit_distance(read, there))
        length += len(there)
    return wrong, length


def edit_distance(first: str, second: str) -> int:
    """Return the fewest insertions, deletions and substitutions from one text to the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for index, left in enumerate(first, 1):
        before, row[0] = row[0], index
        for column, right in enumerate(second, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (left != right))
    return row[-1]


def read_pages(args: argparse.Namespace, model: Path | None) -> dict[str, Any]:
    """Return the character accuracy on the test pages with one stage's file replaced."""
    reader = engine() if model is None else engine(**{args.stage: model})
    rng = np.random.default_rng(args.seed)
    wrong = length = 0
    for _ in range(args.pages):
        more = read_page(reader, *make_page(WORDS[1::2], PAGE, rng))
        wrong, length = wrong + more[0], length + more[1]
    return {"character_accuracy": round(1 - wrong / length, 4), "characters": length}


def prune(args: argparse.Namespace, source: Path, photos: Path, out: Path) -> float:
    """Run prune-export as a user would; return how many seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "mm_edge.cli", "prune-export", str(source), "--data", str(photos)]
    command += ["--out", str(out), "--input", "x=" + ",".join(map(str, args.input))]
    command += ["--preprocess", PRESETS[args.stage], "--macs", ",".join(map(str, args.macs))]
    command += ["--strategies", args.strategies, "--signals", "magnitude", "--input-sizes", "none", "--no-bench"]
    subprocess.run([*command, "--split", args.split, "--recover", "closed-form", "--effort", args.effort], check=True)
    return time.monotonic() - started


def save(args: argparse.Namespace, entry: dict[str, Any]) -> None:
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    results[args.stage] = entry
    args.results.write_text(json.dumps(results, indent=1) + "\n")


def measure(args: argparse.Namespace) -> None:
    source = MODELS / FILES[args.stage]
    entry: dict[str, Any] = {
        "model": source.name,
        "rapidocr": rapidocr.__version__ if hasattr(rapidocr, "__version__") else None,
        "mm_edge": mm_edge.__version__,
        "walked": args.effort != "quick",
        "input": list(args.input),
        "photos_seen": args.seen,
        "pages": args.pages,
        "seed": args.seed,
        "dense": read_pages(args, None),
        "rows": {},
    }
    print("dense", entry["dense"], file=sys.stderr)
    out = args.work / f"run-{args.stage}-{args.seen}-{'-'.join(map(str, args.macs))}"
    entry["seconds"] = round(prune(args, source, write_photos(args), out), 1)
    report = from_json(Report, json.loads((out / "report.json").read_text()))
    by_id = {candidate.id: candidate for candidate in report.candidates}
    for budget in report.budgets:
        row: dict[str, Any] = {"id": budget.winner, "reason": budget.reason}
        entry["rows"][budget.asked] = row
        winner = by_id.get(budget.winner or "")
        if winner is not None and winner.artifact is not None:
            fraction = winner.macs / report.dense.macs
            row |= {"macs_fraction": round(fraction, 4), "recovered_by": winner.recovered_by}
            row |= read_pages(args, out / winner.artifact)
            save(args, entry)
            if args.onnxsim:
                file = out / f"onnxsim-{fraction:.3f}.onnx"
                judge = partial(read_pages, args)
                row["onnxsim"] = try_onnxsim(source, "x", args.input, fraction, file, judge)
        save(args, entry)
        print(budget.asked, row, file=sys.stderr)


def check_exactness(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Make the ten strategies of a stage's file; return how exact each candidate is on calibration photos."""
    args.stage, args.input = stage, INPUTS[stage]
    out = args.work / f"exact-{stage}"
    command = [sys.executable, "-m", "mm_edge.cli", "prune-export", str(MODELS / FILES[stage])]
    command += ["--data", str(write_photos(args)), "--preprocess", PRESETS[stage], "--split", args.split]
    command += ["--input", "x=" + ",".join(map(str, args.input)), "--signals", "magnitude", "--strategies", "all"]
    command += ["--recover", "none", "--input-sizes", "none", "--no-bench", "--out", str(out)]
    subprocess.run(command, check=True)
    report = from_json(Report, json.loads((out / "report.json").read_text()))
    rows = {}
    for candidate in report.candidates:
        if candidate.signal == "magnitude" and candidate.parity is not None:
            for name in (candidate.id, *candidate.also_ids):
                rows[name] = {
                    "macs_fraction": round(candidate.macs / report.dense.macs, 4),
                    "max_rel_err": candidate.parity.max_rel_err,
                    "inputs": f"{candidate.parity.inputs.count} {candidate.parity.inputs.kind}",
                }
    dropped = [text for text in report.warnings if "differs from its masked model" in text]
    return {"model": FILES[stage], "exact": len(rows), "rows": rows, "dropped": dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("det", "rec", "all"))
    parser.add_argument("--exact", action="store_true", help="only how exact the ten strategies of every file are")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--input", type=lambda text: tuple(map(int, text.split(","))), default=None)
    parser.add_argument("--seen", type=int, default=100, help="photos that prune-export is given")
    parser.add_argument("--split", default="0.8,0.1,0.1", help="as of prune-export")
    parser.add_argument("--pages", type=int, default=20, help="test pages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="min_conservative", help="made as well; only budgets count")
    parser.add_argument("--macs", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--onnxsim", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--effort", default="normal", help="of prune-export: quick leaves candidates screened")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.exact != (args.stage == "all"):
        parser.error("--exact goes with the stage all, and all with --exact")
    if args.exact:
        found = {stage: check_exactness(args, stage) for stage in FILES}
        args.stage = "exact"
        save(args, found)
        return
    args.input = args.input or INPUTS[args.stage]
    measure(args)


if __name__ == "__main__":
    main()
