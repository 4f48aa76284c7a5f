"""Loads a model from whatever the user has, as a float32 module in evaluation mode with its input specification.

What the input looks like is taken from the first of these that says it: the user's option, the file, timm's
configuration of the architecture, ImageNet's mean and standard deviation. The number of classes and input channels,
and for networks with a fixed input size that size, are read off the tensors.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from mm_edge.errors import ModelError, first_line, nearest, unknown_name
from mm_edge.load.exported import read_exported
from mm_edge.load.onnx_file import OnnxFile, read_onnx
from mm_edge.load.weights import (
    WeightsFile,
    check_finite,
    quiet_timm,
    read_weights,
    strip_prefixes,
    zip_members,
)
from mm_edge.records import InputSpec, ModelInfo
from mm_edge.store import hash_file

_USER_CODE = re.compile(r"(?P<file>.+\.py):(?P<callable>[A-Za-z_][\w.]*)$")
# Input sides tried, in this order, where only the tensors tell what a network with a fixed input size was made for.
_COMMON_SIDES = (224, 384, 256, 32, 64, 96, 128, 112, 160, 192, 240, 288, 320, 448, 512, 28, 48)
# Networks tried on the meta device when an architecture does not fit, the nearest names first: ten seconds at most.
_SEARCHED_NETWORKS = 150
_INIT_SEED = 0

Shape = tuple[int, int, int]
# Name of a tensor, its shape in the file and its shape in the model; None where it is absent.
Misfit = tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]


@dataclass(frozen=True)
class LoadOptions:
    """What the user says about the model beyond its path; None where nothing was said."""

    arch: str | None = None
    input_size: Shape | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trust_pickle: bool = False


@dataclass(frozen=True)
class TimmBuild:
    """What `timm.create_model` was called with."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the stages that follow.

    Attributes:
        module: the network, float32, in evaluation mode, never run; None for an .onnx.
        onnx_path: the .onnx given; None otherwise.
        input: shape and preprocessing of its input.
        info: the report's `model` section, `macs` not yet counted.
        family: class of the network ("ResNet", "VGG", "LevitDistilled"); "onnx" for an .onnx.
        labels: class names where the file knows them, else ().
        warnings: sentences for the user.
        build: name and arguments of the timm network it was built as, to build it again; None for any other.
    """

    module: nn.Module | None
    onnx_path: Path | None
    input: InputSpec
    info: ModelInfo
    family: str
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    build: TimmBuild | None = None


@dataclass(frozen=True)
class _Network:
    """A built network with what is known about it, on the way to a LoadedModel."""

    module: nn.Module
    name: str
    source: str
    config: Mapping[str, Any]
    channels: int | None = None
    side: int | None = None
    path: Path | None = None
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    build: TimmBuild | None = None


def load_model(source: str, options: LoadOptions) -> LoadedModel:
    """Load a path or timm:NAME; the network is never downloaded and no code of a file is run unasked.

    `source` is timm:NAME, a timm or other checkpoint, a state_dict or .safetensors (with `options.arch` where the file
    does not name its architecture), a Hugging Face timm folder, a .pt2, an .onnx, or, trusted, a pickled module.

    Raises:
        ModelError: the model cannot be used as given; the message says what to do.
    """
    if source.startswith("timm:"):
        return _finish(_build_from_registry(source.removeprefix("timm:"), options), options)
    path = Path(source)
    if not path.exists() and timm.is_model(_base_name(source)):
        raise ModelError(f"model '{source}' does not exist; for timm's network of that name give timm:{source}")
    if path.suffix == ".onnx":
        return _load_onnx(path, options)
    if path.suffix == ".pt2" or any(name.endswith("archive_format") for name in zip_members(path)):
        return _load_exported(path, options)
    content = read_weights(path, options.trust_pickle)
    if isinstance(content, nn.Module):
        network = _Network(content, path.stem, f"pickled module {path.name}", _config_of(content), path=path)
        return _finish(network, options)
    return _finish(_build_from_weights(content, options), options)


def wrap_module(
    module: nn.Module,
    example_input: torch.Tensor,
    *,
    name: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Wrap a user's module, copied so that theirs stays as it is. `example_input` is (N, C, H, W).

    Raises:
        ModelError: the input is not a batch of images, or the module does not accept it or holds NaN.
    """
    if example_input.dim() != 4:
        raise ModelError(f"example_input has shape {tuple(example_input.shape)}; give a batch of images (N, C, H, W)")
    channels, height, width = (int(size) for size in example_input.shape[1:])
    options = LoadOptions(
        input_size=(channels, height, width),
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
    )
    return _finish(_Network(copy.deepcopy(module).cpu(), name, "Python module", _config_of(module)), options)


