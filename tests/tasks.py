"""Twelve small networks of the tasks that people prune networks for, untrained, with the outputs such networks have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Sequential):
    """A convolution, its BatchNorm and an activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Backbone(nn.Module):
    """Three maps, at a half, a quarter and an eighth of the size."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Layer(3, width, 3, 2), Layer(width, width, 3, 2), Layer(width, 2 * width, 3, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class C2f(nn.Module):
    """A split, a residual bottleneck and a concatenation of all parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = Layer(width, width, 1), Layer(width + width // 2, width, 1)
        self.first, self.second = Layer(width // 2, width // 2), Layer(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.enter(x).chunk(2, 1)
        found: Tensor = self.leave(torch.cat([one, two, two + self.second(self.first(two))], 1))
        return found


class Sppf(nn.Module):
    """Three poolings one after the other, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = Layer(width, width // 2, 1), Layer(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.enter(x)]
        for _ in range(3):
            pieces.append(functional.max_pool2d(pieces[-1], 5, 1, 2))
        found: Tensor = self.leave(torch.cat(pieces, 1))
        return found


class Yolo(nn.Module):
    """Boxes in pixels and class scores at two scales, (1, 4 + classes, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.c2f, self.sppf = Backbone(), C2f(64), Sppf(64)
        self.neck = Layer(96, 32)
        self.boxes = nn.ModuleList([nn.Conv2d(32, 4, 1), nn.Conv2d(64, 4, 1)])
        self.classes = nn.ModuleList([nn.Conv2d(32, 3, 1), nn.Conv2d(64, 3, 1)])

    def forward(self, images: Tensor) -> Tensor:
        _, middle, deep = self.backbone(images)
        deep = self.sppf(self.c2f(deep))
        maps = [self.neck(torch.cat([middle, functional.interpolate(deep, scale_factor=2.0)], 1)), deep]
        found = []
        for number, item in enumerate(maps):
            boxes = 8 * (number + 1) * torch.sigmoid(self.boxes[number](item)).flatten(2)
            found.append(torch.cat([boxes, torch.sigmoid(self.classes[number](item)).flatten(2)], 1))
        return torch.cat(found, 2)


class Ssd(nn.Module):
    """Class probabilities and box offsets of the anchors at two scales, (1, anchors, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.scores = nn.ModuleList([nn.Conv2d(32, 2 * 4, 3, padding=1), nn.Conv2d(64, 2 * 4, 3, padding=1)])
        self.boxes = nn.ModuleList([nn.Conv2d(32, 2 * 4, 3, padding=1), nn.Conv2d(64, 2 * 4, 3, padding=1)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(images)[1:]
        scores = [head(item).permute(0, 2, 3, 1).flatten(1) for head, item in zip(self.scores, maps, strict=True)]
        boxes = [head(item).permute(0, 2, 3, 1).flatten(1) for head, item in zip(self.boxes, maps, strict=True)]
        shape = (images.shape[0], -1, 4)
        return torch.cat(scores, 1).reshape(shape).softmax(-1), torch.cat(boxes, 1).reshape(shape)


class Fpn(nn.Module):
    """Maps of three scales that one head reads, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.sides = nn.ModuleList([nn.Conv2d(width, 32, 1) for width in (32, 32, 64)])
        self.smooth, self.head = Layer(32, 32), nn.Conv2d(32, 5, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [side(item) for side, item in zip(self.sides, self.backbone(images), strict=True)]
        for number in (1, 0):
            maps[number] = maps[number] + functional.interpolate(maps[number + 1], scale_factor=2.0)
        return {f"p{number}": self.head(self.smooth(item)) for number, item in enumerate(maps)}


class UNet(nn.Module):
    """A mask of the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 32, 2, 2)
        self.join2, self.join1 = Layer(64, 32), Layer(64, 32)
        self.head = nn.ConvTranspose2d(32, 1, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        one, two, three = self.backbone(images)
        x = self.join2(torch.cat([self.up2(three), two], 1))
        x = self.join1(torch.cat([self.up1(x), one], 1))
        return torch.sigmoid(self.head(x))


class DeepLab(nn.Module):
    """Classes of pixels from dilated convolutions side by side and the mean of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.sides = nn.ModuleList([Layer(64, 32, 1), Layer(64, 32, 3, 1, 2), Layer(64, 32, 3, 1, 3)])
        self.whole, self.join = nn.Conv2d(64, 32, 1), Layer(128, 32, 1)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        deep = self.backbone(images)[-1]
        whole = self.whole(deep.mean((2, 3), keepdim=True)).expand(-1, -1, *deep.shape[2:])
        x = self.head(self.join(torch.cat([*(side(deep) for side in self.sides), whole], 1)))
        return {"out": functional.interpolate(x, size=images.shape[2:], mode="bilinear", align_corners=False)}


class Detr(nn.Module):
    """Logits and boxes of six queries that attend to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.project = Backbone(), nn.Conv2d(64, 32, 1)
        self.queries = nn.Parameter(torch.randn(1, 6, 32))
        self.decoder = nn.TransformerDecoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.logits = nn.Linear(32, 4)
        self.boxes = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.project(self.backbone(images)[-1]).flatten(2).transpose(1, 2)
        found = self.decoder(self.queries.expand(images.shape[0], -1, -1), tokens)
        return {"logits": self.logits(found), "pred_boxes": self.boxes(found).sigmoid()}


class Keypoints(nn.Module):
    """Five heat maps, and the mean position in each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.head = nn.Conv2d(32, 5, 1)
        self.places: Tensor
        self.register_buffer("places", torch.linspace(0, 1, 16))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.head(torch.relu(self.up(self.backbone(images)[-1])))
        shares = maps.flatten(2).softmax(-1).reshape(maps.shape)
        x, y = (shares.sum(2) * self.places).sum(-1), (shares.sum(3) * self.places).sum(-1)
        return maps, torch.stack([x, y], -1)


class Depth(nn.Module):
    """A map of distances, which are above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up, self.head = Layer(64, 32), nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        _, two, three = self.backbone(images)
        x = functional.interpolate(self.up(three), scale_factor=2.0, mode="bilinear", align_corners=False)
        return functional.softplus(self.head(torch.cat([x, two], 1)))


class SuperResolution(nn.Module):
    """The image at twice its size."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(Layer(32, 32), nn.Conv2d(32, 32, 3, padding=1)) for _ in range(2)])
        self.widen, self.leave = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.enter(images)
        for block in self.blocks:
            x = x + block(x)
        found: Tensor = self.leave(functional.pixel_shuffle(self.widen(x), 2))
        return found


class TwoInputs(nn.Module):
    """A grasp from an image and the state of an arm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.state = Backbone(), nn.Linear(7, 32)
        self.join, self.head = nn.Linear(96, 48), nn.Linear(48, 6)

    def forward(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.backbone(image)[-1].mean((2, 3))
        x = torch.relu(self.join(torch.cat([pooled, torch.relu(self.state(state))], 1)))
        return torch.tanh(self.head(x)), x.norm(dim=1, keepdim=True)


class Recogniser(nn.Module):
    """Characters of a line of text, (1, columns, characters)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.lstm, self.head = nn.LSTM(64, 24, batch_first=True, bidirectional=True), nn.Linear(48, 11)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.backbone(images)[-1].mean(2).transpose(1, 2)
        found: Tensor = self.head(self.lstm(columns)[0])
        return found.softmax(-1)


class FaceEmbedder(nn.Module):
    """A vector of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head, self.norm = nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16)

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(self.norm(self.head(self.backbone(images)[-1].mean((2, 3)))))


@dataclass(frozen=True)
class Task:
    """How a network is built and what it takes: the shapes of its inputs, batch of one."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 64, 64),)

    def module(self) -> nn.Module:
        """Return the network, always with the same weights, scrambled statistics, and gains that differ as trained."""
        torch.manual_seed(0)
        module = self.build().eval()
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):  # equal ones would be one tensor in an optimised .onnx
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.uniform_(part.bias, -0.2, 0.5)
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and part.running_mean is not None:
                assert part.running_var is not None
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.uniform_(part.bias, -0.2, 0.5)
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.1, 0.5)
        return module

    def examples(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs."""
        random = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=random) for shape in self.shapes)


TASKS = {
    "yolo": Task(Yolo),
    "ssd": Task(Ssd),
    "fpn": Task(Fpn),
    "unet": Task(UNet),
    "deeplab": Task(DeepLab),
    "detr": Task(Detr),
    "keypoints": Task(Keypoints),
    "depth": Task(Depth),
    "super-resolution": Task(SuperResolution, ((1, 3, 32, 32),)),
    "two inputs": Task(TwoInputs, ((1, 3, 32, 32), (1, 7))),
    "recogniser": Task(Recogniser, ((1, 3, 32, 64),)),
    "face embedder": Task(FaceEmbedder),
}
