"""What the checks of hostile files cost when honest files are loaded: processor time with them and without.

The files are ResNet-50 as a checkpoint, a .safetensors and an .onnx, and a small .pt2. Each is loaded with the checks
and with those of CHECKS switched off, in turn, after once for warm-up. Processor time is compared, because other
programs run meanwhile: the median over the rounds.

    python benchmarks/load_cost.py --rounds 10

Writes benchmarks/results/load_cost.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import mm_edge

# isort: split
import timm
import torch
from safetensors.torch import save_file

from mm_edge.load import exported, models, onnx_file, weights
from mm_edge.load.models import LoadOptions, load_model

ROOT = Path(__file__).resolve().parent.parent
ARCH = "resnet50"
FILES = {"net.pt": "", "net.safetensors": ARCH, "net.onnx": "", "net.pt2": ""}
# The checks of a file's size, archive, tensors, arguments and external data; none returns anything.
CHECKS = (
    (weights, ("check_file", "check_expansion", "check_sums", "check_plain")),
    (exported, ("check_file", "check_expansion", "check_sums")),
    (models, ("check_name", "check_sizes")),
    (onnx_file, ("check_file", "_refuse_quantised", "_check_external_data")),
)


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


@contextmanager
def switched_off() -> Iterator[None]:
    """Let the checks do nothing."""
    kept = [(module, name, getattr(module, name)) for module, names in CHECKS for name in names]
    for module, name, _ in kept:
        setattr(module, name, lambda *given: None)
    try:
        yield
    finally:
        for module, name, check in kept:
            setattr(module, name, check)


def seconds_to_load(path: Path, arch: str) -> float:
    """Return the seconds of processor time that one load takes."""
    began = time.process_time()
    load_model(str(path), LoadOptions(arch=arch or None))
    return time.process_time() - began


def compare(path: Path, arch: str, rounds: int) -> dict[str, Any]:
    """Return the median seconds with the checks and without, and their ratio."""
    seconds_to_load(path, arch)
    with_checks: list[float] = []
    without: list[float] = []
    for number in range(2 * rounds):
        if number % 4 in (0, 3):  # with, without, without, with
            with_checks.append(seconds_to_load(path, arch))
        else:
            with switched_off():
                without.append(seconds_to_load(path, arch))
    return {
        "bytes": path.stat().st_size,
        "cpu_seconds": round(median(with_checks), 4),
        "cpu_seconds_without_checks": round(median(without), 4),
        "ratio": round(median(with_checks) / median(without), 3),
        "loads_each": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "load_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        write_files(work)
        for name, arch in FILES.items():
            rows[name] = compare(work / name, arch, args.rounds)
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    found = {
        "command": f"python benchmarks/load_cost.py --rounds {args.rounds}",
        "files": rows,
        "machine": f"{platform.system()} {platform.machine()}, under other load",
        "versions": {"mm_edge": mm_edge.__version__, "torch": torch.__version__},
    }
    args.record.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
