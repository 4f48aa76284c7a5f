"""What a run is asked for and what it is done on: the records that the stages of the pipeline share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_edge import __version__
from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.graph.axes import Axis
from mm_edge.graph.sizes import InputSizes, SizedNetwork
from mm_edge.load.data import DataSplits
from mm_edge.load.models import LoadedModel
from mm_edge.plan.strategies import STRATEGIES
from mm_edge.progress import Stages
from mm_edge.records import Budget, Constraints, asked_budgets
from mm_edge.recover.closed_form.branches import MeasuredBranch
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.sensitivity import Sensitivity
from mm_edge.store import RunStore

# Ways to recover that start with the closed form.
FROM_MOMENTS = ("closed-form", "tune", "finetune")
LIBRARIES = ("torch", "timm", "onnxruntime", "onnxscript")
CLOSED_FORM_IMAGES = 500
BATCH = 32


@dataclass(frozen=True)
class Request:
    """What to do with a loaded model; the defaults are the command line's."""

    signals: tuple[str, ...] = ("magnitude", "gradient", "product")
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    ranges: str = "rules"
    kinds: tuple[str, ...] = ("structured",)
    recover: str = "closed-form"
    epochs: int = 10
    select: str = "auto"
    macs: tuple[float, ...] = ()
    allocate_by: str = "macs"
    input_sizes: InputSizes = None
    keep: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    prune_norms: bool = False
    ort: bool = False
    bake_preprocess: bool = False
    constraints: Constraints = field(default_factory=Constraints)
    accuracy_on: str = "host"
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """A request with everything it is done on."""

    request: Request
    model: LoadedModel
    data: DataSplits | None
    target: Target
    transport: Transport | None
    folder: Path
    store: RunStore
    stages: Stages

    def key(self, **parts: Any) -> dict[str, Any]:
        """Return the key of a stage: its own `parts` and what every stage depends on."""
        return {
            "model": self.model.info,
            "weights": self.model.info.sha256 or _module_digest(self.model.module),
            "input": self.model.input,
            "seed": self.request.seed,
            "versions": {**{name: version(name) for name in LIBRARIES}, "mm-edge": __version__},
            **parts,
        }

    def at(self, network: SizedNetwork) -> Job:
        """Return the same job on pictures of the size `network` takes."""
        data = None if self.data is None else self.data.prepared_for(network.model.input)
        return replace(self, model=network.model, data=data)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What candidates are scaled to."""
        request = self.request
        return asked_budgets(request.macs, request.constraints, request.kinds)

    @property
    def data_key(self) -> Any:
        """What identifies the images; it does not change as they are read."""
        return None if self.data is None else self.data.identity


@dataclass(frozen=True)
class Place:
    """One input size of a run.

    Attributes:
        job: the job with the model and the images of that size.
        network: the network there.
        dense: whether it is the size the network was given at.
        pruned: whether candidates are pruned here; else only the control stands.
        recovery: what the closed form works from here.
        sensitivities: of the groups here; measured at the dense size.
        branches: what removing each residual branch costs; at the dense size alone.
    """

    job: Job
    network: SizedNetwork
    dense: bool
    pruned: bool
    recovery: RecoveryContext | None = None
    sensitivities: Mapping[Axis, Sensitivity] = field(default_factory=dict)
    branches: tuple[MeasuredBranch, ...] = ()

    @property
    def side(self) -> int | None:
        """The side that plans and ids name: None for the dense size."""
        return None if self.dense else self.network.side


def _module_digest(module: torch.nn.Module | None) -> str | None:
    """Identify a network that came from no file by its weights."""
    if module is None:
        return None
    sums = [float(tensor.double().abs().sum()) for tensor in module.state_dict().values()]
    return repr([len(sums), *sums])


def recovery_images(data: DataSplits) -> Float32Array:
    """Return the calibration images (N, C, H, W) that the closed form works from."""
    return np.concatenate([batch for batch, _ in data.calibration.take(CLOSED_FORM_IMAGES).batches(BATCH)])
