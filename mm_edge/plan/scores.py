"""Scores of weights by signal, and the gradient passes they need.

A signal (signals.py) gives the raw score S of every weight. It is divided by its mean over the layer, so that layers
can be compared:

    normalised     S / mean(S), zeros where the mean is zero

A network that is no classifier, or one whose images have no labels, has no loss. Its gradient is the root of the
expected squared gradient of random projections of the outputs f, each channel c divided by its spread s_c:

    g^2 = sum over images of  E_r [ (d/dw  sum_j r_j f_j / s_c(j))^2 ],      r_j = -1 or 1 at random

It is the Fisher information of Gaussian outputs of those spreads. One projection is drawn per image. The images of a
batch are projected together: their signs are independent, so the square of the sum is, in expectation, the sum of the
squares.

The user may give a loss of their own. Its gradient is summed as that of cross-entropy is.

GraSP's ranking needs the product of the Hessian H with the gradient g of the mean loss. Double backward
fails on hard-sigmoid networks, fused attention and cached attention biases, so it is a central difference:

    H g  ~  (g(w + e d) - g(w - e d)) / (2 e),  e d = STEP * |w| * g / |g|     (norms over all weights)

Sources: Wang et al. 2020 (GraSP); Martens 2020 (arXiv 1412.1193, section 5) for the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mm_edge.arrays import Float32Array, Float32Arrays
from mm_edge.errors import DataError, JobError, ModelError
from mm_edge.graph.export import output_tensors
from mm_edge.plan.signals import SIGNALS

GRASP_IMAGES = 128
# Against exact products on trained ViT-Tiny and ConvNeXt: cosine 1.00 from 3e-4 down, 0.99 at 1e-3, 0.90 at 3e-3.
STEP = 3e-4
# The least spread that a channel is divided by: one that never changes says nothing.
LEAST_SPREAD = 1e-6

Scores = dict[str, Float32Arrays]
Progress = Callable[[int, int], None]
# Inputs and labels; a module with several inputs has a tuple of them.
Inputs = Tensor | tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor | None]
# Takes what the module returned, the inputs, the labels, and the number of images before; returns the summed loss.
Loss = Callable[[object, Inputs, Tensor | None, int], Tensor]


class Batches(Protocol):
    """Batches of (inputs, labels N or None), as many as `len` says; iterated more than once.

    Inputs are images (N, C, H, W), or a tuple with an array for each of a module's inputs.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, in the same order each time."""
        ...

    def __len__(self) -> int:
        """Return how many batches there are."""
        ...


@dataclass(frozen=True)
class Gradients:
    """Summed gradients dL/dw by fqn (float32, the parameter's shape) and what they were taken on."""

    values: Float32Arrays
    images: int
    labelled: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader of a report should know about them."""
        if self.labelled:
            return ()
        return ("no labels: gradients are taken at the dense model's own predictions; give labelled images if you can",)


def score_weights(weights: Float32Arrays, gradients: Mapping[str, Float32Array], signals: Sequence[str]) -> Scores:
    """Return, per signal, the normalised score of every weight in `weights`.

    `gradients` may be empty when no signal asked for needs them.

    Raises:
        JobError: a layer has no gradient; it must not stay dense in silence.
    """
    return {name: _score_layers(name, weights, gradients) for name in signals}


def _score_layers(name: str, weights: Float32Arrays, gradients: Mapping[str, Float32Array]) -> Float32Arrays:
    signal = SIGNALS[name]
    return {
        fqn: normalise(signal.score(weight, _gradient_of(gradients, fqn) if signal.needs_gradient else None))
        for fqn, weight in weights.items()
    }


def normalise(score: Float32Array) -> Float32Array:
    """Divide a layer's score by its mean, so that layers can be compared; a zero mean gives zeros."""
    mean = float(score.mean(dtype=np.float64)) if score.size else 0.0
    return (score / mean).astype(np.float32, copy=False) if mean > 0 else np.zeros_like(score, dtype=np.float32)


