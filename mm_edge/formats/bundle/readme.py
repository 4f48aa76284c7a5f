"""The README of the bundle, in the words of somebody who gets the folder and does not know mm-edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WHAT = {
    "manifest.json": "what the model is: hashes of all files, figures with intervals, where the weights came from",
    "preprocess.json": "how a photo becomes an input",
    "labels.txt": "the names of the classes, one a line, the first for output 0",
    "verify.npz": "inputs with what the model answers to them, for verify.py",
    "run.py": "answers one photo",
    "verify.py": "checks the model on the device and times it",
}


def write_readme(manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return README.md of the bundle that `manifest` describes and that holds files with these names."""
    sections = [
        f"# {_text(manifest['name'])}, pruned for {_text(manifest['target'])}",
        f"This folder holds a pruned network for ONNX Runtime and all that is needed to use it. The network is "
        f"`{_code(manifest['candidate'])}` of a run of mm-edge.",
        "## Use it",
        "It takes Python 3.8 or newer with three packages:",
        "    pip install numpy onnxruntime pillow",
        "One photo in, the answer in words out:",
        "    python run.py PHOTO.jpg",
        "For a detector, `--boxes OUT.jpg` writes the photo with its boxes. To check on the device that the model "
        "answers as it did when it was made, and how fast it is there:",
        "    python verify.py",
        "## What it brings and costs",
        _figures(manifest),
        _assumed(manifest["assumed"]),
        "## Use it in another program",
        _input(manifest),
        "## Files",
        "\n".join(f"- `{_code(name)}`: {_what(name)}" for name in sorted({*names, "manifest.json"})),
        "## Licence",
        _licence(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _licence(manifest: Mapping[str, Any]) -> str:
    said = manifest["weights_licence"]
    if said is None:
        known = "The licence of the weights is not known to mm-edge; it is"
    else:
        known = f"The network names `{_code(said)}` as the licence of its weights. Theirs here is"
    return f"{known} that of the network they were made from ({_source(manifest)})."


def _figures(manifest: Mapping[str, Any]) -> str:
    numbers, dense = manifest["numbers"], manifest["dense"]
    latency = numbers["latency_ms"]
    lines = [
        f"- speed-up: {_number(numbers['speedup'], '.2f', 'x')}{_between(numbers['speedup_ci'], '.2f')}",
        f"- time of one input on {_text(manifest['target'])}: median {_number(latency['p50'], '.3g', ' ms')}, "
        f"the dense network {_number(dense['latency_ms']['p50'], '.3g', ' ms')}",
        f"- file: {_number(numbers['file_bytes'], 'd', ' bytes')}, the dense network "
        f"{_number(dense['file_bytes'], 'd', ' bytes')}",
        f"- top-1 on validation images: {_share(numbers['accuracy_top1'])}, the dense network "
        f"{_share(dense['accuracy_top1'])}",
        f"- top-1 on test images: {_share(numbers['accuracy_top1_test'])}",
        f"- same answer as the dense network: {_share(numbers['agreement_top1'])} of validation images",
    ]
    metric = numbers.get("metric")
    if metric:
        lines.append(f"- {_text(metric['name'])}: {metric['value']:.4g}")
    return "\n".join(lines) + f"\n\nIt was chosen because: {_text(manifest['reason'])}."


def _assumed(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"**Assumed.** Nobody stated {', '.join(names)} of the input, so mm-edge assumed them. If they are wrong, "
        "every answer is wrong: compare preprocess.json with how the network was trained."
    )


def _input(manifest: Mapping[str, Any]) -> str:
    inputs, outputs = (
        "; ".join(f"`{_code(item['name'])}` {item['shape']} {item['type']}" for item in manifest["model"][side])
        for side in ("inputs", "outputs")
    )
    return (
        f"Load `{_code(manifest['model']['file'])}` with ONNX Runtime. Inputs: {inputs}. Outputs: {outputs}. "
        "preprocess.json says how pixels become the input: resize, put the colours in order, then "
        "(pixel * scale - mean) / std, in the layout named there. `run.py` does this in a page of Python. The same "
        "facts stand in the model's own metadata under `mm_edge.input`, `mm_edge.labels` and `mm_edge.provenance`."
    )


def _what(name: str) -> str:
    if name in _WHAT:
        return _WHAT[name]
    kinds = {
        ".onnx": "the model",
        ".data": "its weights",
        ".ort": "the model in ONNX Runtime's own format",
        ".md": "this page",
        ".config": "the operators it uses, for a reduced build of ONNX Runtime",
    }
    if name.endswith("-raw-images.onnx"):
        return "the model with its preprocessing inside: takes uint8 photos (H, W, C) of any size"
    return next((what for end, what in kinds.items() if name.endswith(end)), "written for the device")


def _source(manifest: Mapping[str, Any]) -> str:
    return _text(manifest["provenance"].get("model", {}).get("source", "unknown"))


def _number(value: float | None, form: str, unit: str) -> str:
    return "not measured" if value is None else f"{value:{form}}{unit}"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _between(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" (95 % interval {interval[0]:{form}} to {interval[1]:{form}})"


def _text(value: Any) -> str:
    """Return text of a file or a device on one line, with what Markdown and HTML could read escaped."""
    text = " ".join(str(value).split())
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def _code(value: Any) -> str:
    return " ".join(str(value).split()).replace("`", "'")
