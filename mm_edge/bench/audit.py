"""The kernel ONNX Runtime chose for each convolution and matrix product, its share of the time, and why it was chosen.

The kernels are read from the graph that ONNX Runtime optimised for the device, which is the graph that ran. An fp32
convolution on x86 may run without the NCHWc kernels, or fill only part of their lanes. Its shapes explain why, by the
conditions of ONNX Runtime's NCHWc graph transformer (b is the block: 16 lanes with AVX-512, 8 with AVX2):

    the weights must be constant, and 4-dimensional
    one group:      input channels below b (read without blocking), or a multiple of 4
    depthwise:      output channels a multiple of 4
    other groups:   input and output channels of a group multiples of b
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mm_edge.bench.session import run_options
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport, printable
from mm_edge.errors import BenchError
from mm_edge.store import write_atomically

NCHWC_DOMAIN = "com.microsoft.nchwc"
NCHWC_SUFFIX = "_nchwc"  # a blocked kernel is named by what it computes, with this ending
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "ConvTranspose")
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulNBits")
QUANTISED = ("QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger")
MAX_NODES = 100_000


@dataclass(frozen=True)
class KernelUse:
    """One convolution or matrix product as it ran.

    Attributes:
        node: the node's name in the optimised graph.
        output: the name of what it computes, as the given file calls it.
        op_type: its operator.
        kernel: "NCHWc", "NCHWc depthwise", "QLinear" or "plain".
        share: its fraction of the time of all nodes.
        weight_shape: the shape of its weight.
        reason: why the kernel is not the best one, or how many lanes it fills; None if there is nothing to explain.
    """

    node: str
    output: str
    op_type: str
    kernel: str
    share: float
    weight_shape: tuple[int, ...]
    reason: str | None


@dataclass(frozen=True)
class Audit:
    """Every convolution and matrix product of a model, the slowest first, and the other nodes' share of the time."""

    kernels: tuple[KernelUse, ...]
    other_share: float
    graph_file: str | None


def audit_model(
    model: Path, target: Target, info: Mapping[str, Any], *, transport: Transport, save_to: Path | None = None
) -> Audit:
    """Run `model` under the profiler on the device and name its kernels.

    Args:
        model: the .onnx file.
        target: gives threads, affinity, provider and session options.
        info: the device's info record; its flags give the block size.
        transport: the open transport to the device.
        save_to: the file to write ONNX Runtime's optimised graph to, without its weights.

    Raises:
        BenchError: the worker could not run it, or its answer is not a profile.
        JobError: `save_to` cannot be written.
    """
    result = transport.ask("profile", {"model": model}, run_options(target))
    graph = _read_graph(result, transport.name)
    if save_to is not None:
        write_atomically(save_to, graph.SerializeToString())
    times = _read_times(result, transport.name)
    total = sum(times.values()) or 1
    shapes = {node["name"]: node["input_shapes"] for node in result["nodes"]}
    initialisers = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    dequantised = {n.output[0] for n in graph.graph.node if n.op_type == "DequantizeLinear"}
    uses = []
    for node in graph.graph.node:
        if node.op_type not in CONVOLUTIONS + PRODUCTS or node.name not in times:
            continue
        weight_shape = _weight_shape(node, shapes[node.name], initialisers)
        reason = _explain(node, weight_shape, node.input[1] in initialisers, bool(dequantised & {*node.input}), info)
        share = times[node.name] / total
        # The outputs of blocked kernels are numbered anew; their names say what they compute.
        output = node.name.removesuffix(NCHWC_SUFFIX) if node.domain == NCHWC_DOMAIN else node.output[0]
        kernel = _kernel(node, weight_shape)
        uses.append(KernelUse(node.name, output, node.op_type, kernel, share, weight_shape, reason))
    uses.sort(key=lambda use: -use.share)
    other = max(0.0, 1 - math.fsum(use.share for use in uses))
    return Audit(tuple(uses), other, str(save_to) if save_to else None)