def gradients(
    module: nn.Module, batches: Batches, seed: int = 0, progress: Progress | None = None, loss: Loss | None = None
) -> Gradients:
    """E2's sum: one gradient pass of `module` over `batches`, in eval mode, for every floating parameter.

    `module` is left as it was: modes, gradients and requires_grad. The loss is cross-entropy, unless `loss` is given. A
    batch without labels is labelled by the module's own predictions. `progress` is called with (batches done, batches
    in all).

    Raises:
        ModelError: the output is not (N, classes) and there is no `loss`, or a gradient is not finite.
        DataError: there are no images, or a label is outside the classes.
    """
    with _differentiable(module, seed) as parameters:
        sums, images, labelled = _gradient_sums(module, list(parameters.values()), batches, progress, loss)
    if images == 0:
        raise DataError("no calibration images: signals gradient and product need some; use --signals magnitude")
    values = {name: total.numpy() for name, total in zip(parameters, sums, strict=True)}
    _require_finite(values)
    return Gradients(values, images, labelled)


def projected_gradients(
    module: nn.Module, batches: Batches, seed: int = 0, progress: Progress | None = None
) -> Gradients:
    """Return the gradient without a loss (top of the file) for every floating parameter; labels are not read.

    `module` is left as it was. `progress` is called with (batches done, batches in all).

    Raises:
        ModelError: the module returns no tensor, or a gradient is not finite.
        DataError: there are no images.
    """
    with _differentiable(module, seed) as parameters:
        chosen = list(parameters.values())
        squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in chosen]
        images = 0
        for done, (inputs, _) in enumerate(batches, start=1):
            _clear_caches_(module)
            grads = torch.autograd.grad(_project(_call(module, inputs)), chosen, allow_unused=True)
            for total, grad in zip(squares, grads, strict=True):
                if grad is not None:
                    total.add_(grad.square())
            images += _count(inputs)
            if progress is not None:
                progress(done, len(batches))
    if images == 0:
        raise DataError("no calibration images: signals gradient and product need some; use --signals magnitude")
    values = {name: total.sqrt().numpy() for name, total in zip(parameters, squares, strict=True)}
    _require_finite(values)
    return Gradients(values, images, False)


def _project(outputs: object) -> Tensor:
    """Return the sum of all outputs, each channel divided by its spread, with random signs."""
    tensors = [tensor for tensor in output_tensors(outputs) if tensor.is_floating_point() and tensor.requires_grad]
    if not tensors:
        raise ModelError("signals gradient and product need outputs that depend on weights; use --signals magnitude")
    total = torch.zeros(())
    for tensor in tensors:
        channels = tensor.float().flatten(2) if tensor.dim() > 2 else tensor.float().reshape(len(tensor), -1, 1)
        spread = channels.detach().std(dim=(0, 2), correction=0, keepdim=True).clamp_min(LEAST_SPREAD)
        signs = torch.randint(0, 2, channels.shape).to(channels.dtype).mul_(2).sub_(1)
        total = total + (channels / spread * signs).sum()
    return total


def _require_finite(values: Float32Arrays) -> None:
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ModelError(f"the gradient of '{name}' is not finite; check the network's preprocessing and weights")


def hessian_gradient_products(
    module: nn.Module,
    batches: Batches,
    names: Sequence[str],
    seed: int = 0,
    progress: Progress | None = None,
    loss: Loss | None = None,
) -> Float32Arrays:
    """Return H g of the mean loss for the parameters `names`, by a central difference on the first 128 images at most.

    The weights are moved along their gradient and put back exactly. Raises what `gradients` raises, and JobError
    for a name that the module does not have.
    """
    few = _first_images(batches, GRASP_IMAGES)
    few = few if loss is not None else _label(module, few)
    passes = iter(range(3))

    def take() -> Gradients:
        before = next(passes) * len(few)
        shown = None if progress is None else lambda done, _: progress(before + done, 3 * len(few))
        return gradients(module, few, seed, shown, loss)

    centre = take()
    total = {name: _gradient_of(centre.values, name) for name in names}
    parameters = dict(module.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in names}
    length = _norm(torch.from_numpy(value) for value in total.values())
    if length == 0.0:
        return {name: np.zeros_like(value) for name, value in total.items()}
    step = STEP * _norm(iter(saved.values())) / length
    try:
        _move_(parameters, saved, total, step)
        ahead = take().values
        _move_(parameters, saved, total, -step)
        behind = take().values
    finally:
        _move_(parameters, saved, total, 0.0)
    # Sums over n images stand on both sides of H g, in the direction and in the difference: hence n squared.
    scale = np.float32(1.0 / (2.0 * step * centre.images**2))
    return {name: (ahead[name] - behind[name]) * scale for name in names}


