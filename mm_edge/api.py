"""The job as one function: what the command line and Python callers share.

Everything that can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import nn

from mm_edge.bench.connect import open_transport
from mm_edge.bench.target import load_target, matches_this_machine, resolve_host
from mm_edge.errors import UsageError, unknown_name
from mm_edge.graph.sizes import InputSizes, check_input_sizes, remake
from mm_edge.load.data import open_data
from mm_edge.load.models import LoadedModel, wrap_module
from mm_edge.plan.scores import SIGNALS, parse_signals
from mm_edge.plan.strategies import STRATEGIES, parse_strategies
from mm_edge.progress import Stages
from mm_edge.records import Constraints, Report
from mm_edge.recover.closed_form.structured import SELECTIONS
from mm_edge.run.convert import PRECISIONS
from mm_edge.run.finetune import require_trainable
from mm_edge.run.job import FROM_MOMENTS, Job, Request
from mm_edge.run.measure import SAMPLES_FOLDER
from mm_edge.run.pipeline import check_request
from mm_edge.run.pipeline import prune_export as run_pipeline
from mm_edge.store import RunStore

RANGES = ("rules", "observed")
KINDS = ("structured", "n:m", "unstructured")
ACCURACY_ON = ("host", "device")
ALLOCATIONS = ("macs", "latency")
RECOVERIES = ("none", "bn", "closed-form", "tune", "finetune")


class RequestFields(TypedDict, total=False):
    """The fields of job.Request by keyword; what is left out has the command line's default."""

    signals: Sequence[str]
    strategies: Sequence[str]
    ranges: str
    kinds: Sequence[str]
    recover: str
    epochs: int
    select: str
    macs: Sequence[float]
    allocate_by: str
    input_sizes: Sequence[int] | str | None
    keep: Sequence[str]
    precisions: Sequence[str]
    prune_norms: bool
    ort: bool
    bake_preprocess: bool
    constraints: Constraints
    accuracy_on: str
    seed: int


@dataclass(frozen=True)
class Setting:
    """Where a job runs: target, images and run directory.

    Attributes:
        out: run directory.
        target: name of a device profile.
        data: images as --data takes them; None for none.
        split: fractions of calibration, validation and test where the images are one pool.
        host: USER@HOST of the device to measure on; None for this machine.
        bench: whether to measure.
        resume: reuse the stages a run in `out` has finished; False starts over.
    """

    out: Path
    target: str = "host"
    data: str | None = None
    split: tuple[float, float, float] = (0.5, 0.25, 0.25)
    host: str | None = None
    bench: bool = True
    resume: bool = True


def prune_export(
    module: nn.Module,
    example_input: torch.Tensor,
    target: str = "host",
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    split: tuple[float, float, float] = (0.5, 0.25, 0.25),
    host: str | None = None,
    bench: bool = True,
    resume: bool = True,
    **request: Unpack[RequestFields],
) -> Report:
    """Prune `module` for `target` as `mm-edge prune-export` does, and return the report written in `out`.

    Args:
        module: the trained network; it is copied and stays as it is.
        example_input: a batch of images (N, C, H, W); gives the input's shape.
        target: name of a device profile.
        data: folder or tar of class folders, or a data set as timm names it.
        out: run directory; mm-edge-CLASS without it.
        mean: mean of the normalisation per channel; ImageNet's without it, with a warning.
        std: its standard deviation.
        split: fractions of calibration, validation and test where the images are one pool.
        host: USER@HOST of the device to measure on.
        bench: whether to measure.
        resume: reuse the stages a run in `out` has finished.
        request: fields of job.Request, e.g. strategies=("balanced",), constraints=Constraints(max_drop=1).

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept.
    """
    name = type(module).__name__
    setting = Setting(
        out=Path(out) if out is not None else Path(f"mm-edge-{name}"),
        target=target,
        data=None if data is None else str(data),
        split=split,
        host=host,
        bench=bench,
        resume=resume,
    )

    def load() -> LoadedModel:
        return wrap_module(module, example_input, name=name, mean=mean, std=std)

    return run_job(load, setting, make_request(setting, **request), Stages())