# ---- networks from weights and an architecture


def _build_from_weights(content: WeightsFile, options: LoadOptions) -> _Network:
    arch = options.arch or content.arch
    if arch is None:
        raise ModelError(
            f"'{content.path}' does not name its architecture; add --arch NAME (a timm name) or --arch FILE.py:CALLABLE"
        )
    check_finite(content.tensors, str(content.path))
    if _USER_CODE.match(arch):
        if options.arch is None:  # only the user may name code to run, never a file
            raise ModelError(f"'{content.path}' names the code {arch}; to run it pass --arch {arch}")
        module = _build_user_module(arch, content)
        network = _Network(module, Path(content.path).stem, f"{content.kind} {content.path.name}", content.config)
    else:
        network = _build_timm_module(_known_timm_name(arch), content, options)
    return replace(
        network,
        path=content.path,
        labels=content.labels,
        warnings=network.warnings + _precision_warnings(content.tensors.values(), content.path.name),
    )


def _build_timm_module(arch: str, content: WeightsFile, options: LoadOptions) -> _Network:
    arguments = _plain_arguments(content.config.get("model_args"))
    blank = create_timm(arch, meta=True, **arguments)
    tensors, warnings = _match_names(strip_prefixes(content.tensors, set(blank.state_dict())), blank)
    arguments |= _infer_ends(tensors, blank)
    arguments |= _asked_size(content.config, options, _config_of(blank))
    misfits = find_misfits(tensors, create_timm(arch, meta=True, **arguments).state_dict())
    side = None
    if misfits and "img_size" not in arguments and _config_of(blank).get("fixed_input_size"):
        side = _infer_side(arch, arguments, tensors)
    if side is not None:
        arguments["img_size"] = side
        warnings += (f"input side {side} inferred from the tensors; --input-size says otherwise",)
    elif misfits:
        raise _wrong_arch(content.path, arch, misfits, tensors)
    module = create_timm(arch, meta=False, **arguments)
    _fill_(module, tensors)
    source = f"{content.kind} {content.path.name}"
    build = TimmBuild(arch, arguments)
    channels = arguments.get("in_chans")
    return _Network(module, arch, source, content.config, channels, side, warnings=warnings, build=build)


def _asked_size(config: Mapping[str, Any], options: LoadOptions, timm_config: Mapping[str, Any]) -> dict[str, Any]:
    """The img_size argument for a network with a fixed input size, where one unlike its own is asked for."""
    usual = _shape(timm_config.get("input_size")) or (3, 0, 0)
    shape = options.input_size or _shape(config.get("input_size"))
    side = config.get("img_size")
    size = shape[1:] if shape is not None else (side, side) if isinstance(side, int) else usual[1:]
    return {"img_size": size} if timm_config.get("fixed_input_size") and size != usual[1:] else {}


