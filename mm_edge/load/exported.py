"""Reads a .pt2 (torch.export) file, after checking that reading and running it can only compute tensors.

An exported program is data that names operators, symbolic expressions and pickled constants, and torch's reader
resolves all three without limits. So the archive is checked first: it may hold operators from an allow-list of
namespaces and expressions of plain arithmetic, but no compiled code and no opaque objects. Pickles inside it are read
as tensors only.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_edge.errors import ModelError, first_line
from mm_edge.load.weights import check_expansion, check_file, check_sums
from mm_edge.records import parse_json

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.(?!__|from_file|_print|save|load|warn|set_|set\.|_test_|_debug|_cufft|_assert|record_stream|hash_)\w+(\.(?!__)\w+)?$"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|scan|while_loop|map_impl)$"
    r"|torch\.sym_\w+$|math\.[a-z0-9]+$"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|pow)$"
)
# Sums, products and comparisons of symbols; the only calls are of sympy's and torch's classes, capitalised, and the
# only strings single words.
_EXPRESSION = re.compile(r"(?:\b[A-Z]\w*\(|\b[A-Za-z]\w*\b(?!\s*[.(])|'\w+'|\d+(?:\.\d+)?|[\s+\-*/(),<>=|&~])*$")
_POWER = re.compile(r"\b[A-Za-z]\w*\s*\*\*\s*[1-4]\b(?!\s*\*\*)|\bPow\(\s*[A-Za-z]\w*\s*,\s*[1-4]\s*\)")
_LONG_NUMBER = re.compile(r"\d{20}")
LONGEST_EXPRESSION = 10_000
_FORBIDDEN_MEMBER = re.compile(r"(^|/)data/(aotinductor/|constants/(?!tensor_|[^/]*config\.json$))", re.IGNORECASE)


def read_exported(path: Path, trust_pickle: bool) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the module of a .pt2 file and the shape of its first example input (None if it holds none).

    The module's parameters keep the names of the original network. Shapes that were not exported as dynamic, the
    batch among them, are fixed.

    Raises:
        ModelError: not a .pt2, damaged, or it holds what could run code and is not trusted.
    """
    check_file(path)
    if not zipfile.is_zipfile(path):
        raise ModelError(f"'{path}' is not a .pt2 file, or it is cut short; save it again with torch.export.save")
    if not trust_pickle:
        _check_archive(path)
    try:
        with _tensors_only(not trust_pickle), _without_logs(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path))
            # The module's own guards are Python source from the file: not generated.
            module: nn.Module = program.module(check_guards=False)
    except Exception as error:  # torch raises many kinds here
        raise ModelError(f"'{path}' cannot be loaded as a .pt2: {first_line(error)}") from error
    return module, _example_shape(program)


def _example_shape(program: torch.export.ExportedProgram) -> tuple[int, ...] | None:
    if not program.example_inputs:
        return None
    for value in program.example_inputs[0]:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
    return None


@contextmanager
def _without_logs() -> Iterator[None]:
    """Keep torch's own log of what it could not read off the terminal; the error says it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _tensors_only(wanted: bool) -> Iterator[None]:
    """Make every torch.load below refuse anything but tensors, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if wanted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[name]
        elif before is not None:
            os.environ[name] = before


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            check_expansion(path, archive)
            check_sums(path, archive)
            documents = [parse_json(archive.read(name)) for name in names if _is_program(name)]
    except ModelError:
        raise
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise ModelError(f"'{path}' is damaged; save it again with torch.export.save") from error
    # torch finds members regardless of case, so two that differ in case alone would hide one from this check.
    if len({name.lower() for name in names}) != len(names):
        raise _refusal(path, "members of the same name")
    for name in names:
        if _FORBIDDEN_MEMBER.search(name):
            raise _refusal(path, f"the member {name}")
    for document in documents:
        for key, value in _walk(document):
            if key == "target" and isinstance(value, str) and not _OPERATOR.match(value):
                raise _refusal(path, f"the operator {value}")
            if key == "expr_str" and isinstance(value, str) and not _is_arithmetic(value):
                raise _refusal(path, f"the expression {value}")


def _is_arithmetic(expression: str) -> bool:
    """Return whether an expression is of plain arithmetic that takes no time: powers are those of a symbol, up to 4."""
    rest = _POWER.sub("", expression)
    short = len(expression) <= LONGEST_EXPRESSION and not _LONG_NUMBER.search(expression)
    return short and "**" not in rest and "Pow" not in rest and _EXPRESSION.match(expression) is not None


def _is_program(name: str) -> bool:
    return bool(re.search(r"(^|/)models/.|serialized_exported_program", name, re.IGNORECASE))


def _refusal(path: Path, what: str) -> ModelError:
    return ModelError(
        f"'{path}' holds {what}, which could run code; give the state_dict with --arch or an .onnx, "
        "or pass --trust-pickle if you made the file"
    )


def _walk(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) pair of a JSON document, at every depth."""
    pending = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
