"""Reads the tensors of a model file and what the file says about itself, running none of its code.

Checkpoints and state_dicts are read with `weights_only=True`; `argparse.Namespace` (in which timm keeps its training
arguments) is the only further type allowed. A pickle that names anything else is refused unless the caller trusts it.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from mm_edge.errors import ModelError, first_line
from mm_edge.records import parse_json

# Keys under which training scripts keep the weights. Averaged weights come first: they are the ones evaluated.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "weights")
_HARMLESS_GLOBALS = re.compile(r"torch\.|collections\.OrderedDict$|argparse\.Namespace$|numpy\.")
_WRAPPER_PREFIXES = re.compile(r"^(?:model\.|module\.|_orig_mod\.)+")
# What an archive may hold beside the bytes of its file: records of torch, and small compressed members.
EXPANSION_BYTES = 64 << 20
_CHUNK = 1 << 20
_TRAINED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# A tensor that repeats values of a file, as an expanded one does, may be this large.
_SMALL_BYTES = 1 << 20
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightsFile:
    """What a model file holds.

    Attributes:
        path: the file the tensors are in.
        kind: what it is, in words ("timm checkpoint, EMA weights").
        tensors: tensors by name, prefixes of wrappers not yet removed.
        arch: the architecture the file names, or None.
        config: what it says of the input and the network (mean, std, input_size, num_classes, model_args, ...).
        labels: class names in the order of the outputs, or ().
    """

    path: Path
    kind: str
    tensors: dict[str, torch.Tensor]
    arch: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def read_weights(path: Path, trust_pickle: bool) -> WeightsFile | nn.Module:
    """Read a checkpoint, state_dict, .safetensors file or Hugging Face folder; a trusted pickle may give the module.

    Raises:
        ModelError: the file is missing, empty, cut short, not a model, or would run code when read.
    """
    if path.is_dir():
        return _read_folder(path, trust_pickle)
    check_file(path)
    if zipfile.is_zipfile(path):
        with _damage_is_told(path), zipfile.ZipFile(path) as archive:
            check_expansion(path, archive)
            check_sums(path, archive)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _interpret(path, _load_pickled(path, trust_pickle))


def check_file(path: Path) -> None:
    """Raise ModelError unless `path` is a file that can be read and is not empty."""
    if not path.exists():
        raise ModelError(f"model '{path}' does not exist; give a file, a folder or timm:NAME")
    if not path.is_file():
        raise ModelError(f"'{path}' is neither a file nor a folder")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}") from error
    if not first:
        raise ModelError(f"'{path}' is empty; save the model again")


def check_expansion(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that holds far more than its file: torch stores tensors as they are, not compressed.

    Raises:
        ModelError: its members take more than EXPANSION_BYTES beside the size of the file.
    """
    held = sum(item.file_size for item in archive.infolist())
    if held > path.stat().st_size + EXPANSION_BYTES:
        raise ModelError(
            f"'{path}' unpacks to {held / 2**20:,.0f} MB, far more than the file; save the model again with torch.save"
        )


def check_sums(path: Path, archive: zipfile.ZipFile) -> None:
    """Compare every member of an archive with its checksum: torch itself reads changed weights without a word.

    Raises:
        ModelError: a member is not what was written.
    """
    for item in archive.infolist():
        with archive.open(item) as member:
            while member.read(_CHUNK):
                pass  # reading to the end compares


@contextmanager
def _damage_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise ModelError(f"'{path}' is damaged or cut short; copy or save it again") from error


def zip_members(path: Path) -> list[str]:
    """Return the member names of a zip archive, [] if `path` is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile raises many kinds on a damaged archive
        return []


def strip_prefixes(tensors: Mapping[str, torch.Tensor], expected: set[str]) -> dict[str, torch.Tensor]:
    """Remove what wrappers put before parameter names (model., module., _orig_mod.), repeatedly.

    Names that the network itself has (`expected`) stay as they are. Counters of torch's averaged models are dropped.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name != "n_averaged" or name in expected}
    if set(kept) <= expected:
        return kept
    return {_WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in kept.items()}


