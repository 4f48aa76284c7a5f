"""Builds timm networks: by name, or for the tensors of a file.

The number of classes and input channels, and for networks with a fixed input size that size, are read off the tensors.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mm_edge.errors import ModelError, first_line, nearest, unknown_name
from mm_edge.load.arguments import ARGUMENTS, read_arguments
from mm_edge.load.matching import Misfit, describe_misfits, fill_, find_misfits
from mm_edge.load.network import INIT_SEED, BuiltNetwork, LoadOptions, TimmBuild, as_module, parse_shape, timm_config
from mm_edge.load.weights import WeightsFile, quiet_timm, strip_prefixes

# Input sides tried, in this order, where only the tensors tell what a network with a fixed input size was made for.
_COMMON_SIDES = (224, 384, 256, 32, 64, 96, 128, 112, 160, 192, 240, 288, 320, 448, 512, 28, 48)
# Networks tried on the meta device when an architecture does not fit, the nearest names first: so many, and for so many
# seconds of processor time.
_SEARCHED_NETWORKS = 150
_SEARCH_S = 12.0


def build_from_tensors(arch: str, content: WeightsFile, options: LoadOptions) -> BuiltNetwork:
    """Build the timm network `arch` with the tensors of a file, sized to fit them.

    Raises:
        ModelError: the tensors are not those of the network; the message names networks they fit.
    """
    arguments = read_arguments(content.path, content.config)
    blank = create_timm(arch, meta=True, **arguments)
    tensors, warnings = _match_names(strip_prefixes(content.tensors, set(blank.state_dict())), blank)
    arguments |= _infer_ends(tensors, blank)
    arguments |= _asked_size(content.config, options, timm_config(blank))
    misfits = find_misfits(tensors, create_timm(arch, meta=True, **arguments).state_dict())
    side = None
    if misfits and "img_size" not in arguments and timm_config(blank).get("fixed_input_size"):
        side = _infer_side(arch, arguments, tensors)
    if side is not None:
        arguments["img_size"] = side
        warnings += (f"input side {side} inferred from the tensors; --input-size says otherwise",)
    elif misfits:
        raise _wrong_arch(content.path, arch, misfits, tensors, _names(blank.state_dict()))
    module = create_timm(arch, meta=False, **arguments)
    fill_(module, tensors)
    source = f"{content.kind} {content.path.name}"
    build = TimmBuild(arch, arguments)
    channels = arguments.get("in_chans")
    return BuiltNetwork(module, arch, source, content.config, channels, side, warnings=warnings, build=build)


def build_from_registry(name: str, options: LoadOptions) -> BuiltNetwork:
    """Build the timm network `name` with its published weights where they are in a local cache, else with random ones.

    Raises:
        ModelError: timm has no network of that name, or cannot build it for `options.input_size`.
    """
    name = known_timm_name(name)
    blank = create_timm(name, meta=True)
    config = timm_config(blank)
    arguments: dict[str, Any] = {}
    size = options.input_size
    if size is not None:
        usual = parse_shape(config.get("input_size")) or (3, 0, 0)
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
        return BuiltNetwork(module, name, "timm, random initialisation", {}, channels, warnings=(warning,), build=build)
    # The file comes from timm's own download and is named by timm's own configuration, never by a model file.
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(cached)}}
    module = _create(name, False, {**arguments, **weights})
    said = {"license": config.get("license")}
    return BuiltNetwork(module, name, "timm, weights from the local cache", said, channels, path=cached, build=build)


def create_timm(name: str, *, meta: bool, **arguments: Any) -> nn.Module:
    """Build a timm network, without memory for its weights when `meta`, else initialised from a fixed seed.

    Nothing is read or downloaded: of timm's arguments only those that describe the network are allowed.

    Raises:
        ModelError: timm cannot build it.
        ValueError: an argument is none of load.arguments.ARGUMENTS (a defect).
    """
    foreign = arguments.keys() - ARGUMENTS.keys()
    if foreign:
        raise ValueError(f"not an argument that describes a network: {min(foreign)}")
    return _create(name, meta, arguments)


def _create(name: str, meta: bool, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        with quiet_timm(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(INIT_SEED)
            if meta:
                with torch.device("meta"), _NothingDrawn():
                    return as_module(timm.create_model(name, **arguments))
            return as_module(timm.create_model(name, **arguments))
    except Exception as error:  # each architecture checks its arguments in its own way
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
        raise ModelError(f"timm cannot build {name} with {given}: {first_line(error)}") from error


class _NothingDrawn(TorchFunctionMode):
    """Leaves tensors as they are where random numbers would be drawn into them.

    On the meta device that changes no result, and takes most of the time of building a network.
    """

    _DRAWS = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in self._DRAWS else func(*args, **(kwargs or {}))


def known_timm_name(name: str) -> str:
    """Return `name`.

    Raises:
        ModelError: timm has no network of that name; the message names the nearest.
    """
    if timm.is_model(base_name(name)):
        return name
    models = timm.list_models()
    if not nearest(name, models):
        raise ModelError(f"unknown timm model '{name}'; python -c 'import timm; print(timm.list_models())' lists them")
    raise ModelError(unknown_name("timm model", name, models))


def base_name(name: str) -> str:
    """Return a timm name without the tag of its weights (`resnet18.a1_in1k` is `resnet18`)."""
    return name.partition(".")[0]


def _asked_size(config: Mapping[str, Any], options: LoadOptions, own_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the img_size argument for a network with a fixed input size, where one unlike its own is asked for."""
    usual = parse_shape(own_config.get("input_size")) or (3, 0, 0)
    shape = options.input_size or parse_shape(config.get("input_size"))
    side = config.get("img_size")
    size = shape[1:] if shape is not None else (side, side) if isinstance(side, int) else usual[1:]
    return {"img_size": size} if own_config.get("fixed_input_size") and size != usual[1:] else {}


