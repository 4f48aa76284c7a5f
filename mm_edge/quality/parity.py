"""Exactness (E8), checked on every artifact: the compact model against its masked model on the same inputs.

    max_rel_err = max |compact - masked| / max |masked|        both over all inputs; the worst of the outputs

A sigmoid or softmax is rounded like the number 1, however small it is. Inputs are therefore not taken alone, and where
all values of an output lie from 0 to 1, an error of PROBABILITY_ERROR is within tolerance. A top-1 answer agrees when
the masked model gives the compact model's class its highest value, to within the tolerance: classes that tie to
rounding count as the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from mm_edge.arrays import Float32Array, by_input, in_order_of_fields
from mm_edge.errors import ParityError
from mm_edge.graph.export import output_tensors
from mm_edge.records import Parity, ParityInputs
from mm_edge.runtime import open_session

TOLERANCE = 1e-4
# Two units in the last place of a float32 of 1.
PROBABILITY_ERROR = 2.0**-22

Run = Callable[[Float32Array], list[Float32Array]]


def compare(run: Run, reference: Run, inputs: Float32Array, kind: str, batch: int = 1) -> Parity:
    """Compare two models on `inputs`, such as (N, C, H, W), `batch` at a time, over all of their outputs.

    Raises:
        ParityError: the number or the shapes of the outputs differ.
    """
    seen: list[list[tuple[float, float, float]]] = []
    agreed = 0
    for start in range(0, len(inputs), batch):
        examples = inputs[start : start + batch]
        outputs, expected = run(examples), reference(examples)
        shapes, wanted = [item.shape for item in outputs], [item.shape for item in expected]
        if shapes != wanted:
            raise ParityError(f"outputs have the shapes {shapes}, the masked model's {wanted}")
        pairs = zip(outputs, expected, strict=True)
        seen.append([(float(np.abs(got - want).max()), float(want.min()), float(want.max())) for got, want in pairs])
        agreed += len(examples) * _same_answer(outputs[0], expected[0])
    table = np.asarray(seen)  # (batches, outputs, 3); NumPy's maxima keep NaN, which must fail the check
    errors, low, high = table[..., 0].max(axis=0), table[..., 1].min(axis=0), table[..., 2].max(axis=0)
    least = np.where((low >= 0) & (high <= 1), PROBABILITY_ERROR / TOLERANCE, 1e-30)
    with np.errstate(invalid="ignore"):
        relative = errors / np.maximum(np.maximum(np.abs(low), np.abs(high)), least)
    return Parity(float(errors.max()), float(relative.max()), agreed / len(inputs), ParityInputs(len(inputs), kind))


def compare_with_outputs(model: Path, outputs: Float32Array, images: Float32Array, kind: str) -> Parity:
    """Compare a device's `outputs` for `images`, a row each, with what ONNX Runtime answers for `model` here.

    `outputs` are those of the model's first output. The kernels of different instruction sets may answer differently;
    this shows by how much. `kind` says what the images are, "images" or "noise".

    Raises:
        ParityError: the shapes of the outputs differ.
    """
    rows = iter(outputs)
    here = onnx_runner(model)
    return compare(lambda _: [next(rows)[None]], lambda image: here(image)[:1], images, kind)


def require(parity: Parity, what: str) -> None:
    """Raise ParityError unless `parity` is within tolerance."""
    if not (parity.max_rel_err <= TOLERANCE and parity.top1_agreement == 1.0):
        raise ParityError(
            f"{what} differs from its masked model: relative error {parity.max_rel_err:.1e} (allowed {TOLERANCE:.0e}), "
            f"top-1 agreement {parity.top1_agreement:.1%}; it was not kept as an artifact"
        )


def onnx_runner(model: ir.Model | Path, threads: int = 1) -> Run:
    """Return a function that runs `model` on a batch of inputs with ONNX Runtime's CPU provider.

    A model made for a fixed batch is fed the examples again and again until the batch is full.
    """
    session = open_session(model if isinstance(model, Path) else ir.to_proto(model).SerializeToString(), threads)
    names = [item.name for item in session.get_inputs()]
    first = session.get_inputs()[0].shape
    fixed = first[0] if first and isinstance(first[0], int) else None

    def run(inputs: Float32Array) -> list[Float32Array]:
        filled = inputs if fixed is None else np.resize(np.arange(len(inputs)), fixed)
        found = session.run(None, by_input(inputs if fixed is None else inputs[filled], names))
        cut = fixed is not None and fixed > len(inputs)
        return [item[: len(inputs)] if cut and item.ndim and len(item) == fixed else item for item in found]

    return run


def torch_runner(module: nn.Module) -> Run:
    """Return a function that runs `module` in eval mode without gradients."""

    def run(inputs: Float32Array) -> list[Float32Array]:
        with torch.inference_mode():
            given = (torch.from_numpy(array) for array in in_order_of_fields(inputs))
            return [tensor.numpy() for tensor in output_tensors(module(*given))]

    return run


def _same_answer(got: Float32Array, want: Float32Array) -> bool:
    flat = want.reshape(-1)
    return bool(flat[int(got.reshape(-1).argmax())] >= flat.max() - TOLERANCE * np.abs(flat).max())
