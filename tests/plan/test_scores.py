"""E1-E3 and GraSP's product on nets worked out by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import mm_edge  # noqa: F401  makes timm importable beside CPU-only torch
from mm_edge.errors import DataError, JobError, ModelError, UsageError
from mm_edge.plan.scores import (
    LEAST_SPREAD,
    Gradients,
    gradients,
    hessian_gradient_products,
    normalise,
    projected_gradients,
    score_weights,
)
from mm_edge.plan.signals import SIGNALS
from mm_edge.run.request import make_request


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def two_class_net() -> nn.Linear:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    return net


class Noisy(nn.Module):
    """Normalisation, dropout and a cache that keeps its graph, as timm's LeViT keeps its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.table = nn.Parameter(torch.randn(8))
        self.last = nn.Linear(8, 4)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Noisy:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.table * 2
        x = torch.tanh(self.norm(self.first(x))).mean((2, 3)) + self.cache["bias"]
        answer: Tensor = self.last(self.drop(x))
        return answer


def test_signals_by_hand() -> None:
    weights = {"w": array(1, -3, 0)}
    grads = {"w": array(-2, 1, 5)}
    scores = score_weights(weights, grads, tuple(SIGNALS))
    np.testing.assert_allclose(scores["magnitude"]["w"], array(0.75, 2.25, 0))
    np.testing.assert_allclose(scores["gradient"]["w"], array(2, 1, 5) * 3 / 8)
    np.testing.assert_allclose(scores["product"]["w"], array(2, 3, 0) * 3 / 5)
    assert list(scores) == list(SIGNALS) and all(s["w"].dtype == np.float32 for s in scores.values())


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40))
def test_normalised_scores_have_mean_one_or_are_zero(values: list[float]) -> None:
    score = normalise(array(*values))
    assert score.dtype == np.float32
    if sum(values) > 1e-30:
        assert score.mean() == pytest.approx(1.0, rel=1e-4)
    if not any(values):
        assert not score.any()


def test_gradient_is_the_signed_sum_over_images() -> None:
    # dL/dW = (softmax(W x) - onehot) x^T per image, summed before the absolute value is taken.
    net, x, y = two_class_net(), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    p0, p1 = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2))
    first = np.outer([p0 - 1, 1 - p0], [1, 0])
    second = np.outer([p1 - 1, 1 - p1], [0, 2])
    found = gradients(net, [(x, y)])
    np.testing.assert_allclose(found.values["weight"], first + second, rtol=1e-5)
    assert (found.images, found.labelled, found.warnings) == (2, True, ())


def test_batching_does_not_change_the_sum_and_the_module_is_left_alone() -> None:
    torch.manual_seed(0)
    net = Noisy().train()
    net.table.requires_grad_(False)
    net.norm.eval()
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    before = copy.deepcopy(net.state_dict())
    calls: list[tuple[int, int]] = []
    whole = gradients(net, [(x, y)]).values
    parts = gradients(net, [(x[:2], y[:2]), (x[2:], y[2:])], progress=lambda *done: calls.append(done)).values
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=1e-6)
    assert calls == [(1, 2), (2, 2)]
    assert net.training and not net.norm.training and not net.cache
    assert not net.table.requires_grad and net.first.weight.requires_grad and net.first.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert whole["table"].any() and set(whole) == {name for name, _ in net.named_parameters()}


def test_the_same_seed_gives_the_same_bits() -> None:
    net, x = Noisy(), torch.randn(4, 3, 8, 8)
    once, again = gradients(net, [(x, None)], seed=3), gradients(net, [(x, None)], seed=3)
    assert all(np.array_equal(value, again.values[name]) for name, value in once.values.items())


def test_without_labels_the_predictions_serve_with_a_warning() -> None:
    net, x = Noisy().eval(), torch.randn(4, 3, 8, 8)
    own = net(x).argmax(1)
    net.train()
    unlabelled = gradients(net, [(x, None)])
    labelled = gradients(net, [(x, own)])
    assert all(np.array_equal(value, labelled.values[name]) for name, value in unlabelled.values.items())
    assert unlabelled.warnings == (
        "no labels: gradients are taken at the dense model's own predictions; give labelled images if you can",
    )


def test_hessian_product_by_hand() -> None:
    # Logits (w x, 0), label 0: g = (p - 1) x and H = p (1 - p) x^2, with p = sigmoid(w x).
    class OneWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.w * x[:, 0], torch.zeros(len(x))], dim=1)

    net, x, y = OneWeight(), torch.tensor([[2.0], [2.0]]), torch.tensor([0, 0])
    p = 1 / (1 + np.exp(-1.0))
    calls: list[tuple[int, int]] = []
    found = hessian_gradient_products(net, [(x, y)], ["w"], progress=lambda *done: calls.append(done))
    assert found["w"][0] == pytest.approx(p * (1 - p) * 4 * (p - 1) * 2, rel=1e-3)
    assert net.w.item() == 0.5 and calls == [(1, 3), (2, 3), (3, 3)]


def test_hessian_product_agrees_with_double_backward() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    names = ["0.weight", "2.weight"]
    chosen = [dict(net.named_parameters())[name] for name in names]
    grads = torch.autograd.grad(functional.cross_entropy(net(x), y), chosen, create_graph=True)
    exact = torch.autograd.grad(torch.stack([(g * g.detach()).sum() for g in grads]).sum(), chosen)
    found = hessian_gradient_products(net, [(x[:8], y[:8]), (x[8:], y[8:])], names)
    for name, value in zip(names, exact, strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0.02, atol=2e-3 * float(value.abs().max()))


