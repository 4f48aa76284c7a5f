"""Trains two small networks on CIFAR-10's JPEG copy: the dense baselines of benchmarks/cifar.py and int8_table.py.

    cnn  timm's resnet18 at half its width (2.8 M parameters); the stem is a 3x3 convolution of stride 2 without
         max-pool, so stage 1 works on 16x16. SGD with momentum.
    vit  timm's vit_tiny_patch16_224 at 32 px: 8x8 tokens, 4 blocks of width 64 with 2 heads, and two convolutions
         instead of the one that embeds patches (0.2 M parameters). AdamW.

5,000 of the 50,000 training images, 500 a class drawn by the seed, are held out for choosing (never trained on); the
test images are read once, at the end. Trained from scratch in bfloat16 autocast on one CPU core with the one-cycle
schedule, random shifts and mirroring; the weights written are fp32. The folder of data is then what mm-edge reads as
one data set in three parts: cifar10-train.tar (45,000), cifar10-val.tar (5,000), cifar10-test.tar (10,000).

    python benchmarks/train_cifar.py split --data FOLDER_WITH_THE_TWO_TARS --out DATA
    python benchmarks/train_cifar.py train cnn --data DATA --out cnn_cifar10
    mm-edge prune-export cnn_cifar10 --arch benchmarks/train_cifar.py:make_cnn --data DATA/cifar10-train.tar ...

Each training adds its line to benchmarks/results/train_cifar.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  (first: makes timm importable beside CPU-only torch)

# isort: split
import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128
HELD_OUT = 500  # a class
RESULTS = Path(__file__).resolve().parent / "results" / "train_cifar.json"


def make_cnn() -> nn.Module:
    """Return timm's resnet18 at half width with a stem for 32-pixel images."""
    network = timm.create_model("resnet18", num_classes=10, channels=(32, 64, 128, 256))
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def make_vit() -> nn.Module:
    """Return timm's vit_tiny at 32 px: 65 tokens of width 64, 4 blocks; two convolutions make the 8x8 tokens.

    Early convolutions let a transformer learn from few epochs (Xiao et al. 2021).
    """
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **arguments)
    first = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
    second = nn.Conv2d(32, 64, 3, stride=2, padding=1)
    network.patch_embed.proj = nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU(), second)
    return network


def sgd(network: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    return torch.optim.SGD(network.parameters(), lr=0.1, **settings), 0.2


def adamw(network: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    return torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05), 2e-3


Recipe = tuple[Callable[[], nn.Module], Callable[[nn.Module], tuple[torch.optim.Optimizer, float]], int, str]
NETWORKS: dict[str, Recipe] = {
    "cnn": (make_cnn, sgd, 8, "resnet18"),
    "vit": (make_vit, adamw, 6, "vit_tiny_patch16_224"),
}


def split(data: Path, out: Path, seed: int) -> None:
    """Write the training images as cifar10-train.tar and cifar10-val.tar in `out`; link the test images there."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(data / "cifar10-train.tar") as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]
    rng = np.random.default_rng(seed)
    classes = np.asarray([Path(name).parent.name for name, _ in files])
    held = np.zeros(len(files), dtype=bool)
    for name in sorted(set(classes)):
        held[rng.permutation(np.flatnonzero(classes == name))[:HELD_OUT]] = True
    for part, chosen in (("train", ~held), ("val", held)):
        with tarfile.open(out / f"cifar10-{part}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in np.flatnonzero(chosen):
                name, content = files[index]
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    test = out / "cifar10-test.tar"
    test.unlink(missing_ok=True)
    test.symlink_to((data / "cifar10-test.tar").resolve())


def read_tar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,), classes in the sorted order of their folders."""
    images, names = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith((".png", ".jpg", ".jpeg")):
                images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
                names.append(Path(member.name).parent.name)
    classes = sorted(set(names))
    return np.stack(images), np.asarray([classes.index(name) for name in names])


def to_input(images: np.ndarray) -> torch.Tensor:
    x = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each image by up to 4 pixels (reflected border) and mirror half of them."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    out = np.empty_like(images)
    for i, (dy, dx) in enumerate(rng.integers(0, 9, (len(images), 2))):
        crop = padded[i, dy : dy + 32, dx : dx + 32]
        out[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return out


def train(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    peak: float,
    data: tuple[np.ndarray, np.ndarray],
    steps: int,
    seed: int,
) -> None:
    """Train for `steps` of BATCH images."""
    images, labels = data
    rng = np.random.default_rng(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak, total_steps=steps, pct_start=0.25)
    network.train()
    order = np.zeros(0, dtype=np.int64)
    for step in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(images))
        batch, order = order[:BATCH], order[BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(to_input(augment(images[batch], rng)))
        loss = functional.cross_entropy(logits.float(), torch.from_numpy(labels[batch]), label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0 if isinstance(optimiser, torch.optim.AdamW) else 100.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    network.eval()
    found = [network(to_input(images[i : i + 250])).argmax(1).numpy() for i in range(0, len(images), 250)]
    return float((np.concatenate(found) == labels).mean())


def write_folder(folder: Path, network: nn.Module, architecture: str) -> None:
    """Write config.json, which says what the network expects, and the weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    expects = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = {"architecture": architecture, "num_classes": 10, "pretrained_cfg": expects}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def record(name: str, entry: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: entry}, indent=2, sort_keys=True) + "\n")
    print(json.dumps(entry))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="hold out validation images")
    training = commands.add_parser("train", help="train one network")
    training.add_argument("network", choices=tuple(NETWORKS))
    training.add_argument("--epochs", type=int, help="default: the recipe's")
    training.add_argument("--steps", type=int, help="instead of epochs, to measure the speed")
    for command in (splitting, training):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.command == "split":
        split(args.data, args.out, args.seed)
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    build, optimise, epochs, architecture = NETWORKS[args.network]
    network = build().to(memory_format=torch.channels_last)
    data = read_tar(args.data / "cifar10-train.tar")
    epochs = args.epochs or epochs
    steps = args.steps or len(data[0]) // BATCH * epochs
    optimiser, peak = optimise(network)
    started = time.perf_counter()
    train(network, optimiser, peak, data, steps, args.seed)
    seconds = time.perf_counter() - started
    if args.steps:
        print(f"{seconds / steps * 1000:.0f} ms a step")
        return
    write_folder(args.out, network, architecture)
    entry = {
        "accuracy_top1_validation": accuracy(network, *read_tar(args.data / "cifar10-val.tar")),
        "accuracy_top1_test": accuracy(network, *read_tar(args.data / "cifar10-test.tar")),
        "train_images": len(data[0]),
        "epochs": epochs,
        "seed": args.seed,
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "train_seconds": round(seconds, 1),
        "machine": "one core of two, shared with other jobs",
    }
    record(args.network, entry)


if __name__ == "__main__":
    main()
