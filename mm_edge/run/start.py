"""The start of a run: load, refuse what cannot be done, lock the run directory, run the stages.

Everything that can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from mm_edge.bench.connect import open_transport
from mm_edge.bench.target import load_target, matches_this_machine, resolve_host
from mm_edge.errors import UsageError
from mm_edge.graph.sizes import remake
from mm_edge.load.annotations import Labels, open_labels, require_photos
from mm_edge.load.data import DataSplits, open_data
from mm_edge.load.models import LoadedModel
from mm_edge.progress import Stages
from mm_edge.records import Report
from mm_edge.run.checks import check_request, require_gradients, require_trainable
from mm_edge.run.job import Job
from mm_edge.run.loss import open_loss
from mm_edge.run.measure import SAMPLES_FOLDER
from mm_edge.run.metric import open_metric
from mm_edge.run.pipeline import run_stages
from mm_edge.run.request import Request
from mm_edge.store import RunStore, check_folder


def start(load: Callable[[], LoadedModel], request: Request, stages: Stages) -> Report:
    """Check everything that can be refused, then run the stages in the run directory.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept.
    """
    check_folder(request.out)
    target = resolve_host(load_target(request.target))
    with stages.stage("load"):
        model = load()
        require_trainable(model, request.recover)
        require_gradients(model, request.loss)
        for side in request.input_sizes if isinstance(request.input_sizes, tuple) else ():
            remake(model, side)  # refuses what the network cannot take
        data = None
        if request.data is not None:
            named = model.onnx_path is not None or len(model.inputs) > 1
            classes, inputs = model.info.num_classes, model.inputs if named else ()
            data = open_data(request.data, model.input, classes, request.split, request.seed, inputs)
    measured = request.bench and (request.host is not None or matches_this_machine(target))
    check_request(request, data, target, measured, model.input, model.info.num_classes is not None)
    metric = None if request.metric is None else open_metric(request.metric)
    loss = None if request.loss is None else open_loss(request.loss)
    labels = None if request.labels is None or data is None else _open_labels(request.labels, data)
    transport = open_transport(target, request.host, stages.tell) if measured else None
    store = RunStore(request.out)
    with store.lock():
        if not request.resume:
            store.clear()
            store.remove_owned(SAMPLES_FOLDER)
        job = Job(request, model, data, target, transport, store.folder, store, stages, labels, metric, loss)
        try:
            with transport or nullcontext():
                return run_stages(job)
        except UsageError:
            store.discard()
            raise


def _open_labels(path: str, data: DataSplits) -> Labels:
    """Read boxes or masks, and refuse those of other photos."""
    labels = open_labels(path)
    require_photos(labels, path, data.validation.names)
    return labels
