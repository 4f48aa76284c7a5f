"""The user's own loss is called with outputs, inputs, labels and names, and scores as its gradient says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mm_edge
from mm_edge.errors import UsageError
from mm_edge.load.data import ImageSet, open_data
from mm_edge.plan.scores import gradients, hessian_gradient_products
from mm_edge.records import InputSpec
from mm_edge.run.loss import LossBatch, UserLoss, open_loss
from mm_edge.run.request import make_request

CODE = """
import torch

SEEN = []

def names(outputs, batch):
    SEEN.extend(batch.names)
    target = torch.tensor([float(name.partition("[")[2].rstrip("]")) for name in batch.names])
    return ((outputs.mean((1, 2, 3)) - target) ** 2).sum()

def raises(outputs, batch): raise KeyError("mask")
def number(outputs, batch): return 1.0
def each(outputs, batch): return outputs.mean((1, 2, 3))
def detached(outputs, batch): return outputs.sum().detach()
def infinite(outputs, batch): return outputs.sum() * float("inf")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32))
    spec = InputSpec((3, 6, 6), (0.5,) * 3, (0.5,) * 3)
    return open_data(str(tmp_path / "data.npy"), spec, None, (1.0, 0.0, 0.0)).calibration


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def batches(images: ImageSet) -> list[tuple[torch.Tensor, None]]:
    return [(torch.from_numpy(inputs), None) for inputs, _ in images.batches(3)]


def test_the_gradient_is_that_of_the_users_loss_and_names_go_with_their_images(code: Path, images: ImageSet) -> None:
    module = net()
    found = gradients(module, batches(images), loss=open_loss(f"{code}:names").on(images))
    targets = torch.tensor([float(name.partition("[")[2].rstrip("]")) for name in images.names])
    whole = torch.cat([inputs for inputs, _ in batches(images)])
    ((module(whole).mean((1, 2, 3)) - targets) ** 2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(found.values[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-4)
    assert (found.images, found.warnings) == (8, ())


def test_cross_entropy_written_by_the_user_gives_the_same_gradients_and_products() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    data: list[tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | None]] = [
        (torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1]))
    ]

    def own(outputs: object, inputs: object, labels: torch.Tensor | None, before: int) -> torch.Tensor:
        assert isinstance(outputs, torch.Tensor) and labels is not None and before == 0
        return functional.cross_entropy(outputs, labels, reduction="sum")

    ours, theirs = gradients(module, data), gradients(module, data, loss=own)
    np.testing.assert_array_equal(ours.values["1.weight"], theirs.values["1.weight"])
    products = [hessian_gradient_products(module, data, ["1.weight"], loss=loss) for loss in (None, own)]
    np.testing.assert_array_equal(products[0]["1.weight"], products[1]["1.weight"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "failed: KeyError: 'mask'"),
        ("number", "returned a float; return the sum of the images' losses, a tensor of one finite number"),
        ("each", "returned a tensor of shape (3,); return the sum of"),
        ("detached", "returned a tensor without a gradient; return the sum of"),
        ("infinite", "returned inf; return the sum of"),
    ],
)
def test_what_is_no_loss_is_one_line(code: Path, images: ImageSet, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        gradients(net(), batches(images), loss=open_loss(f"{code}:{name}").on(images))
    assert says in str(caught.value) and str(caught.value).startswith(f"--loss {code}:{name} ")
    assert "\n" not in str(caught.value)


def test_a_loss_that_nothing_uses_is_refused() -> None:
    for options, says in (
        ({"loss": "a.py:f"}, "--loss a.py:f is taken on calibration images; give --data PATH with it"),
        (
            {"loss": "a.py:f", "data": "photos", "signals": "magnitude"},
            "--loss a.py:f is for signals that need gradients; give --signals gradient,product with it",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            make_request(**options)
        assert str(caught.value) == says
    with pytest.raises(UsageError, match=r"--loss 'x' is not FILE\.py:CALLABLE; write for example --loss"):
        open_loss("x")


def test_a_batch_holds_inputs_labels_and_names() -> None:
    seen: list[LossBatch] = []

    def keep(outputs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
        seen.append(batch)
        return outputs.sum()

    class Images:
        names = ("a.png", "b.png", "c.png")

    loss = UserLoss("f.py:keep", keep, "0").on(Images())  # type: ignore[arg-type]  # it reads names alone
    inputs, labels = (torch.zeros(2, 3), torch.ones(2, 1)), torch.tensor([1, 0])
    loss(torch.ones(2, requires_grad=True), inputs, labels, 1)
    assert seen == [LossBatch(inputs, labels, ("b.png", "c.png"))]


@pytest.mark.slow
def test_a_run_scores_a_segmenter_by_the_users_loss(code: Path, images: ImageSet, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))
    options = {"data": tmp_path / "data.npy", "bench": False, "strategies": "balanced", "signals": "gradient"}
    options |= {"recover": "none"}
    runs = [
        mm_edge.prune_export(module, torch.zeros(1, 3, 6, 6), out=tmp_path / name, loss=loss, **options)
        for name, loss in (("own", f"{code}:names"), ("without", None))
    ]
    assert [candidate.signal for run in runs for candidate in run.candidates] == ["gradient", "gradient"]
    first, second = ((run.folder / str(run.candidates[0].artifact)).read_bytes() for run in runs)
    assert first != second
