"""`prune_export`, the Python function, and `run_job`, which the command line calls as well.

Everything that can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm_edge.errors import UsageError, unknown_name
from mm_edge.load.models import LoadedModel, LoadOptions, wrap_module
from mm_edge.progress import Stages, Terminal
from mm_edge.records import Report
from mm_edge.report.summary import find_chosen, write_headline
from mm_edge.report.values import show_bytes, show_ms, show_percent, show_ratio
from mm_edge.run.options import Flag, Flags, Option, list_options, type_name
from mm_edge.run.request import Request, make_request
from mm_edge.run.start import start

# Options on how to read a file; they are refused for a module in memory.
FILE_OPTIONS = ("arch", "input_size", "trust_pickle", "layout")
# Options that may be given by position, after the module and the example input.
BY_POSITION = ("target", "data", "out")
WIDTH = 110


@dataclass(frozen=True, eq=False)
class Result(Report):
    """The report of a run, and the run directory. It is equal to the Report that report.json holds.

    Attributes:
        folder: the run directory.
    """

    folder: Path = field(default=Path(), metadata={"json": False})

    @classmethod
    def of(cls, report: Report, folder: Path) -> Result:
        """Return `report` as the result of the run in `folder`."""
        return cls(**_sections(report), folder=folder)

    @property
    def chosen_path(self) -> Path | None:
        """The file of the chosen candidate; None where none was chosen."""
        candidate = find_chosen(self)
        return None if candidate is None or candidate.artifact is None else self.folder / candidate.artifact

    def __eq__(self, other: object) -> bool:
        """Return whether the reports are equal; the folders may differ."""
        return isinstance(other, Report) and _sections(self) == _sections(other)

    __hash__ = None  # type: ignore[assignment]  # as for Report, which holds dicts

    def __str__(self) -> str:
        """Return a summary of at most ten lines."""
        dense, chosen = self.dense, find_chosen(self)
        lines = [
            write_headline(self),
            f"dense:       {self.model.name}, top-1 {show_percent(dense.accuracy_top1)}, p50 "
            f"{show_ms(dense.latency_ms.p50)}, file {show_bytes(dense.file_bytes)}",
        ]
        if chosen is not None:
            lines += [
                f"chosen:      {chosen.id}, top-1 {show_percent(chosen.accuracy_top1)}, p50 "
                f"{show_ms(chosen.latency_ms.p50)}, speed-up {show_ratio(chosen.speedup)}, file "
                f"{show_bytes(chosen.file_bytes)}",
                f"chosen file: {self.chosen_path}",
            ]
        front = sum(candidate.pareto for candidate in self.candidates)
        lines += [
            f"target:      {self.target.get('name')}",
            f"candidates:  {len(self.candidates)}, {front} of them on the front",
            f"warnings:    {len(self.warnings)}",
            f"full report: {self.folder / 'report.md'}",
        ]
        return "\n".join(lines)


def _sections(report: Report) -> dict[str, Any]:
    return {item.name: getattr(report, item.name) for item in fields(Report)}


def prune_export(
    module: nn.Module, example_input: torch.Tensor | tuple[torch.Tensor, ...], *positional: Any, **options: Any
) -> Result:
    """Prune `module` as `mm-edge prune-export` does, and return its report."""
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"module is {type_name(module)}, not a torch.nn.Module; for a file use: mm-edge prune-export FILE"
        )
    examples = example_input if isinstance(example_input, tuple) else (example_input,)
    _check_examples(examples)
    options = _name_positional(positional, options)
    for name in FILE_OPTIONS:
        if options.get(name) is not None:
            raise UsageError(f"{name} says how to read a file, and the module is in memory; leave it out")
    name = type(module).__name__
    request = make_request(**{**options, "out": options.get("out") or Path(f"mm-edge-{name}")})
    _check_inputs(module, examples, request)

    def load() -> LoadedModel:
        photos = LoadOptions(
            preprocess=request.preprocess, scale=request.scale, colours=request.colours, resize=request.resize
        )
        return wrap_module(module, *examples, name=name, mean=request.mean, std=request.std, photos=photos)

    return run_job(load, request, Stages(Terminal(stderr=True)))


def _check_examples(examples: tuple[Any, ...]) -> None:
    """Refuse what is no batch of images, or no tensors with one among them."""
    for example in examples:
        if not isinstance(example, torch.Tensor):
            raise UsageError(
                f"example_input is {type_name(example)}, not a tensor; give a batch of images (N, C, H, W)"
            )
    shapes = [tuple(example.shape) for example in examples]
    if not any(len(shape) == 4 for shape in shapes):
        listed = f"shape {', '.join(map(str, shapes))}" if shapes else "no tensor"
        raise UsageError(f"example_input has {listed}; give a batch of images (N, C, H, W)")


def _check_inputs(module: nn.Module, examples: tuple[torch.Tensor, ...], request: Request) -> None:
    """Refuse `inputs` that do not state the shapes of the examples, by the names of the module's arguments."""
    arguments = list(inspect.signature(module.forward).parameters)
    shapes = {name: tuple(example.shape) for name, example in zip(arguments, examples, strict=False)}
    for name, shape in request.inputs:
        if name not in shapes:
            raise UsageError(f"inputs: {unknown_name('input', name, shapes)}")
        if shape[1:] != shapes[name][1:]:
            raise UsageError(
                f"inputs: {name} has shape {shape}, and example_input {shapes[name]}; give an example of that shape"
            )


