#!/usr/bin/env python3
"""Checks on this device that the model of this folder answers as it did when it was made, and times it.

    python verify.py [--model FILE] [--threads N] [--seconds S]

It needs Python 3.8 or newer, numpy and onnxruntime. It ends with 0 where every file is whole and every answer is within
the tolerance of manifest.json, and with 1 otherwise.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def main():
    """Check the files, then the answers, then measure."""
    parser = argparse.ArgumentParser(
        description="Checks that the model of this folder answers as it should, and times it."
    )
    parser.add_argument("--model", help="the model file; without it the one that manifest.json names")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime; without it those of the measurement")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long is measured (default 3)")
    given = parser.parse_args()
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    good = check_files(manifest["files"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads or manifest["numbers"]["latency_ms"]["threads"] or 1
    model = Path(given.model) if given.model else HERE / manifest["model"]["file"]
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    stored = manifest["verify"]
    if stored is None:
        print("answers: not checked, the bundle has no stored inputs")
    else:
        good = check_answers(session, stored) and good
        measure(session, stored, manifest["numbers"], given.seconds)
    print("good" if good else "NOT good")
    sys.exit(0 if good else 1)


def check_files(hashes):
    """Return whether every file is there and has the hash of manifest.json."""
    wrong = []
    for name, wanted in hashes.items():
        path = HERE / name
        if not path.is_file():
            wrong.append("%s is missing" % name)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            wrong.append("%s is not the file that was written" % name)
    print("files: %s" % ("; ".join(wrong) if wrong else "all %d as written" % len(hashes)))
    return not wrong


def check_answers(session, stored):
    """Return whether every output is within the tolerance of what was stored."""
    arrays = np.load(str(HERE / stored["file"]))
    good = True
    for index, output in enumerate(stored["outputs"]):
        expected = arrays["expected_%d" % index]
        found = np.stack(
            [
                np.asarray(session.run([output["name"]], {stored["input"]: one[None]})[0]).reshape(-1)[
                    :: output["stride"]
                ]
                for one in arrays["inputs"]
            ]
        )
        if found.shape != expected.shape:
            print("output %s: has another shape than was stored" % output["name"])
            good = False
            continue
        largest = float(np.abs(expected.astype(np.float64)).max()) or 1.0
        error = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()) / largest
        fits = error <= stored["tolerance"]  # not so where it is NaN
        word = "within" if fits else "NOT within"
        print(
            "output %s: differs by %.1e of its largest value, %s %g"
            % (output["name"], error, word, stored["tolerance"])
        )
        good = good and fits
    return good


def measure(session, stored, numbers, seconds):
    """Print the median time of an input, and that of the report; an emulator's time is not the device's."""
    reported = numbers["latency_ms"]["p50"]
    in_report = "time in the report: %s" % ("not measured" if reported is None else "median %s" % in_ms(reported))
    if os.environ.get("MM_EDGE_EMULATED"):
        print("time: not taken, because this processor is emulated\n%s" % in_report)
        return
    one = {stored["input"]: np.load(str(HERE / stored["file"]))["inputs"][:1]}
    for _ in range(3):
        session.run(None, one)
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, one)
        times.append(1e3 * (time.perf_counter() - start))
    figures = in_ms(np.median(times)), in_ms(np.percentile(times, 90)), len(times)
    print("time: median %s, 90 %% below %s, of %d runs" % figures)
    print(in_report)


def in_ms(value):
    """Return milliseconds with three digits, and those above a thousand in full."""
    return ("%.0f ms" if value >= 1000 else "%.3g ms") % value


if __name__ == "__main__":
    main()
