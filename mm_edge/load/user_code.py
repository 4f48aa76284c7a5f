"""Builds a network with the user's own code, given as FILE.py:CALLABLE."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_edge.errors import ModelError, UsageError, first_line, unknown_name
from mm_edge.load.matching import Misfit, describe_misfits, fill_, find_misfits
from mm_edge.load.network import INIT_SEED, as_module
from mm_edge.load.weights import WeightsFile, strip_prefixes
from mm_edge.store import hash_file

USER_CODE = re.compile(r"(?P<file>.+\.py):(?P<callable>[A-Za-z_][\w.]*)$")


def build_user_module(arch: str, content: WeightsFile) -> nn.Module:
    """Call the user's code `arch` (FILE.py:CALLABLE) and load the tensors of a file into the module it returns.

    A callable with an argument `num_classes` is given the number of classes that the tensors have.

    Raises:
        ModelError: the code cannot be imported or called, or the tensors do not fit the module.
    """
    builder = import_callable(arch)
    module = _call_builder(arch, builder, {})
    tensors = strip_prefixes(content.tensors, set(module.state_dict()))
    misfits = find_misfits(tensors, module.state_dict())
    classes = _classes_by_shape(misfits)
    if classes is not None and "num_classes" in inspect.signature(builder).parameters:
        module = _call_builder(arch, builder, {"num_classes": classes})
        misfits = find_misfits(tensors, module.state_dict())
    if misfits:
        raise ModelError(f"'{content.path}' does not fit {arch}: {describe_misfits(misfits)}")
    module = module.float()
    fill_(module, tensors)
    return module


def _classes_by_shape(misfits: list[Misfit]) -> int | None:
    """Return the first dimension that all misfits have in the file, where nothing else differs."""
    sizes = {a[0] for _, a, b in misfits if a and b and a[1:] == b[1:]}
    return sizes.pop() if len(sizes) == 1 else None


def import_callable(code: str, option: str = "--arch") -> Any:
    """Import the user's code (FILE.py:CALLABLE), which runs the file, and return the callable.

    Raises:
        ModelError: the file cannot be imported or has no such callable; the message names the `option`.
    """
    match = USER_CODE.match(code)
    assert match is not None  # callers have matched it
    file, name = Path(match["file"]), match["callable"]
    if not file.is_file():
        raise ModelError(f"{option} {code}: the file '{file}' does not exist")
    spec = importlib.util.spec_from_file_location(f"mm_edge_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{option} {code}: '{file}' is not a Python file")
    namespace = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(namespace)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{option} {code}: importing '{file}' failed: {first_line(error)}") from error
    value: Any = namespace
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        own = [key for key, item in vars(namespace).items() if callable(item) and not key.startswith("_")]
        raise ModelError(f"{option} {code}: {unknown_name('callable', name, own)}")
    return value


def import_stated(code: str, option: str, example: str) -> tuple[Any, str]:
    """Import the callable that `option` states as FILE.py:CALLABLE; return it and the hash of its file.

    Raises:
        UsageError: `code` is not written so, the file cannot be imported, or it has no such callable.
    """
    match = USER_CODE.match(code)
    if match is None:
        raise UsageError(f"{option} '{code}' is not FILE.py:CALLABLE; write for example {option} {example}")
    return import_callable(code, option), hash_file(Path(match["file"]))


def _call_builder(arch: str, builder: Any, arguments: dict[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(INIT_SEED)
            return as_module(builder(**arguments))
    except Exception as error:  # the user's code may raise anything
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelError(f"--arch {arch}: calling it with ({given}) failed: {first_line(error)}") from error
