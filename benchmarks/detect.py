"""What pruning costs a detector, without labels: mAP of its boxes against the dense network's own, on unseen photos.

The photos are cut in two by a seed: `mm-edge prune-export` is given the first part alone (it calibrates and decides on
them), and the figures are from the rest, which no choice has seen. For every budget of MACs the row is the candidate
that the report names as the winner of that budget.

    boxes      how many boxes the dense network detects on the unseen photos with a score of at least 0.25
    map50      mean average precision of the candidate's boxes against these at an IoU of 0.5; map: 0.5 to 0.95
    speedup    as the report measured it on this machine, null with --no-bench
    speedup_times_macs_fraction    1 where time falls as MACs do

    python benchmarks/detect.py nudenet.onnx --photos imagenet-sample-1k.tar --work WORK -- --preprocess yolo
    python benchmarks/detect.py nudenet.onnx --photos imagenet-sample-1k.tar --work WORK --recover tune -- ...

    python benchmarks/detect.py nudenet.onnx --photos imagenet-sample-1k.tar --work WORK --onnxsim 0.95 0.9

The last compares onnxsim's pruning with the dense file of a run that is in WORK already; onnxsim 0.8.1 must be there.
What follows `--` goes to prune-export: how photos become inputs, the input's size. The result goes under the model's
name and the recovery into benchmarks/results/detect.json, or --results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
from onnxsim_peer import try_onnxsim
from PIL import Image

from mm_edge.load.photos import normalise, pixels_of
from mm_edge.quality.answers import AnswerReader, Answers, compare_answers, find_reader
from mm_edge.quality.detections import above
from mm_edge.records import Candidate, InputSpec, Report, from_json
from mm_edge.run.metric import Runner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "detect.json"
FRACTIONS = (0.9, 0.8, 0.7, 0.6)
ENDINGS = {".jpg", ".jpeg", ".png"}
IMAGES = 16


def cut_photos(source: Path, work: Path, count: int, seed: int) -> tuple[Path, list[Path]]:
    """Write photos into two flat folders; return the first, of `count` photos, and the files of the second."""
    seen, unseen = work / "seen", work / "unseen"
    if not unseen.is_dir():
        photos = sorted(read_photos(source))
        order = np.random.default_rng(seed).permutation(len(photos))
        for folder, indices in ((seen, order[:count]), (unseen, order[count:])):
            folder.mkdir(parents=True)
            for index in indices:
                name, content = photos[index]
                (folder / name).write_bytes(content)
    return seen, sorted(unseen.iterdir())


def read_photos(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the photos of a tar or folder with a flat name."""
    if source.is_dir():
        for file in source.rglob("*"):
            if file.suffix.lower() in ENDINGS:
                yield str(file.relative_to(source)).replace("/", "-"), file.read_bytes()
        return
    with tarfile.open(source) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and Path(member.name).suffix.lower() in ENDINGS:
                yield member.name.strip("./").replace("/", "-"), content.read()


def prune(args: argparse.Namespace, seen: Path, out: Path) -> tuple[Report, float]:
    """Run prune-export as a user would; return its report and how many seconds it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "mm_edge.cli", "prune-export", str(args.model), "--data", str(seen)]
    command += ["--out", str(out), "--macs", ",".join(map(str, args.macs))]
    command += ["--recover", args.recover, "--effort", args.effort]
    command += ["--signals", "magnitude", "--strategies", args.strategies, *args.rest]
    subprocess.run(command if args.bench else [*command, "--no-bench"], check=True)
    return from_json(Report, json.loads((out / "report.json").read_text())), time.monotonic() - started


def answer(model: Path, photos: list[Path], spec: InputSpec) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of an artifact for some photos after the others."""
    run = Runner(model)
    (name,) = run.inputs
    fit = pixels_of(spec)
    # An artifact for a batch of one is given one photo at a time.
    step = run.inputs[name][0] if isinstance(run.inputs[name][0], int) else IMAGES
    for start in range(0, len(photos), step):
        pixels = np.stack([fit(Image.open(photo)) for photo in photos[start : start + step]])
        yield run({name: normalise(pixels, spec)})


def detect_all(reader: AnswerReader, model: Path, photos: list[Path], spec: InputSpec) -> Answers:
    """Return the boxes of an artifact on all photos."""
    boxes = []
    for outputs in answer(model, photos, spec):
        boxes += reader.read(outputs).boxes or []
    return Answers(boxes=boxes)


def find_detector(model: Path, photos: list[Path], spec: InputSpec) -> AnswerReader:
    """Return how to read the dense network's outputs, from the first photos that show it."""
    _, height, width = spec.shape
    outputs: list[dict[str, np.ndarray]] = []
    for batch in answer(model, photos, spec):
        outputs.append(batch)
        together = {name: np.concatenate([item[name] for item in outputs]) for name in batch}
        reader = find_reader(together, (height, width))
        if reader is not None and reader.head is not None:
            return reader
        outputs = outputs[-8:]
    raise SystemExit(f"{model}: its outputs are of no known layout of a detector")


def describe(candidate: Candidate, report: Report) -> dict[str, Any]:
    fraction = candidate.macs / report.dense.macs
    return {
        "id": candidate.id,
        "macs_fraction": round(fraction, 4),
        "params_fraction": round(candidate.params / report.dense.params, 4),
        "speedup": candidate.speedup,
        "speedup_times_macs_fraction": None if candidate.speedup is None else round(candidate.speedup * fraction, 4),
        "recovered_by": candidate.recovered_by,
        "map50_on_seen_photos": None if candidate.fidelity is None else candidate.fidelity.map50_to_dense,
    }