def _gradient_of(gradients: Mapping[str, Float32Array], fqn: str) -> Float32Array:
    if fqn not in gradients:
        raise JobError(f"layer '{fqn}' has no gradient: it is no parameter of the module; use --signals magnitude")
    return gradients[fqn]


@contextmanager
def _differentiable(module: nn.Module, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the floating parameters with the module in eval mode and gradients on; undo it all afterwards."""
    modes = {part: part.training for part in module.modules()}
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
        _clear_caches_(module)
        for part, mode in modes.items():
            part.training = mode


def _clear_caches_(module: nn.Module) -> None:
    """Put the module in eval mode by way of training mode.

    Attention biases cached by an earlier eval-mode pass hold a graph that is gone; timm's modules drop them on train().
    An exported program refuses to change its mode, and keeps no such biases.
    """
    if isinstance(module, torch.fx.GraphModule):
        return
    module.train()
    module.eval()


def _gradient_sums(
    module: nn.Module,
    parameters: list[nn.Parameter],
    batches: Batches,
    progress: Progress | None,
    loss: Loss | None,
) -> tuple[list[Tensor], int, bool]:
    sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    images, labelled = 0, True
    for done, (inputs, labels) in enumerate(batches, start=1):
        _clear_caches_(module)
        if loss is None:
            logits = _logits(module, inputs)
            labelled = labelled and labels is not None
            total_loss = functional.cross_entropy(logits, _targets(logits, labels), reduction="sum")
        else:
            total_loss = loss(_call(module, inputs), inputs, labels, images)
        grads = torch.autograd.grad(total_loss, parameters, allow_unused=True)
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)
        images += _count(inputs)
        if progress is not None:
            progress(done, len(batches))
    return sums, images, labelled


def _call(module: nn.Module, inputs: Inputs) -> object:
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _count(inputs: Inputs) -> int:
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def _logits(module: nn.Module, inputs: Inputs) -> Tensor:
    output = _call(module, inputs)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            "signals gradient and product need a classifier whose output is (images, classes), "
            f"this one gives {shape}; use --signals magnitude"
        )
    return output.float()


def _targets(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return logits.detach().argmax(dim=1)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise DataError(f"label {int(labels.max())} does not fit a network of {logits.shape[1]} classes; check --data")
    return labels.long()


def _first_images(batches: Batches, count: int) -> list[Batch]:
    few: list[Batch] = []
    for inputs, labels in batches:
        taken = tuple(item[:count] for item in inputs) if isinstance(inputs, tuple) else inputs[:count]
        few.append((taken, None if labels is None else labels[:count]))
        count -= _count(inputs)
        if count <= 0:
            break
    return few


def _label(module: nn.Module, batches: list[Batch]) -> list[Batch]:
    """Fix missing labels at the unmoved module's predictions: both sides of a difference need the same loss."""
    modes = {part: part.training for part in module.modules()}
    _clear_caches_(module)
    with torch.no_grad():
        fixed: list[Batch] = [(x, _targets(_logits(module, x), None) if y is None else y) for x, y in batches]
    _clear_caches_(module)
    for part, mode in modes.items():
        part.training = mode
    return fixed


def _norm(tensors: Iterator[Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def _move_(
    parameters: dict[str, nn.Parameter], saved: dict[str, Tensor], direction: Float32Arrays, step: float
) -> None:
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value if step == 0.0 else value + step * torch.from_numpy(direction[name]))
