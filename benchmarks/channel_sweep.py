"""Which channel counts a CPU rewards: 1 to 64 channels, five operators, fp32 and int8, on this machine.

    python benchmarks/channel_sweep.py [--out benchmarks/results/channel_sweep-NAME.json]

A grouped convolution has two groups of that many channels. Each model is a stack of LAYERS equal operators, so that the
conversions at its ends weigh little. The 64 widths of one operator are alive together and take turns in random order,
ROUNDS times; a width's time is the median over rounds of the fastest of RUNS runs, one thread. From these:

    rate(c)       = multiply-adds / time
    efficiency(c) = rate(c) / max of rate(c') over 8 <= c' <= c        1: no narrower layer is used better
    mean(m)       = geometric mean of the efficiency of the multiples of m from 16 to 64

The multiple found is the smallest m whose mean is within 3 % of the best mean of any m.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from mm_edge.bench import worker

WIDTHS = range(1, 65)
MULTIPLES = (1, 2, 4, 8, 16)
LAYERS = 4
SIDE = 28
ROWS = 196
ROUNDS = 9
RUNS = 5
TOLERANCE = 0.03
GROUPS = 2
OPERATORS = ("conv", "pointwise", "depthwise", "grouped", "matmul")
DATA_TYPES = ("fp32", "int8")


def weight_shape(operator: str, width: int) -> tuple[int, ...]:
    return {
        "conv": (width, width, 3, 3),
        "pointwise": (width, width, 1, 1),
        "depthwise": (width, 1, 3, 3),
        "grouped": (GROUPS * width, width, 3, 3),
        "matmul": (width, width),
    }[operator]


def macs(operator: str, width: int) -> int:
    positions = ROWS if operator == "matmul" else SIDE * SIDE
    return LAYERS * positions * int(np.prod(weight_shape(operator, width)))


class Builder:
    """Collects nodes and weights of one model."""

    def __init__(self, int8: bool) -> None:
        self.nodes: list = []
        self.weights: list = []
        self.int8 = int8
        if int8:
            self.constant("scale", np.float32(0.05))
            self.constant("zero_u8", np.uint8(128))
            self.constant("zero_i8", np.int8(0))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def quantised(self, name: str) -> str:
        if not self.int8:
            return name
        self.node("QuantizeLinear", [name, "scale", "zero_u8"], f"{name}_q")
        return self.node("DequantizeLinear", [f"{name}_q", "scale", "zero_u8"], f"{name}_dq")

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        generator = np.random.default_rng(0)
        if not self.int8:
            return self.constant(name, generator.standard_normal(shape).astype(np.float32))
        self.constant(f"{name}_i8", generator.integers(-127, 128, shape, dtype=np.int8))
        return self.node("DequantizeLinear", [f"{name}_i8", "scale", "zero_i8"], name)


def make_model(operator: str, data_type: str, width: int) -> bytes:
    built = Builder(data_type == "int8")
    last = built.quantised("x")
    for index in range(LAYERS):
        weight = built.weight(f"w{index}", weight_shape(operator, width))
        if operator == "matmul":
            last = built.node("MatMul", [last, weight], f"y{index}")
        else:
            pads = [0, 0, 0, 0] if operator == "pointwise" else [1, 1, 1, 1]
            group = {"depthwise": width, "grouped": GROUPS}.get(operator, 1)
            last = built.node("Conv", [last, weight], f"y{index}", pads=pads, group=group)
        last = built.quantised(last)
    channels = GROUPS * width if operator == "grouped" else width
    shape = [ROWS, width] if operator == "matmul" else [1, channels, SIDE, SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last)]
    graph = helper.make_graph(built.nodes, "sweep", ends[:1], ends[1:], built.weights)
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def sweep(operator: str, data_type: str) -> dict[int, float]:
    """Return the milliseconds of each width."""
    runs = {}
    for width in WIDTHS:
        session = worker.make_session(make_model(operator, data_type, width), {"threads": 1})
        feeds = worker.make_inputs(session, {})
        runs[width] = lambda session=session, feeds=feeds: session.run(None, feeds)
    best: dict[int, list[int]] = {width: [] for width in WIDTHS}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for width in order.sample(list(WIDTHS), len(WIDTHS)):
            run = runs[width]
            run()
            samples = []
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                run()
                samples.append(time.perf_counter_ns() - start)
            best[width].append(min(samples))
    return {width: statistics.median(times) / 1e6 for width, times in best.items()}


def efficiencies(operator: str, times: dict[int, float]) -> dict[int, float]:
    rates = {width: macs(operator, width) / ms for width, ms in times.items()}
    return {c: rates[c] / max(rates[w] for w in rates if 8 <= w <= c) for c in rates if c >= 16}


def judge(operator: str, times: dict[int, float]) -> tuple[int, dict[int, float]]:
    """Return the multiple found and mean(m) for each m."""
    efficiency = efficiencies(operator, times)
    means = {m: statistics.geometric_mean([value for c, value in efficiency.items() if c % m == 0]) for m in MULTIPLES}
    return min(m for m in MULTIPLES if means[m] >= max(means.values()) * (1 - TOLERANCE)), means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    results = {}
    print("operator/type    found   mean efficiency of the multiples of  " + "  ".join(f"{m:>4}" for m in MULTIPLES))
    for operator in OPERATORS:
        for data_type in DATA_TYPES:
            times = sweep(operator, data_type)
            found, means = judge(operator, times)
            results[f"{operator}/{data_type}"] = {
                "milliseconds": {str(c): round(ms, 5) for c, ms in times.items()},
                "mean_efficiency": {str(m): round(value, 3) for m, value in means.items()},
                "multiple": found,
            }
            row = "  ".join(f"{means[m]:.2f}" for m in MULTIPLES)
            print(f"{operator + '/' + data_type:16} {found:>4}   {'':36} {row}", flush=True)
    if out is not None:
        machine = {k: v for k, v in worker.describe_machine().items() if k not in ("host", "flags")}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"schema_version": 1, "machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
