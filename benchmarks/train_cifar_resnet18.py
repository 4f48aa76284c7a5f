"""Trains a ResNet-18 on CIFAR-10's JPEG copy, the network of benchmarks/int8_table.py that has accuracy to lose.

timm's resnet18 at half its width (2.8 M parameters) for 32-pixel images: the stem is a 3x3 convolution of stride 2 and
there is no max-pool, so stage 1 works on 16x16. Trained from scratch in bfloat16 autocast on the CPU with the one-cycle
schedule; the weights written are fp32. The test images are read once, at the end.

    python benchmarks/train_cifar_resnet18.py --data FOLDER_WITH_THE_TARS --out resnet18_cifar10
    mm-edge prune-export resnet18_cifar10 --arch benchmarks/train_cifar_resnet18.py:make_network ...
"""

from __future__ import annotations

import argparse
import io
import json
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

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128


def make_network() -> nn.Module:
    """Return timm's resnet18 at half width with a stem for 32-pixel images."""
    network = timm.create_model("resnet18", num_classes=10, channels=(32, 64, 128, 256))
    network.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


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


def train(network: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = len(images) // BATCH * epochs
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.2, total_steps=steps, pct_start=0.25)
    network.train()
    for epoch in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(to_input(augment(images[batch], rng)))
            loss = functional.cross_entropy(logits.float(), torch.from_numpy(labels[batch]), label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    network.eval()
    found = [network(to_input(images[i : i + 250])).argmax(1).numpy() for i in range(0, len(images), 250)]
    return float((np.concatenate(found) == labels).mean())


def write_folder(folder: Path, network: nn.Module) -> None:
    """Write config.json, which says what the network expects, and the weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    expects = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": expects}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    network = make_network().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    train(network, *read_tar(args.data / "cifar10-train.tar"), args.epochs, args.seed)
    seconds = time.perf_counter() - started
    write_folder(args.out, network)
    test = accuracy(network, *read_tar(args.data / "cifar10-test.tar"))
    print(json.dumps({"accuracy_top1_test": test, "epochs": args.epochs, "train_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
