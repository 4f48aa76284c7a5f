"""Loads a model from whatever the user has, as a float32 module in evaluation mode with its input specification.

Shape and preprocessing of the input are taken from the first of these that states them: the user's option, the file,
timm's configuration of the architecture, ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import nn

from mm_edge.errors import ModelError, reading
from mm_edge.load.arguments import check_name, check_sizes
from mm_edge.load.exported import read_exported
from mm_edge.load.matching import precision_warnings
from mm_edge.load.network import (
    BuiltNetwork,
    ImageShape,
    LoadOptions,
    ModelInput,
    TimmBuild,
    count_classes,
    first_output,
    output_shape,
    parse_shape,
    timm_config,
)
from mm_edge.load.onnx_file import read_onnx
from mm_edge.load.preprocessing import read_preprocessing
from mm_edge.load.timm_models import base_name, build_from_registry, build_from_tensors, known_timm_name
from mm_edge.load.user_code import USER_CODE, build_user_module
from mm_edge.load.weights import WeightsFile, check_file, check_finite, read_weights, zip_members
from mm_edge.records import InputSpec, ModelInfo
from mm_edge.store import hash_file

__all__ = ["LoadOptions", "LoadedModel", "ModelInput", "load_model", "wrap_module"]

# What the input of a module is called in messages; the export names it after the argument of `forward`.
IMAGES = "images"
LONGEST_LICENCE = 200


@dataclass(frozen=True)
class LoadedModel:
    """A model as the later stages use it.

    Attributes:
        module: the network, float32, in evaluation mode, never run; None for an .onnx.
        onnx_path: the .onnx given; None otherwise.
        input: shape and preprocessing of its input.
        info: the report's `model` section, `macs` not yet counted.
        family: class of the network ("ResNet", "VGG", "LevitDistilled"); "onnx" for an .onnx.
        labels: class names where the file knows them, else ().
        warnings: sentences for the user.
        build: name and arguments of the timm network it was built as, to build it again; None for any other.
        inputs: its inputs in the graph's order, batch included.
    """

    module: nn.Module | None
    onnx_path: Path | None
    input: InputSpec
    info: ModelInfo
    family: str
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    build: TimmBuild | None = None
    inputs: tuple[ModelInput, ...] = ()

    @property
    def open_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each input is measured at, where the model leaves sizes open; else empty."""
        if not any(None in item.shape for item in self.inputs):
            return {}
        return {item.name: item.measured for item in self.inputs}


def load_model(source: str, options: LoadOptions) -> LoadedModel:
    """Load a path or timm:NAME; the network is never downloaded and no code of a file is run unasked.

    `source` is timm:NAME, a timm or other checkpoint, a state_dict or .safetensors (with `options.arch` where the file
    does not name its architecture), a Hugging Face timm folder, a .pt2, an .onnx, or, trusted, a pickled module.

    Raises:
        ModelError: the model cannot be used as given; the message says what to do.
    """
    if source.startswith("timm:"):
        return _finish(build_from_registry(source.removeprefix("timm:"), options), options)
    with reading(f"'{source}'", ModelError):
        return _load_file(source, options)


def _load_file(source: str, options: LoadOptions) -> LoadedModel:
    path = Path(source)
    if not path.exists() and timm.is_model(base_name(source)):
        raise ModelError(f"model '{source}' does not exist; for timm's network of that name give timm:{source}")
    if not path.is_dir():
        check_file(path)  # before anything opens what may be no plain file
    if path.suffix == ".onnx":
        if options.arch is not None:
            raise ModelError(f"--arch is for weights, and '{path}' holds its own network; leave it out")
        return _load_onnx(path, options)
    if path.suffix == ".pt2" or any(name.endswith("archive_format") for name in zip_members(path)):
        return _load_exported(path, options)
    content = read_weights(path, options.trust_pickle)
    if isinstance(content, nn.Module):
        network = BuiltNetwork(content, path.stem, f"pickled module {path.name}", timm_config(content), path=path)
        return _finish(network, options)
    return _finish(_build_from_weights(content, options), options)


def wrap_module(
    module: nn.Module,
    *examples: torch.Tensor,
    name: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    photos: LoadOptions | None = None,
) -> LoadedModel:
    """Wrap a user's module, copied so that theirs stays as it is.

    `examples` are one for each input, at least one of them images (N, C, H, W). `photos` says how else a photo becomes
    an input.

    Raises:
        ModelError: no input is a batch of images, or the module does not accept them or holds NaN.
    """
    images = next((example for example in examples if example.dim() == 4), None)
    if images is None:
        shapes = ", ".join(str(tuple(example.shape)) for example in examples)
        raise ModelError(f"example_input has shape {shapes}; give a batch of images (N, C, H, W)")
    channels, height, width = (int(size) for size in images.shape[1:])
    arguments = list(inspect.signature(module.forward).parameters)
    options = replace(
        photos or LoadOptions(),
        input_size=(channels, height, width),
        inputs=_named_shapes(arguments, examples) if len(examples) > 1 else (),
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
    )
    return _finish(BuiltNetwork(copy.deepcopy(module).cpu(), name, "Python module", timm_config(module)), options)