def test_hessian_product_reads_128_images_at_most_and_survives_caches() -> None:
    net = Noisy()
    seen: list[int] = []

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            for batch in super().__iter__():
                seen.append(len(batch[0]))
                yield batch

    batches = Counted([(torch.randn(100, 3, 4, 4), None)] * 5)
    before = copy.deepcopy(net.state_dict())
    found = hessian_gradient_products(net, batches, ["first.weight"])
    assert sum(seen) == 200 and list(found) == ["first.weight"] and np.isfinite(found["first.weight"]).all()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_real_network_with_cached_attention_biases() -> None:
    import timm

    net = timm.create_model("levit_128s", num_classes=4, depth=(1, 1, 1)).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        net(x)
    found = gradients(net, [(x[:1], None), (x[1:], None)])
    assert all(np.isfinite(value).all() for value in found.values.values())
    copy.deepcopy(net)  # a cached tensor with a graph would refuse


def test_errors_name_the_remedy() -> None:
    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.zeros(1, 3, 4, 4)
    cases: list[tuple[type[Exception], str, nn.Module, list[tuple[Tensor, Tensor | None]]]] = [
        (
            ModelError,
            "signals gradient and product need a classifier whose output is (images, classes), "
            "this one gives (1, 3, 4, 4); use --signals magnitude",
            Map(),
            [(x, None)],
        ),
        (
            DataError,
            "label 7 does not fit a network of 2 classes; check --data",
            two_class_net(),
            [(torch.zeros(1, 2), torch.tensor([7]))],
        ),
        (
            DataError,
            "no calibration images: signals gradient and product need some; use --signals magnitude",
            two_class_net(),
            [],
        ),
        (
            ModelError,
            "the gradient of 'weight' is not finite; check the network's preprocessing and weights",
            two_class_net(),
            [(torch.full((1, 2), float("nan")), torch.tensor([0]))],
        ),
    ]
    for kind, text, net, batches in cases:
        with pytest.raises(kind) as caught:
            gradients(net, batches)
        assert str(caught.value) == text
    with pytest.raises(JobError) as missing:
        score_weights({"w": array(1)}, {}, ["product"])
    assert str(missing.value) == (
        "layer 'w' has no gradient: it is no parameter of the module; use --signals magnitude"
    )


def test_names_of_signals() -> None:
    assert make_request(signals="product, magnitude,product").signals == ("product", "magnitude")
    with pytest.raises(UsageError) as unknown:
        make_request(signals="magnitud")
    assert str(unknown.value) == "unknown signal 'magnitud'; did you mean magnitude?"
    with pytest.raises(UsageError) as empty:
        make_request(signals=" ,")
    assert str(empty.value) == "no signal given; allowed: magnitude, gradient, product"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7))
def test_gradients_do_not_depend_on_batch_size(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(7, 2, generator=generator), torch.tensor([0, 1, 0, 1, 0, 1, 1])
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 7, size)]
    found: Gradients = gradients(two_class_net(), batches)
    np.testing.assert_allclose(found.values["weight"], gradients(two_class_net(), [(x, y)]).values["weight"], rtol=1e-4)


# ---- without labels


def test_projected_gradient_by_hand() -> None:
    """A linear layer y = W x has d(r.y)/dW = r x^T, whose square is x^2 in every row, whatever the signs."""
    layer = nn.Linear(3, 2, bias=False)
    images = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    batches = [(images[:1], None), (images[1:], None)]  # one image at a time: no mixed terms
    with torch.no_grad():
        # With one image a channel has no spread and is divided by LEAST_SPREAD.
        expected = images.square().sum(0).sqrt() / LEAST_SPREAD
    found = projected_gradients(layer, batches)
    assert (found.images, found.labelled) == (2, False)
    np.testing.assert_allclose(found.values["weight"], np.tile(expected, (2, 1)), rtol=1e-5)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_projected_gradient_of_a_batch_has_the_expected_squares() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 1, bias=False)
    images = torch.randn(8, 2, 4, 4)
    spread = layer(images).std(dim=(0, 2, 3), correction=0)
    exact = (images.square().sum(dim=(0, 2, 3))[None] / spread[:, None].square()).sqrt()
    drawn = np.stack([projected_gradients(layer, [(images, None)], seed).values["weight"] for seed in range(400)])
    np.testing.assert_allclose(np.sqrt((drawn**2).mean(axis=0))[..., 0, 0], exact.detach(), rtol=0.15)


def test_projected_gradient_takes_dicts_and_refuses_what_depends_on_no_weight() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            return {"maps": [self.body(x), 2 * self.body(x)]}

    found = projected_gradients(Two(), [(torch.randn(2, 1, 3, 3), None)])
    assert (found.values["body.weight"] > 0).all()
    with pytest.raises(ModelError, match="need outputs that depend on weights; use --signals magnitude"):
        projected_gradients(nn.Flatten(), [(torch.randn(2, 1, 3, 3), None)])
    with pytest.raises(DataError, match="no calibration images"):
        projected_gradients(Two(), [])


def test_an_exported_program_has_the_gradients_of_its_module() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = torch.export.export(module, (torch.zeros(1, 3, 6, 6),)).module()
    images: list[tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | None]] = [
        (torch.randn(1, 3, 6, 6), None) for _ in range(2)
    ]
    found, wanted = projected_gradients(program, images), projected_gradients(module, images)
    np.testing.assert_allclose(found.values["0.weight"], wanted.values["0.weight"], rtol=1e-5)
