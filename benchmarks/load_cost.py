"""What the checks of hostile files cost when honest files are loaded: processor time before and after they were added.

The files are ResNet-50 as a checkpoint, a .safetensors and an .onnx, and a small .pt2. A process of the mm-edge of
BEFORE, the commit before the first check, and one of this mm-edge take turns; each loads every file REPEATS times after
once for warm-up. Processor time is compared, because other programs run meanwhile, by the median of all loads.

    python benchmarks/load_cost.py --rounds 4

Writes benchmarks/results/load_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import mm_edge

# isort: split
import timm
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "fa6c0c7"
REPEATS = 3
ARCH = "resnet50"
FILES = {"net.pt": "", "net.safetensors": ARCH, "net.onnx": "", "net.pt2": ""}
CHILD = """
import json, sys, time
import mm_edge
from mm_edge.load.models import LoadOptions, load_model
import torch
torch.set_num_threads(1)
found = {}
for name, arch in json.loads(sys.argv[2]).items():
    times = []
    for _ in range(1 + int(sys.argv[3])):
        began = time.process_time()
        load_model(f"{sys.argv[1]}/{name}", LoadOptions(arch=arch or None))
        times.append(time.process_time() - began)
    found[name] = times[1:]
print("loaded", json.dumps(found))
"""


class Small(torch.nn.Module):
    """Twelve convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU()) for _ in range(12)]
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), *layers)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(images).mean((2, 3)))
        return scores


def write_files(folder: Path) -> None:
    """Write the honest files."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH).eval()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"arch": ARCH, "state_dict": state}, folder / "net.pt")
    save_file(state, folder / "net.safetensors")
    given = (torch.zeros(1, 3, 64, 64),)
    torch.onnx.export(model, given, folder / "net.onnx", dynamo=False, input_names=["images"])
    torch.export.save(torch.export.export(Small().eval(), given), folder / "net.pt2")


def load_all(code: Path, files: Path) -> dict[str, list[float]]:
    """Return the seconds of every load, by file, of the mm-edge in `code`."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(files), json.dumps(FILES), str(REPEATS)]
    surroundings = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=surroundings, cwd=files, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, list[float]] = json.loads(done.stdout.rpartition("loaded ")[2])
    return found


def compare(codes: dict[str, Path], files: Path, rounds: int) -> dict[str, Any]:
    """Return the median seconds of each file by version, and their ratio."""
    times: dict[str, dict[str, list[float]]] = {name: {which: [] for which in codes} for name in FILES}
    for number in range(rounds):
        for which in list(codes)[:: 1 if number % 2 else -1]:
            for name, found in load_all(codes[which], files).items():
                times[name][which] += found
                print(f"round {number + 1}, {which}, {name}: {found}", file=sys.stderr, flush=True)
    rows = {}
    for name, by_version in times.items():
        before, after = (median(by_version[which]) for which in ("before", "after"))
        size = (files / name).stat().st_size
        rows[name] = {
            "bytes": size,
            "cpu_seconds_before": round(before, 4),
            "cpu_seconds_after": round(after, 4),
            "ratio": round(after / before, 3),
            "loads_each": len(by_version["after"]),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "load_cost.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        before = work / "before"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(before), BEFORE], cwd=ROOT, check=True)
        try:
            write_files(work)
            rows = compare({"before": before, "after": ROOT}, work, args.rounds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    found = {
        "command": f"python benchmarks/load_cost.py --rounds {args.rounds}",
        "before": BEFORE,
        "files": rows,
        "machine": f"{platform.system()} {platform.machine()}, under other load",
        "versions": {"mm_edge": mm_edge.__version__, "torch": torch.__version__},
    }
    args.record.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