def make_request(setting: Setting, **fields: Unpack[RequestFields]) -> Request:
    """Return the checked request; without `recover`, it is the closed form where there are images.

    Raises:
        UsageError: a name is unknown, or a value is out of its bounds.
    """
    recover = fields.get("recover", "none" if setting.data is None else "closed-form")
    check_names((recover,), RECOVERIES, "--recover")
    if recover != "none" and setting.data is None:
        raise UsageError(f"--recover {recover} needs calibration images; give --data PATH")
    epochs = fields.get("epochs", Request.epochs)
    if "epochs" in fields and recover != "finetune":
        raise UsageError(f"--epochs {epochs} is for fine-tuning; give --recover finetune with it")
    if epochs < 1:
        raise UsageError(f"--epochs {epochs} trains nothing; give at least 1")
    select = fields.get("select", "auto" if recover in FROM_MOMENTS else "signal")
    check_names((select,), SELECTIONS, "--select")
    if select != "signal" and recover not in FROM_MOMENTS:
        raise UsageError(f"--select {select} goes by the closed form's moments; give --recover closed-form with it")
    accuracy_on = fields.get("accuracy_on", ACCURACY_ON[0])
    check_names((accuracy_on,), ACCURACY_ON, "--accuracy-on")
    limits = _check_constraints(fields.get("constraints", Constraints()))
    allocate_by = fields.get("allocate_by", ALLOCATIONS[0])
    check_names((allocate_by,), ALLOCATIONS, "--allocate-by")
    if allocate_by == "latency" and limits.latency_ms is None and limits.speedup is None:
        raise UsageError("--allocate-by latency is for budgets of time; give --speedup X or --latency MS with it")
    ranges = fields.get("ranges", RANGES[0])
    check_names((ranges,), RANGES, "--ranges")
    return Request(
        signals=parse_signals(",".join(fields.get("signals", SIGNALS))),
        strategies=parse_strategies(",".join(fields.get("strategies", STRATEGIES))),
        ranges=ranges,
        kinds=check_names(fields.get("kinds", KINDS[:1]), KINDS, "--kinds"),
        recover=recover,
        epochs=epochs,
        select=select,
        macs=_check_macs(fields.get("macs", ())),
        allocate_by=allocate_by,
        input_sizes=_check_sizes(fields.get("input_sizes")),
        keep=tuple(fields.get("keep", ())),
        precisions=check_names(fields.get("precisions", PRECISIONS[:1]), PRECISIONS, "--precision"),
        prune_norms=fields.get("prune_norms", False),
        ort=fields.get("ort", False),
        bake_preprocess=fields.get("bake_preprocess", False),
        constraints=limits,
        accuracy_on=accuracy_on,
        seed=fields.get("seed", 0),
    )


def check_names(names: Sequence[str], allowed: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return `names`, each once.

    Raises:
        UsageError: one is unknown, or there is none.
    """
    if not names:
        raise UsageError(f"{option} is empty; allowed: {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise UsageError(unknown_name(option, name, allowed))
    return tuple(dict.fromkeys(names))


def run_job(load: Callable[[], LoadedModel], setting: Setting, request: Request, stages: Stages) -> Report:
    """Check everything that can be refused, then run the pipeline in the run directory.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept.
    """
    target = resolve_host(load_target(setting.target))
    if setting.host is not None and not setting.bench:
        raise UsageError("--host names a device to measure on and --no-bench measures nothing; leave one out")
    with stages.stage("load"):
        model = load()
        if request.recover in ("tune", "finetune"):
            require_trainable(model, request.recover)
        for side in request.input_sizes if isinstance(request.input_sizes, tuple) else ():
            remake(model, side)  # refuses what the network cannot take
        data = None
        if setting.data is not None:
            data = open_data(setting.data, model.input, model.info.num_classes, setting.split, request.seed)
    measured = setting.bench and (setting.host is not None or matches_this_machine(target))
    check_request(request, data, target, measured)
    transport = open_transport(target, setting.host, stages.tell) if measured else None
    store = RunStore(setting.out)
    with store.lock():
        if not setting.resume:
            store.clear()
            shutil.rmtree(store.folder / SAMPLES_FOLDER, ignore_errors=True)
        job = Job(request, model, data, target, transport, store.folder, store, stages)
        if transport is None:
            return run_pipeline(job)
        with transport:
            return run_pipeline(job)


def _check_sizes(sizes: Sequence[int] | str | None) -> InputSizes:
    return check_input_sizes(sizes if sizes is None or isinstance(sizes, str) else tuple(sizes))


def _check_macs(fractions: Sequence[float]) -> tuple[float, ...]:
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise UsageError(f"--macs {fraction:g} is not a fraction of the dense MACs; give values between 0 and 1")
    return tuple(fractions)


def _check_constraints(limits: Constraints) -> Constraints:
    if limits.max_drop is not None and not math.isfinite(limits.max_drop):
        raise UsageError(f"--max-drop {limits.max_drop:g} is not a number of points; write for example --max-drop 1")
    given = {"--latency": limits.latency_ms, "--speedup": limits.speedup, "--size": limits.size_bytes}
    for option, limit in given.items():
        if limit is not None and not 0 < limit < math.inf:
            raise UsageError(f"{option} {limit:g} can never be met or missed; give a number above 0")
    return limits