@dataclass(frozen=True)
class Judge:
    """The dense network's boxes on the unseen photos, and how another file's are compared with them."""

    photos: list[Path]
    spec: InputSpec
    reader: AnswerReader
    dense: Answers

    def row(self, model: Path) -> dict[str, Any]:
        found = detect_all(self.reader, model, self.photos, self.spec)
        likeness = compare_answers(found, self.dense)
        count = sum(map(len, above(found.boxes or [])))
        return {"map50": likeness.map50_to_dense, "map": likeness.map_to_dense, "boxes_found": count}


def open_judge(args: argparse.Namespace, out: Path, report: Report) -> Judge:
    photos = cut_photos(args.photos, args.work, args.seen, args.seed)[1][: args.unseen]
    spec = from_json(InputSpec, report.data["preprocessing"])
    reader = find_detector(out / "dense.onnx", photos, spec)
    return Judge(photos, spec, reader, detect_all(reader, out / "dense.onnx", photos, spec))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    seen = cut_photos(args.photos, args.work, args.seen, args.seed)[0]
    out = run_folder(args)
    report, seconds = prune(args, seen, out)
    judge = open_judge(args, out, report)
    itself = compare_answers(judge.dense, judge.dense)
    assert judge.reader.head is not None
    entry: dict[str, Any] = {
        "model": args.model.name,
        "sha256": report.model.sha256,
        "layout": judge.reader.head.layout,
        "photos_seen": len(list(seen.iterdir())),
        "photos_unseen": len(judge.photos),
        "boxes": itself.boxes,
        "dense_against_itself": [itself.map50_to_dense, itself.map_to_dense],
        "recover": args.recover,
        "options": args.rest,
        "seconds": round(seconds, 1),
        "mm_edge": mm_edge.__version__,
        "walked": args.effort != "quick",
        "rows": {},
    }
    by_id = {candidate.id: candidate for candidate in report.candidates}
    for budget in report.budgets:
        winner = by_id.get(budget.winner or "")
        if winner is None or winner.artifact is None:
            entry["rows"][budget.asked] = {"id": None, "reason": budget.reason}
        else:
            entry["rows"][budget.asked] = describe(winner, report) | judge.row(out / winner.artifact)
        print(budget.asked, entry["rows"][budget.asked], file=sys.stderr)
        save(args, entry_name(args), entry)
    return entry


def measure_onnxsim(args: argparse.Namespace) -> dict[str, Any]:
    """Return what onnxsim's pruning keeps, against the dense file of a run that is there already."""
    out = run_folder(args)
    report = from_json(Report, json.loads((out / "report.json").read_text()))
    judge = open_judge(args, out, report)
    (name,) = Runner(out / "dense.onnx").inputs
    found: dict[str, Any] = {"boxes": compare_answers(judge.dense, judge.dense).boxes, "rows": {}}
    for fraction in args.onnxsim:
        file = args.work / f"{args.model.stem}-onnxsim-{fraction}.onnx"
        row = try_onnxsim(args.model, name, (1, *judge.spec.shape), fraction, file, judge.row)
        print("onnxsim", fraction, row, file=sys.stderr)
        found["rows"][f"{fraction:g}"] = row
        save(args, "onnxsim", found)
    return found


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.work) / f"{args.model.stem}-{args.recover}"


def entry_name(args: argparse.Namespace) -> str:
    return args.recover if args.effort != "quick" else f"{args.recover}, screened"


def save(args: argparse.Namespace, key: str, entry: dict[str, Any]) -> None:
    """Write an entry after every row, so that a run that is stopped leaves what it measured."""
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    results.setdefault(args.model.stem, {})[key] = entry
    args.results.write_text(json.dumps(results, indent=1) + "\n")


def print_table(entry: dict[str, Any]) -> None:
    print(f"{entry['model']}, {entry['recover']}: {entry['boxes']} boxes on {entry['photos_unseen']} unseen photos")
    print(f"{'budget':14} {'MACs':>6} {'mAP50':>7} {'mAP':>7} {'speed-up':>9}  id")
    for asked, row in entry["rows"].items():
        if row["id"] is None:
            print(f"{asked:14} {row['reason']}")
            continue
        speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        figures = [f"{row[key]:7.3f}" if row[key] is not None else f"{'-':>7}" for key in ("map50", "map")]
        print(f"{asked:14} {row['macs_fraction']:6.3f} {' '.join(figures)} {speed:>9}  {row['id']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="folder or tar of photos; labels are not read")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seen", type=int, default=250, help="photos that prune-export is given")
    parser.add_argument("--unseen", type=int, default=None, help="photos that the figures come from; default: the rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recover", default="closed-form")
    parser.add_argument("--strategies", default="min_conservative", help="made as well; only budgets count")
    parser.add_argument("--macs", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--onnxsim", type=float, nargs="+", metavar="MACS", help="only what onnxsim keeps at these")
    parser.add_argument("--bench", action="store_true", help="measure speed-ups on this machine")
    parser.add_argument("--effort", default="normal", help="of prune-export: quick leaves candidates screened")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.rest = arguments[cut + 1 :]
    if args.onnxsim:
        measure_onnxsim(args)
    else:
        print_table(measure(args))


if __name__ == "__main__":
    main()
