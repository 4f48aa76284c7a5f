"""The job: a request and everything it is done on. All stages of a run share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mm_edge import __version__
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.load.annotations import Labels, MaskLabels
from mm_edge.load.data import DataSplits
from mm_edge.load.models import LoadedModel
from mm_edge.progress import Stages
from mm_edge.records import Budget, Candidate, asked_budgets
from mm_edge.run.loss import UserLoss
from mm_edge.run.metric import UserMetric
from mm_edge.run.recoveries import RECOVERIES, Recovery
from mm_edge.run.request import Request
from mm_edge.store import RunStore

LIBRARIES = ("torch", "timm", "onnxruntime", "onnxscript")
IMAGES_PER_BATCH = 32
DENSE_FILE = "dense.onnx"


@dataclass(frozen=True)
class Job:
    """A request with everything it is done on.

    Attributes:
        request: the options.
        model: the model as it was given.
        data: the images at the size the model was given at; None without data.
        target: the device profile.
        transport: the connection to the device; None where nothing is measured.
        folder: the run directory.
        store: the stages stored in that directory.
        stages: shows and times the current stage.
        labels: boxes or masks of the photos; None without --labels.
        metric: the user's figure of merit; None without --metric.
        loss: the user's training loss; None without --loss.
        notes: the warnings of the report, in the order they were found.
    """

    request: Request
    model: LoadedModel
    data: DataSplits | None
    target: Target
    transport: Transport | None
    folder: Path
    store: RunStore
    stages: Stages
    labels: Labels | None = None
    metric: UserMetric | None = None
    loss: UserLoss | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def dense_file(self) -> Path:
        """The file of the dense network."""
        return self.folder / DENSE_FILE

    def artifact(self, candidate: Candidate) -> Path:
        """Return the file of a candidate that was made."""
        assert candidate.artifact is not None
        return self.folder / candidate.artifact

    def note(self, *texts: str) -> None:
        """Add warnings to the report."""
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
        """The versions of mm-edge and of the libraries that results depend on."""
        return {**{name: version(name) for name in LIBRARIES}, "mm-edge": __version__}

    @property
    def has_masks(self) -> bool:
        """Whether the user's labels are masks, which makes the network a segmenter."""
        return isinstance(self.labels, MaskLabels)

    @property
    def recovery(self) -> Recovery:
        """The recovery that was asked for."""
        return RECOVERIES[self.request.recover]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets that candidates are made for."""
        request = self.request
        return asked_budgets(request.macs, request.constraints, request.kinds)

    @property
    def data_key(self) -> Any:
        """The identity of the images and of --labels in keys; reading them does not change it."""
        if self.data is None:
            return None
        return self.data.identity if self.labels is None else [self.data.identity, self.labels.identity]


def _module_digest(module: torch.nn.Module | None) -> str | None:
    """Return what identifies a module that was not read from a file: sums of its weights."""
    if module is None:
        return None
    sums = [float(tensor.double().abs().sum()) for tensor in module.state_dict().values()]
    return repr([len(sums), *sums])