def _named_shapes(
    arguments: Sequence[str], examples: Sequence[torch.Tensor]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the shape of each example, batch of one, by the argument of `forward` it is given to."""
    return tuple((name, (1, *example.shape[1:])) for name, example in zip(arguments, examples, strict=False))


def _build_from_weights(content: WeightsFile, options: LoadOptions) -> BuiltNetwork:
    check_name(content.path, content.arch)
    check_sizes(content.path, content.config)
    arch = options.arch or content.arch
    if arch is None:
        raise ModelError(
            f"'{content.path}' does not name its architecture; add --arch NAME (a timm name) or --arch FILE.py:CALLABLE"
        )
    check_finite(content.tensors, str(content.path))
    if USER_CODE.match(arch):
        if options.arch is None:  # only the user may name code to run, never a file
            raise ModelError(f"'{content.path}' names the code {arch}; to run it pass --arch {arch}")
        module = build_user_module(arch, content)
        network = BuiltNetwork(module, Path(content.path).stem, f"{content.kind} {content.path.name}", content.config)
    else:
        network = build_from_tensors(known_timm_name(arch), content, options)
    return replace(
        network,
        path=content.path,
        labels=content.labels,
        warnings=network.warnings + precision_warnings(content.tensors.values(), content.path.name),
    )


def _load_exported(path: Path, options: LoadOptions) -> LoadedModel:
    module, example = read_exported(path, options.trust_pickle)
    config = {"input_size": example[1:]} if example is not None and len(example) == 4 else {}
    network = BuiltNetwork(module, path.stem, f"exported program {path.name}", config, path=path)
    warnings: tuple[str, ...] = ()
    loaded = _finish(network, options, family="ExportedProgram")
    try:
        output_shape(module, (2, *loaded.input.shape))
    except ModelError:
        warnings = (f"{path.name} was exported for a batch of 1; it is fed one image at a time",)
    return replace(loaded, warnings=loaded.warnings + warnings)


def _load_onnx(path: Path, options: LoadOptions) -> LoadedModel:
    file = read_onnx(path, options)
    main = next((item for item in file.inputs if item.is_image), file.inputs[0])
    layout = "NHWC" if main.channels_last else "NCHW"
    spec, warnings = read_preprocessing(main.image_shape, options, file.config, {}, layout)
    info = ModelInfo(
        name=path.stem,
        source=f"ONNX file {path.name}",
        sha256=hash_file(path),
        params=file.params,
        macs=None,
        input_shape=spec.shape,
        num_classes=file.num_classes,
    )
    warnings = file.warnings + (warnings if main.is_image else ())
    return LoadedModel(None, path, spec, info, "onnx", (), warnings, inputs=file.inputs)


def _finish(network: BuiltNetwork, options: LoadOptions, family: str | None = None) -> LoadedModel:
    if options.layout not in (None, "NCHW"):
        raise ModelError(f"--layout {options.layout} is for an .onnx; a PyTorch module takes images (N, C, H, W)")
    module = network.module
    label = str(network.path or network.name)
    parameters = list(module.parameters())
    warnings = network.warnings + precision_warnings(parameters, label)
    check_finite(dict(module.state_dict()), label)
    if family is None:  # an exported program has its precision and mode built in
        module = module.float().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    shape = _resolve_shape(network, options)
    spec, spec_warnings = read_preprocessing(shape, options, network.config, timm_config(module))
    # Run on a copy: some networks keep tensors they computed, which a later export would take for constants. An
    # exported program keeps none, and a copy of it loses its shape checks.
    inputs = _inputs_of(module, shape, options)
    shapes = [item.measured for item in inputs]
    output = first_output(copy.deepcopy(module) if family is None else module, *shapes)
    classes = count_classes(output)
    if output.ndim != 2:
        found = tuple(output.shape)
        warnings += (f"the first output has shape {found}, not (batch, classes): no accuracy can be measured",)
    info = ModelInfo(
        name=network.name,
        source=network.source,
        sha256=hash_file(network.path) if network.path is not None else None,
        params=sum(parameter.numel() for parameter in parameters),
        macs=None,
        input_shape=shape,
        num_classes=classes,
        licence=_licence_of(network),
    )
    kind = family or type(module).__name__
    return LoadedModel(module, None, spec, info, kind, network.labels, warnings + spec_warnings, network.build, inputs)


def _licence_of(network: BuiltNetwork) -> str | None:
    """Return what the file says of the licence of its weights, in at most LONGEST_LICENCE characters."""
    found = network.config.get("license")
    return found[:LONGEST_LICENCE] if isinstance(found, str) and found else None


def _inputs_of(module: nn.Module, shape: ImageShape, options: LoadOptions) -> tuple[ModelInput, ...]:
    """Return the inputs of a module: one of images, or those that --input names, in the order of its arguments.

    Raises:
        ModelError: a name is no argument of the module's `forward`.
    """
    if len(options.inputs) < 2:
        return (ModelInput(IMAGES, (1, *shape), (1, *shape), (1, *shape)),)
    arguments = list(inspect.signature(module.forward).parameters)
    given = dict(options.inputs)
    unknown = [name for name in given if name not in arguments]
    if unknown:
        raise ModelError(f"--input {unknown[0]} is no input of the network; it takes {', '.join(arguments)}")
    ordered = sorted(given, key=arguments.index)
    return tuple(ModelInput(name, given[name], given[name], given[name]) for name in ordered)


def _resolve_shape(network: BuiltNetwork, options: LoadOptions) -> ImageShape:
    own_config = timm_config(network.module)
    side = network.config.get("img_size") or network.side
    images = next((size[1:] for _, size in options.inputs if len(size) == 4), None)
    shape = options.input_size or parse_shape(images) or parse_shape(network.config.get("input_size"))
    if shape is None and isinstance(side, int):
        shape = (network.channels or 3, side, side)
    shape = shape or parse_shape(own_config.get("input_size"))
    if shape is None:
        raise ModelError(f"the input size of {network.name} is not known; add --input-size C,H,W")
    if network.channels is None or network.channels == shape[0]:
        return shape
    if options.input_size is not None:
        raise ModelError(f"--input-size has {shape[0]} channels; the weights take {network.channels}")
    return (network.channels, *shape[1:])