def _infer_side(arch: str, arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return the first common input side at which the network has the file's tensors, None if there is none."""
    for side in _COMMON_SIDES:
        try:
            blank = create_timm(arch, meta=True, **{**arguments, "img_size": side})
        except ModelError:  # the architecture takes no img_size, or not this one
            continue
        if not find_misfits(tensors, blank.state_dict()):
            return side
    return None


def _cached_weights(config: Mapping[str, Any]) -> Path | None:
    """Return the file of a network's published weights, None where no earlier download left one."""
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
    """Return the numbers of classes and input channels of the tensors where they differ from the default network's."""
    state = blank.state_dict()
    arguments: dict[str, Any] = {}
    for weight in _end_weights(blank, "classifier"):
        if weight in tensors and weight in state and tensors[weight].shape[:1] != state[weight].shape[:1]:
            arguments["num_classes"] = int(tensors[weight].shape[0])
    for weight in _end_weights(blank, "first_conv"):
        if weight in tensors and weight in state and tensors[weight].dim() > 1:
            ratio = tensors[weight].shape[1] / state[weight].shape[1]
            channels = round(ratio * (parse_shape(timm_config(blank).get("input_size")) or (3, 0, 0))[0])
            if ratio != 1 and channels > 0:
                arguments["in_chans"] = channels
    return arguments


def _end_weights(blank: nn.Module, end: str) -> list[str]:
    names = timm_config(blank).get(end)
    names = (names,) if isinstance(names, str) else names or ()
    return [f"{name}.weight" for name in names]


def _wrong_arch(
    path: Path, arch: str, misfits: list[Misfit], tensors: Mapping[str, torch.Tensor], expected: set[str]
) -> ModelError:
    fitting = _fitting_names(arch, tensors, family_too=not expected.isdisjoint(tensors))
    close = [name for name in nearest(arch, timm.list_models(), 4) if name != arch][:3]
    advice = f"it fits --arch {' or '.join(fitting)}" if fitting else f"nearest timm names: {', '.join(close)}"
    return ModelError(f"'{path}' does not fit {arch}: {describe_misfits(misfits)}; {advice}")


def _fitting_names(arch: str, tensors: Mapping[str, torch.Tensor], *, family_too: bool) -> list[str]:
    """Return up to three timm networks like `arch` whose tensors are those of the file, first and last layer aside.

    With `family_too`, the networks of the same family are tried after those of the nearest names. They name their
    tensors alike, so that this is in vain where the file shares no name with `arch`.
    """
    family: list[str] = []
    if family_too:
        family = timm.list_models(module=timm.models.model_entrypoint(base_name(arch)).__module__.rpartition(".")[2])
    candidates = dict.fromkeys([*nearest(arch, timm.list_models(), 8), *nearest(arch, family, len(family) or 1)])
    fitting: list[str] = []
    deadline = time.process_time() + _SEARCH_S
    for name in list(candidates)[:_SEARCHED_NETWORKS]:
        if len(fitting) == 3 or time.process_time() > deadline:
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
