"""Fine-tuning of one candidate: its masked weights are trained in PyTorch and put into the graph by name.

saved masked state -> fine-tuned state (masks hold) -> compact graph -> file -> parity -> accuracy
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from mm_edge.arrays import Arrays
from mm_edge.graph.compact import AxisMask, mask_tensors
from mm_edge.plan.plans import ChannelPlan, Plan, WeightPlan
from mm_edge.quality.evaluation import judge_model
from mm_edge.records import Candidate
from mm_edge.recover.training.finetune import Checkpoints, Score, Settings, Student, finetune
from mm_edge.recover.training.shrink import group_slices
from mm_edge.run.make import MakeSettings, compact_model, read_masked_state, save_trained
from mm_edge.run.networks import Network
from mm_edge.run.reuse import load_or_make
from mm_edge.run.work import Work


def finetune_candidate(work: Work) -> Candidate:
    """Fine-tune a candidate, continue an earlier run, or return the one it stored.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    job, plan = work.job, work.plan
    model = work.networks.at(plan.side).model
    settings = _settings(work)
    key = job.key(model, data=job.data_key, plan=plan.digest(), settings=settings, start=work.start)
    name = f"finetuned/{plan.file_name}"
    unfinished = f"{name}-unfinished"
    checkpoints = Checkpoints(
        load=lambda: job.store.load_arrays(unfinished, key),
        save=lambda arrays: job.store.save_arrays(unfinished, key, arrays),
    )
    found = load_or_make(job, name, key, lambda: _finetune(work, settings, checkpoints))
    job.store.remove_arrays(unfinished)
    return found


def _settings(work: Work) -> Settings:
    """Return how to fine-tune: by labels where there are some, by the dense network's answers in every case."""
    job = work.job
    settings = Settings(epochs=job.request.epochs, seed=job.request.seed)
    if job.model.info.num_classes is None:
        return replace(settings, by_outputs=True, label_share=0.0, mixed=0.0)
    labelled = job.data is not None and job.data.labelled
    return settings if labelled else replace(settings, label_share=0.0)


def _finetune(work: Work, training: Settings, checkpoints: Checkpoints) -> Candidate:
    """Return the fine-tuned candidate, or the old one with the reason if no epoch was better."""
    candidate, settings = work.candidate, work.settings
    network = work.networks.at(work.plan.side)
    assert candidate.masked_state_dict is not None and network.data is not None
    plan, start = read_masked_state(network.structure, work.plan, settings.folder / candidate.masked_state_dict)
    found = finetune(
        _make_student(network, plan, start),
        network.data.calibration,
        network.spec,
        lambda state: _score(network, plan, settings, state),
        training,
        checkpoints,
        work.advance,
        lambda line: work.job.stages.tell(f"{plan.id}: {line}"),
    )
    if found.tensors is None:
        return replace(candidate, epochs=found.epochs, stopped=found.reason)
    made = save_trained(network, plan, settings, found.tensors, "finetune", f"{plan.file_name}-finetuned")
    return replace(made, epochs=found.epochs, stopped=found.reason)


def _make_student(network: Network, plan: Plan, start: Arrays) -> Student:
    module, structure = network.model.module, network.structure
    assert module is not None
    if not isinstance(plan, ChannelPlan):
        assert isinstance(plan, WeightPlan)
        return Student(module, start, dict(plan.masks), {}, network.raw.parameters)
    masks = {name: mask.dense() for name, mask in mask_tensors(structure, plan.keep).items()}
    idle = {
        name: AxisMask(structure.kept(name, plan.keep)).dense()
        for name in network.raw.buffers
        if name in structure.tensor_axes
    }
    groups = group_slices(structure, plan.keep, network.raw.parameters | network.raw.buffers)
    return Student(module, start, masks, idle, network.raw.parameters, groups)


def _score(network: Network, plan: Plan, settings: MakeSettings, state: Arrays) -> Score | None:
    """Return the score of a state on the validation images, run as the graph that would be exported."""
    if network.images.validation is None:
        return None
    model = ir.to_proto(compact_model(network, plan, state)).SerializeToString()
    found = judge_model(model, network.images.validation(), settings.reference, settings.threads)
    if found["fidelity"] is None:
        return Score(found["accuracy_top1"], found["kl_to_dense"])
    errors = [output.nmse for output in found["fidelity"].outputs.values() if output.nmse is not None]
    return Score(None, sum(errors) / len(errors) if errors else None)
