"""Trains the network that `mm-edge demo` prunes and packs the images it is judged on.

The network is timm's `test_resnet` (residual blocks, 0.37 M parameters) on Fashion-MNIST, enlarged to 128 pixels so
that one inference is long enough to time. Most of the training runs at smaller sizes, the last stage at the final one.
The images shipped come from Fashion-MNIST's test set only: the network never saw them. The schedule is fixed and
nothing was selected on the test set, so the accuracy recorded is that of a network on images it was not fitted to.

    python benchmarks/train_demo.py --data FOLDER_OF_THE_FOUR_IDX_FILES

Writes mm_edge/demo/{model/config.json, model/model.safetensors, images.tar} and benchmarks/results/demo_model.json.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import platform
import sys
import tarfile
import time
from pathlib import Path

import mm_edge  # noqa: F401  (first: makes timm importable beside CPU-only torch)

# isort: split
import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

ARCH = "test_resnet"
PX = 128
MEAN, STD = 0.2860, 0.3530
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
STAGES = ((48, 180_000, 4e-3), (64, 60_000, 2e-3), (PX, 40_000, 1.5e-3))  # pixels, images seen, peak learning rate
BATCH = 128
SHIPPED_PER_CLASS = 200
ROOT = Path(__file__).resolve().parent.parent


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array of one gzipped IDX file; the header's last byte is the number of dimensions."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=dims, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    return read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")


def prepare(images: np.ndarray, px: int) -> torch.Tensor:
    """Return (N, 28, 28) uint8 images as normalised (N, 1, px, px); antialias makes the bicubic kernel Pillow's."""
    x = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    x = functional.interpolate(x, size=(px, px), mode="bicubic", antialias=True).clamp(0, 1)
    return ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the batch shifted by up to 2 pixels, and mirrored half of the time, each image on its own."""
    shifts = rng.integers(-2, 3, (len(images), 2))
    mirrored = rng.random(len(images)) < 0.5
    out = np.zeros_like(images)
    for i, image in enumerate(images):
        shifted = np.roll(np.pad(image, 2), shifts[i], (0, 1))[2:-2, 2:-2]
        out[i] = shifted[:, ::-1] if mirrored[i] else shifted
    return out


def train_stage(
    model: nn.Module, data: tuple[np.ndarray, np.ndarray], stage: tuple[int, int, float], seed: int
) -> None:
    px, count, peak = stage
    images, labels = data
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    steps = count // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak, total_steps=steps, pct_start=0.2)
    order = np.concatenate([rng.permutation(len(images)) for _ in range(count // len(images) + 1)])
    model.train()
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        logits = model(prepare(augment(images[batch], rng), px))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[batch].astype(np.int64)), label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{px} px, step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def predict(model: nn.Module, images: np.ndarray) -> np.ndarray:
    model.eval()
    return np.concatenate(
        [model(prepare(images[i : i + 250], PX)).argmax(1).numpy() for i in range(0, len(images), 250)]
    )


def choose_shipped(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the indices of SHIPPED_PER_CLASS test images of each class, drawn by seed."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [np.sort(rng.permutation(np.flatnonzero(labels == c))[:SHIPPED_PER_CLASS]) for c in range(len(CLASSES))]
    )


def write_images(path: Path, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """Write a tar of class folders; their names sort in label order. Same input, same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            buffer = io.BytesIO()
            Image.fromarray(images[index]).save(buffer, format="PNG", optimize=True)
            label = int(labels[index])
            info = tarfile.TarInfo(f"{label}_{CLASSES[label]}/{index:05d}.png")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)


def write_model(folder: Path, model: nn.Module) -> None:
    """Write the folder form timm reads: config.json says what the network expects, the weights lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCH,
        "num_classes": len(CLASSES),
        "num_features": model.num_features,
        "pretrained_cfg": {
            "tag": "fashion_mnist",
            "input_size": [1, PX, PX],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN],
            "std": [STD],
            "num_classes": len(CLASSES),
            "pool_size": [PX // 32, PX // 32],
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
        },
        "label_names": list(CLASSES),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=ROOT / "mm_edge" / "demo")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "results" / "demo_model.json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = timm.create_model(ARCH, num_classes=len(CLASSES), in_chans=1).to(memory_format=torch.channels_last)
    train, test = read_split(args.data, "train"), read_split(args.data, "t10k")
    started = time.perf_counter()
    for number, stage in enumerate(STAGES):
        train_stage(model, train, stage, args.seed + number)
    seconds = time.perf_counter() - started

    right = predict(model, test[0]) == test[1]
    shipped = choose_shipped(test[1], args.seed)
    write_model(args.out / "model", model)
    write_images(args.out / "images.tar", *test, shipped)
    record = {
        "command": f"python benchmarks/train_demo.py --seed {args.seed}",
        "arch": ARCH,
        "input_shape": [1, PX, PX],
        "params": sum(p.numel() for p in model.parameters()),
        "stages": [{"px": px, "images": count, "peak_lr": lr} for px, count, lr in STAGES],
        "accuracy_top1_test": float(right.mean()),
        "test_images": len(right),
        "accuracy_top1_shipped": float(right[shipped].mean()),
        "shipped_images": len(shipped),
        "train_seconds": round(seconds, 1),
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}",
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