def check_finite(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise ModelError naming the first tensor that holds NaN or infinite values."""
    bad = [(name, int((~torch.isfinite(t)).sum())) for name, t in tensors.items() if t.is_floating_point()]
    bad = [(name, count) for name, count in bad if count]
    if bad:
        name, count = bad[0]
        more = f" (and in {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
        raise ModelError(
            f"'{path}': {count} of {tensors[name].numel()} values of {name} are NaN or infinite{more}; "
            "give weights from before training diverged"
        )


def check_plain(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that hold no values of their own in a type that networks are trained in.

    Raises:
        ModelError: one is sparse, quantised, nested, complex, in 8 bits or less, without data, or one value repeated.
    """
    for name, tensor in tensors.items():
        what = _oddity(tensor)
        if what is not None:
            raise ModelError(f"'{path}': {name} is {what}; save the dense weights in float32, float16 or bfloat16")


def _oddity(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta:
        return "without data (a meta tensor)"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _TRAINED):
        return f"in {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > max(_SMALL_BYTES, tensor.untyped_storage().nbytes()):
        return f"{tensor.numel()} values of which the file holds fewer"
    return None


def _load_pickled(path: Path, trust_pickle: bool) -> Any:
    members = zip_members(path)
    if any("/code/" in name or name.endswith("/constants.pkl") for name in members):
        raise ModelError(
            f"'{path}' is TorchScript, which cannot be pruned; give the state_dict with --arch, or export an .onnx"
        )
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and not members:
        raise ModelError(f"'{path}' is damaged or cut short; copy or save it again")
    if start != b"PK" and start[:1] != b"\x80":
        raise ModelError(
            f"'{path}' is not a model file; allowed: a PyTorch checkpoint or state_dict, .safetensors, .pt2, .onnx, "
            "or a Hugging Face folder"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickle protocols; the errors below say it in a line
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise _explain(path, trust_pickle, error) from error


def _explain(path: Path, trust_pickle: bool, error: Exception) -> ModelError:
    foreign = next(_foreign_globals(path), None)
    if foreign is not None and not trust_pickle:
        return ModelError(
            f"'{path}' is a pickle that would run code when read (it names {foreign}); "
            "save its state_dict and give --arch, or pass --trust-pickle if you made the file"
        )
    if isinstance(error, pickle.UnpicklingError) and foreign is None and not zip_members(path):
        return ModelError(f"'{path}' is not a PyTorch checkpoint, or it is damaged; save the model again")
    if foreign is not None:
        return ModelError(f"'{path}' cannot be unpickled: {first_line(error)}")
    return ModelError(f"'{path}' is damaged or cut short; copy or save it again")


def _foreign_globals(path: Path) -> Iterator[str]:
    """Yield the names a pickle would import beyond tensors and plain containers, without running it."""
    for data in _pickle_streams(path):
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(data):
                name = None
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name is not None and not _HARMLESS_GLOBALS.match(name):
                    yield name
        except Exception:  # not a pickle, or cut short: what came before has been looked at
            continue


def _pickle_streams(path: Path) -> Iterator[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with contextlib.suppress(Exception):  # a damaged member is reported by who reads it whole
                        yield archive.read(name)
        return
    # The old format is several pickles one after the other: each ends with STOP (".").
    data = path.read_bytes()
    for _ in range(5):
        yield data
        try:
            stop = next(position or 0 for opcode, _, position in pickletools.genops(data) if opcode.name == "STOP")
            data = data[stop + 1 :]
        except Exception:
            return


def _interpret(path: Path, data: Any) -> WeightsFile | nn.Module:
    if isinstance(data, nn.Module):
        return data
    if not isinstance(data, Mapping):
        raise ModelError(f"'{path}' holds a {type(data).__name__}; give a checkpoint, a state_dict or a module")
    key, state = _find_state(data)
    if isinstance(state, nn.Module):
        return state
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        found = ", ".join(str(name) for name in list(data)[:6]) or "nothing"
        raise ModelError(f"'{path}' holds no weights; looked under {', '.join(_STATE_KEYS)}; found {found}")
    check_plain(tensors, path)
    config, arch = _describe_checkpoint(data) if key else ({}, None)
    kind = "state_dict" if not key else "checkpoint, EMA weights" if key.endswith("_ema") else "checkpoint"
    return WeightsFile(path, kind, tensors, arch, config)


def _find_state(data: Mapping[Any, Any]) -> tuple[str, Any]:
    for key in _STATE_KEYS:
        value = data.get(key)
        if isinstance(value, nn.Module):
            return key, value
        if isinstance(value, Mapping) and any(isinstance(item, torch.Tensor) for item in value.values()):
            return key, value
    return "", data


def _describe_checkpoint(data: Mapping[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the configuration and architecture from timm's training arguments and the checkpoint's own keys.

    The checkpoint's keys replace the arguments.
    """
    arguments = data.get("args")
    config = dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
    if isinstance(arguments, Mapping):
        config = {str(key): value for key, value in arguments.items()}
    if isinstance(config.get("model_kwargs"), dict):
        config["model_args"] = config["model_kwargs"]
    plain = ("input_size", "mean", "std", "interpolation", "crop_pct", "num_classes", "model_args")
    config.update({key: data[key] for key in plain if data.get(key) is not None})
    arch = data.get("arch") or config.get("model")
    return config, arch if isinstance(arch, str) else None


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ModelError(f"'{path}' is not a safetensors file, or it is cut short: {first_line(error)}") from error
    if not tensors:
        raise ModelError(f"'{path}' holds no tensors")
    check_plain(tensors, path)
    config = {key: _from_json_text(value) for key, value in metadata.items()}
    arch = metadata.get("arch") or metadata.get("architecture")
    return WeightsFile(path, "safetensors", tensors, arch, config)


def _from_json_text(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _read_folder(folder: Path, trust_pickle: bool) -> WeightsFile | nn.Module:
    weights = next((folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ModelError(f"folder '{folder}' holds none of {' and '.join(_FOLDER_WEIGHTS)}; give a Hugging Face folder")
    content = read_weights(weights, trust_pickle)
    if isinstance(content, nn.Module):
        return content
    config_path = folder / "config.json"
    if not config_path.is_file():
        return content
    try:
        config = parse_json(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ModelError(f"'{config_path}' is not a JSON object; download the folder again") from error
    pretrained = config.get("pretrained_cfg")
    merged = {**(pretrained if isinstance(pretrained, dict) else {}), **config}
    names = config.get("label_names")
    labels = tuple(str(name) for name in names) if isinstance(names, list) else ()
    arch = config.get("architecture")
    return WeightsFile(weights, "Hugging Face folder", content.tensors, arch or content.arch, merged, labels)


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Silence the deprecation notes timm and torch raise while a network is built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