def _name_positional(positional: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options by name."""
    if len(positional) > len(BY_POSITION):
        raise UsageError(
            f"prune_export takes {', '.join(BY_POSITION)} by position at most; give the other options by name"
        )
    named = dict(zip(BY_POSITION, positional, strict=False))
    for name in named:
        if name in options:
            raise UsageError(f"{name} is given twice: by position and by name; leave one out")
    return {**named, **options}


def run_job(load: Callable[[], LoadedModel], request: Request, stages: Stages) -> Result:
    """Check everything that can be refused, then run the stages in the run directory.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept.
    """
    return Result.of(start(load, request, stages), request.out)


# --- signature and docstring of prune_export, made from the fields of Request ---------------------------------------

_INTRODUCTION = """Prune `module` for a target as `mm-edge prune-export` does, and return its report.

The module is copied and stays as it is. Progress is shown on standard error. A list of names or numbers may be given
as a sequence, as text with commas, or as one value. None stands for the default.

Args:
    module: the trained network, a torch.nn.Module.
    example_input: a batch of images (N, C, H, W), which gives the shape of the input; for a module with several inputs
        a tuple with an example of each.
{options}

Returns:
    The report that was written in the run directory, with `folder`, the run directory, and `chosen_path`, the file of
    the chosen candidate or None. print() shows a summary.

Raises:
    mm_edge.errors.UsageError: an option or a value is refused before anything is written.
    mm_edge.errors.JobError: the job ran and failed; what was made is kept.
"""


def _python_options() -> dict[str, Option]:
    """Return the options of `prune_export`, those by position first."""
    options = {name: item for name, item in list_options(Request).items() if name not in FILE_OPTIONS}
    return {**{name: options[name] for name in BY_POSITION}, **options}


def _sign() -> inspect.Signature:
    hints = typing.get_type_hints(Request)
    own = list(inspect.signature(prune_export).parameters.values())[:2]
    parameters = [parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for parameter in own]
    for name, item in _python_options().items():
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in BY_POSITION else inspect.Parameter.KEYWORD_ONLY
        depends = item.default_by is not None or name == "out"
        annotation = hints[name] | None if depends else hints[name]
        parameters.append(
            inspect.Parameter(name, kind, default=None if depends else item.default, annotation=annotation)
        )
        for keyword in item.kind.keywords() if isinstance(item.kind, Flags) else ():
            parameters.append(
                inspect.Parameter(keyword, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
            )
    return inspect.Signature(parameters, return_annotation=Result)


def _describe() -> str:
    hints = typing.get_type_hints(Request)
    lines: list[str] = []
    for name, item in _python_options().items():
        hint = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
        default, text = item.shown_default, item.python_help or item.full_help
        if isinstance(item.kind, Flag):
            default = str(item.default)
        if name == "out":
            default = "mm-edge-CLASS"
        entries = [f"{name} ({hint}, default {default}): {text}"]
        if isinstance(item.kind, Flags):
            flags = item.kind.keywords().items()
            entries += [f"{key} (bool, default False): {item.kind.choices[choice].help}" for key, choice in flags]
        for entry in entries:
            lines += textwrap.wrap(
                entry, WIDTH, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False
            )
    return _INTRODUCTION.format(options="\n".join(lines))


prune_export.__signature__ = _sign()  # type: ignore[attr-defined]
prune_export.__doc__ = _describe()
