"""Trains two small networks on CIFAR-10's JPEG copy: the dense baselines of benchmarks/cifar.py and int8_table.py.

    cnn  timm's resnet18 at half its width (2.8 M parameters); the stem is a 3x3 convolution of stride 2 without
         max-pool, so stage 1 works on 16x16. SGD with momentum.
    vit  timm's vit_tiny_patch16_224 at 32 px: 8x8 tokens, 4 blocks of width 64 with 2 heads, and two convolutions
         instead of the one that embeds patches (0.2 M parameters). AdamW.

5,000 of the 50,000 training images, 500 a class drawn by the seed, are held out for choosing (never trained on); the
test images are read once, at the end. Trained from scratch in bfloat16 autocast, the rate rising over a tenth of the
steps and falling along a cosine; shifts, mirroring, cutmix in half of the batches; the weights written are fp32. All
images lie on the device, which augments them a batch at a time. The folder of data is then what mm-edge reads as one
data set in three parts: cifar10-train.tar (45,000), cifar10-val.tar (5,000), cifar10-test.tar (10,000).

    python benchmarks/train_cifar.py split --data FOLDER_WITH_THE_TWO_TARS --out DATA
    python benchmarks/train_cifar.py train cnn --data DATA --out cnn_cifar10
    python benchmarks/train_cifar.py train vit --data DATA --out vit_cifar10 --device cuda
    mm-edge prune-export cnn_cifar10 --arch benchmarks/train_cifar.py:make_cnn --data DATA/cifar10-train.tar ...

Made for a GPU: on a CPU core an epoch takes minutes, so give --epochs there. Each training adds its line to --results.
The lines `cnn-8-epochs` and `vit-6-epochs` there are of an earlier recipe for one CPU core (git show de6749c).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 512
WARM_UP = 0.1  # of the steps
SMOOTHING = 0.05
CUTMIX = 0.5  # of the batches
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


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    return torch.optim.SGD(network.parameters(), lr=0.4, **settings)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)


Recipe = tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], int, str]
NETWORKS: dict[str, Recipe] = {
    "cnn": (make_cnn, sgd, 80, "resnet18"),
    "vit": (make_vit, adamw, 200, "vit_tiny_patch16_224"),
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


def read_images(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) on the device."""
    images, labels = read_tar(path)
    return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)


@functools.cache
def normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the channels, sent to the device once: sending waits for all it has to do."""
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def to_input(images: Tensor) -> Tensor:
    """Return (n, 3, 32, 32) normalised, channels last."""
    mean, std = normalisation(images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels (reflected border) and mirror half of them: (n, side, side, 3), any type."""
    count, side, device = len(images), images.shape[1], images.device
    shifts = torch.randint(-4, 5, (2, count, 1), generator=generator, device=device)
    mirrored = torch.rand((count, 1), generator=generator, device=device) < 0.5
    places = (torch.arange(side, device=device) + shifts).abs()
    rows, columns = side - 1 - (side - 1 - places).abs()
    columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def cut_and_mix_(images: Tensor, rng: np.random.Generator) -> float:
    """Paste one box of each image's partner, the batch in reverse, over it; return the share of its own that stays."""
    side = images.shape[2]
    half = side * math.sqrt(rng.random()) / 2  # the box's share of the area is uniform
    corners = [(max(0, round(c - half)), min(side, round(c + half))) for c in rng.integers(0, side, 2).tolist()]
    (top, bottom), (left, right) = corners
    images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return 1 - (bottom - top) * (right - left) / side**2


def rate(progress: float) -> float:
    """Return the learning rate at a share of the training, as a share of the peak."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def train(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    seconds: float = math.inf,
) -> int:
    """Train for `steps` of BATCH images; return how many were done.

    Where they would take longer than `seconds`, the schedule goes by the time from there on and ends with it.
    """
    images, labels = data
    device = images.device
    rng, generator = np.random.default_rng(seed), torch.Generator(device).manual_seed(seed)
    peak = optimiser.param_groups[0]["lr"]
    clip = 1.0 if isinstance(optimiser, torch.optim.AdamW) else 100.0
    network.train()
    order = torch.zeros(0, dtype=torch.int64, device=device)
    started, done = time.perf_counter(), 0
    for step in range(steps):
        progress = max(step / steps, (time.perf_counter() - started) / seconds)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = peak * rate(progress)
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator, device=device)
        batch, order = order[:BATCH], order[BATCH:]
        inputs, wanted = to_input(augment(images[batch], generator)), labels[batch]
        own = cut_and_mix_(inputs, rng) if rng.random() < CUTMIX else 1.0
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(inputs).float()
        loss = own * cross_entropy(logits, wanted, label_smoothing=SMOOTHING)
        if own < 1:
            loss = loss + (1 - own) * cross_entropy(logits, wanted.flip(0), label_smoothing=SMOOTHING)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimiser.step()
        if step % 100 == 0:
            print(f"{time.perf_counter() - started:.1f} s, step {step} of {steps}: loss {loss.item():.3f}", flush=True)
        done += 1
    loss.item()  # waits for the device
    return done


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    network.eval()
    found = torch.cat([network(to_input(part)).argmax(1) for part in images.split(250)])
    return float((found == labels).double().mean())


def write_folder(folder: Path, network: nn.Module, architecture: str) -> None:
    """Write config.json, which says what the network expects, and the weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    expects = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = {"architecture": architecture, "num_classes": 10, "pretrained_cfg": expects}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def record(results: Path, name: str, entry: dict[str, Any]) -> None:
    known = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps({**known, name: entry}, indent=2, sort_keys=True) + "\n")
    print(json.dumps(entry))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="hold out validation images")
    training = commands.add_parser("train", help="train one network")
    training.add_argument("network", choices=tuple(NETWORKS))
    training.add_argument("--epochs", type=int, help="default: the recipe's")
    training.add_argument("--steps", type=int, help="instead of epochs, to measure the speed")
    training.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then")
    training.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it is")
    training.add_argument("--machine", help="what to say of the machine besides the device's name")
    training.add_argument("--results", type=Path, default=RESULTS)
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
    train_one(args)


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def train_one(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # what is outside autocast, the judging, is in fp32 proper
    device = choose_device(args.device)
    build, optimise, epochs, architecture = NETWORKS[args.network]
    network = build().to(device, memory_format=torch.channels_last)
    data = read_images(args.data / "cifar10-train.tar", device)
    a_epoch = len(data[0]) // BATCH
    steps = args.steps or a_epoch * (args.epochs or epochs)
    started = time.perf_counter()
    done = train(network, optimise(network), data, steps, args.seed, args.seconds)
    seconds = time.perf_counter() - started
    if args.steps:
        print(f"{seconds / steps * 1000:.0f} ms a step")
        return
    write_folder(args.out, network, architecture)
    parts = {part: read_images(args.data / f"cifar10-{part}.tar", device) for part in ("val", "test")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU core"
    entry = {
        "accuracy_top1_validation": accuracy(network, *parts["val"]),
        "accuracy_top1_test": accuracy(network, *parts["test"]),
        "train_images": len(data[0]),
        "epochs": round(done / a_epoch, 1),
        "seed": args.seed,
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "train_seconds": round(seconds, 1),
        "machine": f"{name}, {args.machine}" if args.machine else name,
    }
    record(args.results, args.network, entry)


if __name__ == "__main__":
    main()
