"""The job: what was asked for and everything it is done on. The stages of the run share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mm_edge import __version__
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.load.data import DataSplits
from mm_edge.load.models import LoadedModel
from mm_edge.progress import Stages
from mm_edge.records import Budget, asked_budgets
from mm_edge.run.recoveries import RECOVERIES, Recovery
from mm_edge.run.request import Request
from mm_edge.store import RunStore

LIBRARIES = ("torch", "timm", "onnxruntime", "onnxscript")
BATCH = 32


@dataclass(frozen=True)
class Job:
    """A request with everything it is done on.

    Attributes:
        request: what was asked for.
        model: the model as it was given.
        data: the images at the size the model was given at; None without data.
        target: the device profile.
        transport: the way to the device; None where nothing is measured.
        folder: the run directory.
        store: what the stages keep there for the next run.
        stages: shows and times the stage at work.
        notes: what the reader of the report should know, in the order it was found.
    """

    request: Request
    model: LoadedModel
    data: DataSplits | None
    target: Target
    transport: Transport | None
    folder: Path
    store: RunStore
    stages: Stages
    notes: list[str] = field(default_factory=list)

    def note(self, *texts: str) -> None:
        """Add what the reader of the report should know."""
        self.notes.extend(texts)

    def key(self, model: LoadedModel | None = None, /, **parts: Any) -> dict[str, Any]:
        """Return the key of a stage: its own `parts` and what every stage depends on.

        `model` is the model at the input shape the stage works at; without it, the model as it was given.
        """
        model = self.model if model is None else model
        return {
            "model": model.info,
            "weights": model.info.sha256 or _module_digest(model.module),
            "input": model.input,
            "seed": self.request.seed,
            "versions": self.versions,
            **parts,
        }

    @property
    def versions(self) -> dict[str, str]:
        """Versions of mm-edge and of the libraries that decide what comes out."""
        return {**{name: version(name) for name in LIBRARIES}, "mm-edge": __version__}

    @property
    def recovery(self) -> Recovery:
        """The recovery that was asked for."""
        return RECOVERIES[self.request.recover]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What candidates are scaled to."""
        request = self.request
        return asked_budgets(request.macs, request.constraints, request.kinds)

    @property
    def data_key(self) -> Any:
        """What identifies the images; it does not change as they are read."""
        return None if self.data is None else self.data.identity


def _module_digest(module: torch.nn.Module | None) -> str | None:
    """Identify a network that came from no file by its weights."""
    if module is None:
        return None
    sums = [float(tensor.double().abs().sum()) for tensor in module.state_dict().values()]
    return repr([len(sums), *sums])