def _infer_side(arch: str, arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The first common input side at which the network has the file's tensors, None if there is none."""
    for side in _COMMON_SIDES:
        try:
            blank = create_timm(arch, meta=True, **{**arguments, "img_size": side})
        except ModelError:  # the architecture takes no img_size, or not this one
            continue
        if not find_misfits(tensors, blank.state_dict()):
            return side
    return None


def _build_from_registry(name: str, options: LoadOptions) -> _Network:
    name = _known_timm_name(name)
    blank = create_timm(name, meta=True)
    config = _config_of(blank)
    arguments: dict[str, Any] = {}
    size = options.input_size
    if size is not None:
        usual = _shape(config.get("input_size")) or (3, 0, 0)
        if size[0] != usual[0]:
            arguments["in_chans"] = size[0]
        if config.get("fixed_input_size") and size[1:] != usual[1:]:
            arguments["img_size"] = size[1:]
    cached = _cached_weights(config)
    build = TimmBuild(name, arguments)
    channels = size[0] if size is not None else None
    if cached is None:
        module = create_timm(name, meta=False, **arguments)
        warning = f"no weights of {name} on this machine (none are downloaded): random initialisation, no accuracy"
        return _Network(module, name, "timm, random initialisation", {}, channels, warnings=(warning,), build=build)
    module = create_timm(name, meta=False, pretrained=True, pretrained_cfg_overlay={"file": str(cached)}, **arguments)
    return _Network(module, name, "timm, weights from the local cache", {}, channels, path=cached, build=build)


def _cached_weights(config: Mapping[str, Any]) -> Path | None:
    """The file of a network's published weights where an earlier download left one."""
    import huggingface_hub

    repository = config.get("hf_hub_id")
    if repository:
        for filename in ("model.safetensors", "pytorch_model.bin"):
            found = huggingface_hub.try_to_load_from_cache(str(repository), filename)
            if isinstance(found, str):
                return Path(found)
    url = config.get("url")
    if url:
        file = Path(torch.hub.get_dir()) / "checkpoints" / str(url).rpartition("/")[2]
        if file.is_file():
            return file
    return None


def _base_name(name: str) -> str:
    return name.partition(".")[0]


def _known_timm_name(name: str) -> str:
    if timm.is_model(_base_name(name)):
        return name
    models = timm.list_models()
    if not nearest(name, models):
        raise ModelError(f"unknown timm model '{name}'; python -c 'import timm; print(timm.list_models())' lists them")
    raise ModelError(unknown_name("timm model", name, models))


def create_timm(name: str, *, meta: bool, **arguments: Any) -> nn.Module:
    """Build a timm network, without memory for its weights when `meta`, else initialised from a fixed seed."""
    try:
        with quiet_timm(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_INIT_SEED)
            if meta:
                with torch.device("meta"):
                    return _as_module(timm.create_model(name, **arguments))
            return _as_module(timm.create_model(name, **arguments))
    except Exception as error:  # each architecture checks its arguments in its own way
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
        raise ModelError(f"timm cannot build {name} with {given}: {first_line(error)}") from error


def _as_module(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"got a {type(value).__name__}, not a torch.nn.Module")
    return value


def _config_of(module: nn.Module) -> dict[str, Any]:
    """timm's configuration of a network, {} for one that is not timm's."""
    config = getattr(module, "pretrained_cfg", None)
    return dict(config) if isinstance(config, Mapping) else {}


def _plain_arguments(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _match_names(tensors: dict[str, torch.Tensor], blank: nn.Module) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Translate another publisher's parameter names with timm's own converter where that makes them fit."""
    expected = _names(blank.state_dict())
    converter = getattr(inspect.getmodule(type(blank)), "checkpoint_filter_fn", None)
    if converter is None or _names(tensors) == expected:
        return tensors, ()
    try:
        converted = converter(dict(tensors), blank)
    except Exception:  # a converter expects its own publisher's names
        return tensors, ()
    if _names(converted) != expected or any(tensor.is_meta for tensor in converted.values()):
        return tensors, ()
    return dict(converted), ("parameter names converted by timm from another publisher's",)


def _names(state: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name in state if not name.endswith("num_batches_tracked")}


def _infer_ends(tensors: Mapping[str, torch.Tensor], blank: nn.Module) -> dict[str, Any]:
    """The number of classes and input channels the tensors have, where they differ from the default network's."""
    state = blank.state_dict()
    arguments: dict[str, Any] = {}
    for weight in _end_weights(blank, "classifier"):
        if weight in tensors and weight in state and tensors[weight].shape[:1] != state[weight].shape[:1]:
            arguments["num_classes"] = int(tensors[weight].shape[0])
    for weight in _end_weights(blank, "first_conv"):
        if weight in tensors and weight in state and tensors[weight].dim() > 1:
            ratio = tensors[weight].shape[1] / state[weight].shape[1]
            channels = round(ratio * (_shape(_config_of(blank).get("input_size")) or (3, 0, 0))[0])
            if ratio != 1 and channels > 0:
                arguments["in_chans"] = channels
    return arguments


def _end_weights(blank: nn.Module, end: str) -> list[str]:
    names = _config_of(blank).get(end)
    names = (names,) if isinstance(names, str) else names or ()
    return [f"{name}.weight" for name in names]


def find_misfits(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[Misfit]:
    """Every tensor that differs between file and model, in the model's order, then what is in the file alone."""
    found: list[Misfit] = []
    for name, expected in state.items():
        if name not in tensors:
            if not name.endswith("num_batches_tracked"):
                found.append((name, None, tuple(expected.shape)))
        elif tensors[name].shape != expected.shape:
            found.append((name, tuple(tensors[name].shape), tuple(expected.shape)))
    found.extend((name, tuple(tensor.shape), None) for name, tensor in tensors.items() if name not in state)
    return found


def _wrong_arch(path: Path, arch: str, misfits: list[Misfit], tensors: Mapping[str, torch.Tensor]) -> ModelError:
    fitting = _fitting_names(arch, tensors)
    close = [name for name in nearest(arch, timm.list_models(), 4) if name != arch][:3]
    advice = f"it fits --arch {' or '.join(fitting)}" if fitting else f"nearest timm names: {', '.join(close)}"
    return ModelError(f"'{path}' does not fit {arch}: {_describe_misfits(misfits)}; {advice}")


def _describe_misfits(misfits: list[Misfit]) -> str:
    parts = []
    for name, in_file, in_model in misfits[:3]:
        if in_file is None:
            parts.append(f"{name} {in_model} is missing from the file")
        elif in_model is None:
            parts.append(f"{name} {in_file} is in the file alone")
        else:
            parts.append(f"{name} is {in_file} in the file and {in_model} in the model")
    more = [f"and {len(misfits) - 3} more"] if len(misfits) > 3 else []
    return "; ".join(parts + more)


def _fitting_names(arch: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Up to three timm networks like `arch` whose tensors are those of the file, first and last layer aside."""
    family = timm.list_models(module=timm.models.model_entrypoint(_base_name(arch)).__module__.rpartition(".")[2])
    candidates = dict.fromkeys([*nearest(arch, timm.list_models(), 8), *nearest(arch, family, len(family) or 1)])
    fitting: list[str] = []
    for name in list(candidates)[:_SEARCHED_NETWORKS]:
        if len(fitting) == 3:
            break
        try:
            blank = create_timm(name, meta=True)
        except ModelError:
            continue
        ends = {*_end_weights(blank, "classifier"), *_end_weights(blank, "first_conv")}
        ends |= {end.removesuffix("weight") + "bias" for end in ends}
        if all(name in ends and a and b for name, a, b in find_misfits(tensors, blank.state_dict())):
            fitting.append(name)
    return fitting


def _fill_(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    module.load_state_dict(dict(tensors), strict=False)


def _precision_warnings(tensors: Iterable[torch.Tensor], name: str) -> tuple[str, ...]:
    narrow = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"})
    return (f"{name} holds {' and '.join(narrow)} weights; converted to float32",) if narrow else ()


# ---- a user's own code


def _build_user_module(arch: str, content: WeightsFile) -> nn.Module:
    builder = _import_callable(arch)
    module = _call_builder(arch, builder, {})
    tensors = strip_prefixes(content.tensors, set(module.state_dict()))
    misfits = find_misfits(tensors, module.state_dict())
    classes = _classes_by_shape(misfits)
    if classes is not None and "num_classes" in inspect.signature(builder).parameters:
        module = _call_builder(arch, builder, {"num_classes": classes})
        misfits = find_misfits(tensors, module.state_dict())
    if misfits:
        raise ModelError(f"'{content.path}' does not fit {arch}: {_describe_misfits(misfits)}")
    module = module.float()
    _fill_(module, tensors)
    return module


def _classes_by_shape(misfits: list[Misfit]) -> int | None:
    """The first dimension all misfits have in the file, where it is all that differs."""
    sizes = {a[0] for _, a, b in misfits if a and b and a[1:] == b[1:]}
    return sizes.pop() if len(sizes) == 1 else None


def _import_callable(arch: str) -> Any:
    match = _USER_CODE.match(arch)
    assert match is not None  # callers have matched it
    file, name = Path(match["file"]), match["callable"]
    if not file.is_file():
        raise ModelError(f"--arch {arch}: the file '{file}' does not exist")
    spec = importlib.util.spec_from_file_location(f"mm_edge_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ModelError(f"--arch {arch}: '{file}' is not a Python file")
    namespace = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"--arch {arch}: importing '{file}' failed: {first_line(error)}") from error
    value: Any = namespace
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        own = [key for key, item in vars(namespace).items() if callable(item) and not key.startswith("_")]
        raise ModelError(f"--arch {arch}: {unknown_name('callable', name, own)}")
    return value


def _call_builder(arch: str, builder: Any, arguments: dict[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_INIT_SEED)
            return _as_module(builder(**arguments))
    except Exception as error:  # the user's code may raise anything
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelError(f"--arch {arch}: calling it with ({given}) failed: {first_line(error)}") from error


# ---- other formats


def _load_exported(path: Path, options: LoadOptions) -> LoadedModel:
    module, example = read_exported(path, options.trust_pickle)
    config = {"input_size": example[1:]} if example is not None and len(example) == 4 else {}
    network = _Network(module, path.stem, f"exported program {path.name}", config, path=path)
    warnings: tuple[str, ...] = ()
    loaded = _finish(network, options, family="ExportedProgram")
    try:
        output_shape(module, (2, *loaded.input.shape))
    except ModelError:
        warnings = (f"{path.name} was exported for a batch of 1; it is fed one image at a time",)
    return replace(loaded, warnings=loaded.warnings + warnings)


def _load_onnx(path: Path, options: LoadOptions) -> LoadedModel:
    file = read_onnx(path)
    shape = _onnx_shape(file, options)
    spec, warnings = _preprocessing(shape, options, file.config, {})
    info = ModelInfo(
        name=path.stem,
        source=f"ONNX file {path.name}",
        sha256=hash_file(path),
        params=file.params,
        macs=None,
        input_shape=shape,
        num_classes=file.num_classes,
    )
    return LoadedModel(None, path, spec, info, "onnx", (), warnings)


def _onnx_shape(file: OnnxFile, options: LoadOptions) -> Shape:
    asked: Sequence[int | None] = options.input_size or (None, None, None)
    shape = tuple(own if own is not None else wanted for own, wanted in zip(file.input_shape, asked, strict=True))
    if None in shape:
        raise ModelError(f"'{file.path}' leaves its input size open {file.input_shape}; add --input-size C,H,W")
    if options.input_size is not None and shape != options.input_size:
        raise ModelError(f"--input-size {options.input_size} is not the input of '{file.path}', {file.input_shape}")
    return _shape(shape) or (0, 0, 0)


# ---- from a network to a LoadedModel


def _finish(network: _Network, options: LoadOptions, family: str | None = None) -> LoadedModel:
    module = network.module
    label = str(network.path or network.name)
    parameters = list(module.parameters())
    warnings = network.warnings + _precision_warnings(parameters, label)
    check_finite(dict(module.state_dict()), label)
    if family is None:  # an exported program has its precision and mode built in
        module = module.float().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    shape = _resolve_shape(network, options)
    spec, spec_warnings = _preprocessing(shape, options, network.config, _config_of(module))
    # Run on a copy: some networks keep tensors they computed, which a later export would take for constants. An
    # exported program keeps none, and a copy of it loses its shape checks.
    output = output_shape(copy.deepcopy(module) if family is None else module, (1, *shape))
    if len(output) != 2:
        warnings += (f"the first output has shape {output}, not (batch, classes): no accuracy can be measured",)
    info = ModelInfo(
        name=network.name,
        source=network.source,
        sha256=hash_file(network.path) if network.path is not None else None,
        params=sum(parameter.numel() for parameter in parameters),
        macs=None,
        input_shape=shape,
        num_classes=output[1] if len(output) == 2 else None,
    )
    kind = family or type(module).__name__
    return LoadedModel(module, None, spec, info, kind, network.labels, warnings + spec_warnings, network.build)


def _resolve_shape(network: _Network, options: LoadOptions) -> Shape:
    timm_config = _config_of(network.module)
    side = network.config.get("img_size") or network.side
    shape = options.input_size or _shape(network.config.get("input_size"))
    if shape is None and isinstance(side, int):
        shape = (network.channels or 3, side, side)
    shape = shape or _shape(timm_config.get("input_size"))
    if shape is None:
        raise ModelError(f"the input size of {network.name} is not known; add --input-size C,H,W")
    if network.channels is None or network.channels == shape[0]:
        return shape
    if options.input_size is not None:
        raise ModelError(f"--input-size has {shape[0]} channels; the weights take {network.channels}")
    return (network.channels, *shape[1:])


def _preprocessing(
    shape: Shape, options: LoadOptions, config: Mapping[str, Any], timm_config: Mapping[str, Any]
) -> tuple[InputSpec, tuple[str, ...]]:
    channels = shape[0]
    mean, mean_warning = _per_channel("mean", channels, options.mean, config, timm_config, IMAGENET_DEFAULT_MEAN)
    std, std_warning = _per_channel("std", channels, options.std, config, timm_config, IMAGENET_DEFAULT_STD)
    if any(value <= 0 for value in std):
        raise ModelError(f"--std {std} must be above 0 in every channel")
    known = {**timm_config, **{key: value for key, value in config.items() if value is not None}}
    crop_pct, interpolation = known.get("crop_pct"), known.get("interpolation")
    warnings = tuple(dict.fromkeys(text for text in (mean_warning, std_warning) if text))
    if known.get("crop_mode") not in (None, "center"):
        warnings += (f"timm evaluates this network with crop mode {known['crop_mode']}; the centre crop is used",)
    spec = InputSpec(
        shape=shape,
        mean=mean,
        std=std,
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest", "lanczos") else "bicubic",
        crop_pct=float(crop_pct) if isinstance(crop_pct, (int, float)) and 0 < crop_pct <= 1 else 0.875,
    )
    return spec, warnings


def _per_channel(
    key: str,
    channels: int,
    option: tuple[float, ...] | None,
    config: Mapping[str, Any],
    timm_config: Mapping[str, Any],
    default: Sequence[float],
) -> tuple[tuple[float, ...], str | None]:
    """Resolve mean or std to one value per channel; the second part is a warning where it had to be assumed."""
    if option is not None:
        if len(option) not in (1, channels) or not all(map(math.isfinite, option)):
            raise ModelError(
                f"--{key} has {len(option)} values; the input has {channels} channels: give 1 or {channels}"
            )
        return tuple(float(value) for value in option) * (channels // len(option)), None
    stated = _numbers(config.get(key)) or _numbers(timm_config.get(key))
    warning = None if stated else "preprocessing unknown: ImageNet mean and std assumed; set --mean and --std"
    values = stated or tuple(default)
    if len(values) == channels:
        return values, warning
    average = sum(values) / len(values)
    text = f"mean and std are known for {len(values)} channels and the input has {channels}: their average is used"
    return (average,) * channels, warning or (None if len(values) == 1 else text)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value),)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
        return tuple(float(item) for item in value)
    return None


def _shape(value: Any) -> Shape | None:
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        return None
    return (value[0], value[1], value[2])


def output_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the first output for an input of `shape`."""
    try:
        with torch.no_grad(), quiet_timm():
            output = module(torch.zeros(shape))
    except Exception as error:  # the network's own code may raise anything
        raise ModelError(
            f"the network does not accept an input of shape {shape}: {first_line(error)}; set --input-size C,H,W"
        ) from error
    while isinstance(output, (tuple, list, Mapping)) and len(output):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"the network returns a {type(output).__name__}; it must return a tensor of class scores")
    return tuple(output.shape)
