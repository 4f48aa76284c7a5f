"""Time and peak memory of every stage of the pipeline, on four networks.

    python benchmarks/pipeline.py [--only resnet18,...] [--out benchmarks/results/pipeline.json]

Each network runs in a process of its own: timm's random weights, 64 generated images in 4 classes for the gradients and
the parity check, thirty structured candidates (nine assignments a signal: two strategies coincide), no recovery, no
latency. What is timed is mm-edge, so accuracy means nothing here and is not taken. Peak memory of a stage is the
process's largest resident size within it (VmHWM, reset before the stage through /proc/self/clear_refs). With --only
the rows of other networks in the results stay as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

NETWORKS = ("resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
LIMITS_S = {"tf_efficientnet_lite0": 60, "swin_tiny_patch4_window7_224": 120}
AFTER_GRADIENTS = ("scores", "plan", "candidates")


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run_one(name: str) -> dict[str, object]:
    """Run the pipeline on one network in this process."""
    import mm_edge  # noqa: F401  timm imports only after it

    base = peak_rss_bytes()
    from PIL import Image

    from mm_edge.bench.target import load_target, resolve_host
    from mm_edge.load.data import open_data
    from mm_edge.load.models import LoadOptions, load_model
    from mm_edge.progress import Stages
    from mm_edge.run.job import Job
    from mm_edge.run.pipeline import run_stages
    from mm_edge.run.request import Request
    from mm_edge.store import RunStore

    class Watched(Stages):
        def __init__(self) -> None:
            super().__init__(None)
            self.peaks: dict[str, int] = {}

        @contextlib.contextmanager
        def stage(self, stage: str) -> Iterator[object]:
            Path("/proc/self/clear_refs").write_text("5")
            with super().stage(stage) as advance:
                yield advance
            self.peaks[stage] = max(self.peaks.get(stage, 0), peak_rss_bytes())

    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for index in range(64):
            path = Path(folder) / "images" / f"class{index % 4}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(path)
        stages = Watched()
        with stages.stage("load"):
            model = load_model(f"timm:{name}", LoadOptions())
            data = open_data(str(Path(folder) / "images"), model.input, None, (1.0, 0.0, 0.0), 0)
        store = RunStore(Path(folder) / "run")
        target = resolve_host(load_target("x86_64-avx512"))
        request = Request(recover="none")
        report = run_stages(Job(request, model, data, target, None, store.folder, store, stages))
    assert model.module is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.module.state_dict().values())
    worst = max(c.parity.max_rel_err for c in report.candidates if c.parity is not None)
    return {
        "network": name,
        "candidates": len(report.candidates),
        "worst_parity": worst,
        "model_bytes": size,
        "import_rss_bytes": base,
        "seconds": stages.seconds,
        "peak_rss_bytes": stages.peaks,
        "seconds_after_gradients": round(sum(stages.seconds.get(stage, 0.0) for stage in AFTER_GRADIENTS), 1),
        "limit_s": LIMITS_S.get(name),
        "peak_bytes_allowed": 6 * size + 2**30,
        "peak_bytes": max(stages.peaks.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pipeline.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_one(arguments.child)))
        return
    rows = []
    for name in arguments.only.split(","):
        command = [sys.executable, "-W", "ignore", __file__, "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{name}: {row['seconds_after_gradients']} s after the gradients for {row['candidates']} candidates, "
            f"peak {row['peak_bytes'] / 2**20:.0f} MiB (allowed {row['peak_bytes_allowed'] / 2**20:.0f}), "
            f"worst parity {row['worst_parity']:.1e}",
            flush=True,
        )
    packages = ("mm-edge", "torch", "timm", "onnx", "onnxruntime", "onnxscript", "onnx-ir")
    if arguments.out.is_file():
        done_now = {row["network"] for row in rows}
        rows += [row for row in json.loads(arguments.out.read_text())["rows"] if row["network"] not in done_now]
        rows.sort(key=lambda row: NETWORKS.index(row["network"]))
    document = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
