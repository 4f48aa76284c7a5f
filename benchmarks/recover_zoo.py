"""What each recovery brings back on one tiny network of many families: is the closed form safe as the default?

    python benchmarks/recover_zoo.py IMAGES.tar --work FOLDER [--models test_*] [--out FILE.json]

timm's `test_*` networks, their weights drawn at random (hubs cannot be reached here) and BatchNorm's statistics taken
on noise, lose 30 % of their multiply-adds (`balanced` by magnitude, scaled). Divergence from the dense network, in
nats on images that no recovery has seen: pruned as it is, BatchNorm re-estimated, closed form. And whether the compact
graph answers as the masked one does, of which the exactness of every artifact depends.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import safetensors.torch
import timm
import torch
from rich.console import Console

from mm_edge.api import run_job
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.run.request import make_request

RECOVERIES = ("none", "bn", "closed-form")


def write_checkpoint(name: str, folder: Path, images: torch.Tensor) -> Path:
    """Draw weights for `name`, take BatchNorm's statistics on `images`, and write a checkpoint."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(images)
    made = folder / f"{name}-checkpoint"
    made.mkdir(parents=True, exist_ok=True)
    config = {"architecture": name, "num_classes": 10, "pretrained_cfg": {"input_size": tuple(images.shape[1:])}}
    (made / "config.json").write_text(json.dumps(config))
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def run(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    config = timm.create_model(name).default_cfg
    images = torch.randn(16, *config["input_size"])
    checkpoint = write_checkpoint(name, work, images)
    row: dict[str, Any] = {"model": name}
    for recover in RECOVERIES:
        started = time.monotonic()
        setting = {"out": work / name / recover, "data": options.images, "bench": False}
        fields: dict[str, Any] = {"signals": ("magnitude",), "macs": (0.7,), "strategies": ("balanced",)}
        request = make_request(**setting, recover=recover, input_sizes="none", **fields)
        try:
            quiet = Stages(Console(quiet=True))
            report = run_job(lambda: load_model(str(checkpoint), LoadOptions()), request, quiet)
        except mm_edge.errors.MMEdgeError as error:
            row[recover] = {"error": str(error)}
            continue
        wanted = [item for item in report.candidates if item.strategy == "macs_0.7" and item.signal == "magnitude"]
        (found,) = wanted[:1] or report.candidates[:1]
        row[recover] = {
            "kl_to_dense": found.kl_to_dense,
            "agreement": found.agreement_top1,
            "recovered_by": found.recovered_by,
            "macs": round(found.macs / report.dense.macs, 4),
            "seconds": round(time.monotonic() - started, 1),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--models", default="test_*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in timm.list_models(options.models):
        rows.append(run(name, options, options.work))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"version": mm_edge.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