def block_size(info: Mapping[str, Any]) -> int | None:
    """Return the channels of an NCHWc block on the device, or None where it is not x86 with AVX2."""
    if info["isa"] != "x86_64":
        return None
    return 16 if "avx512f" in info["flags"] else 8 if "avx2" in info["flags"] else None


def _weight_shape(
    node: onnx.NodeProto, input_shapes: Sequence[Sequence[int]], initialisers: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Return the weight's shape as the profiler saw it, or as the graph stores it where the kernel packed it away."""
    index = 3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1
    if index < len(input_shapes):
        return tuple(input_shapes[index])
    return initialisers.get(node.input[index], ())


def _kernel(node: onnx.NodeProto, weight_shape: tuple[int, ...]) -> str:
    if node.op_type in QUANTISED:
        return "QLinear"
    if node.domain == NCHWC_DOMAIN:
        return "NCHWc depthwise" if _is_depthwise(node, weight_shape) else "NCHWc"
    return "plain"


def _groups(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _is_depthwise(node: onnx.NodeProto, weight_shape: tuple[int, ...]) -> bool:
    return len(weight_shape) > 1 and weight_shape[1] == 1 and _groups(node) > 1


def _explain(
    node: onnx.NodeProto, weight_shape: tuple[int, ...], constant: bool, dequantised: bool, info: Mapping[str, Any]
) -> str | None:
    if node.op_type in QUANTISED:
        return None
    if dequantised:
        return "runs in fp32 on dequantised int8: an operator or a missing scale around it kept the two apart"
    block = block_size(info)
    if node.op_type not in CONVOLUTIONS or len(weight_shape) < 3 or block is None:
        return None
    if node.domain == NCHWC_DOMAIN:
        return _empty_lanes(weight_shape[0], block)
    return _why_not_nchwc(node, weight_shape, constant, block)


def _empty_lanes(outputs: int, block: int) -> str | None:
    lanes = -(-outputs // block) * block
    return f"{outputs} output channels fill {lanes} lanes" if lanes != outputs else None


def _why_not_nchwc(node: onnx.NodeProto, weight_shape: tuple[int, ...], constant: bool, block: int) -> str:
    outputs, inputs, groups = weight_shape[0], weight_shape[1], _groups(node)
    if len(weight_shape) != 4:
        return "only 2-dimensional convolutions have NCHWc kernels"
    if not constant:
        return "its weights are not constant"
    if groups > 1 and outputs % 4:
        return f"{outputs} output channels of a grouped convolution are not a multiple of 4"
    if groups > 1 and not _is_depthwise(node, weight_shape) and (inputs % block or outputs // groups % block):
        return f"{inputs} input and {outputs // groups} output channels a group are not both multiples of {block}"
    if groups == 1 and inputs >= block and inputs % 4:
        return f"{inputs} input channels are not a multiple of 4"
    return "not explained by its shapes"


# --- what a device sends is checked before it is used ---------------------------------------------------------------


def _read_graph(result: Mapping[str, Any], device: str) -> onnx.ModelProto:
    try:
        return onnx.load_from_string(base64.b64decode(str(result.get("graph")), validate=True))
    except Exception as error:  # protobuf's own error type is not part of its interface
        raise BenchError(f"{device} sent a graph that is not ONNX: {printable(str(error))}") from error


def _read_times(result: Mapping[str, Any], device: str) -> dict[str, int]:
    """Return microseconds by node name; BenchError if an entry is not a node with a time."""
    nodes = result.get("nodes")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        raise BenchError(f"{device} sent no list of nodes; the answer was refused")
    for node in nodes:
        good = (
            isinstance(node, dict)
            and isinstance(node.get("name"), str)
            and type(node.get("dur_us")) is int
            and node["dur_us"] >= 0
            and isinstance(node.get("input_shapes"), list)
            and all(isinstance(s, list) and all(type(d) is int for d in s) for s in node["input_shapes"])
        )
        if not good:
            raise BenchError(f"{device} sent a node that is not one; the answer was refused")
    return {node["name"]: node["dur_us"] for node in nodes}
