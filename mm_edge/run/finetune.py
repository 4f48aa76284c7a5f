"""The dearest stage on one candidate: its masked weights, fine-tuned in PyTorch, back through the graph by name.

    saved masked state -> fine-tuned state (masks hold) -> compact graph -> file -> parity -> accuracy

Which rows are worth it: what is on the front, and the best row of every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.errors import UsageError
from mm_edge.graph.compact import AxisMask, mask_tensors
from mm_edge.load.data import ImageSet
from mm_edge.load.models import LoadedModel
from mm_edge.plan.plans import ChannelPlan, Plan, WeightPlan
from mm_edge.progress import Advance
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.records import Candidate, DenseRow
from mm_edge.recover.training.finetune import Checkpoints, Score, Settings, Student, finetune
from mm_edge.recover.training.shrink import Slices, group_slices
from mm_edge.run.make import (
    Workbench,
    compact_model,
    read_masked_state,
    save_trained,
)
from mm_edge.select import mark_pareto, quality


def require_trainable(model: LoadedModel, recover: str = "finetune") -> None:
    """Refuse to `recover` a network that only runs.

    Raises:
        UsageError: it exists only as .onnx, or as a traced program.
    """
    if model.module is None or isinstance(model.module, torch.fx.GraphModule):
        what = "an .onnx file" if model.module is None else "an exported program"
        raise UsageError(
            f"--recover {recover} trains a PyTorch module, and {what} holds none; "
            "give the checkpoint with --arch, or use --recover closed-form"
        )


def worth_training(candidates: Sequence[Candidate], dense: DenseRow) -> list[Candidate]:
    """Return the rows to fine-tune: per kind those that nothing beats, and of every budget the most accurate alone.

    A whole network on smaller pictures is no rival to what is pruned: it is the control until it is trained.

    Structured rows are compared by accuracy against MACs; masks change no MACs and are compared by sparsity. Without
    accuracy nothing can be compared, and all are returned.
    """
    if any(row.accuracy_top1 is None for row in candidates):
        return list(candidates)
    budgets: dict[tuple[str, bool], list[Candidate]] = {}
    for row in candidates:
        if row.is_budget:
            budgets.setdefault((row.strategy, row.is_pruned), []).append(row)
    best = {max(rows, key=quality).id for rows in budgets.values()}
    # Rows of one budget differ by a hair in MACs, so that all of them may be on the front.
    beaten = {row.id for rows in budgets.values() for row in rows} - best
    front: set[str] = set()
    for kind in dict.fromkeys(row.kind for row in candidates):
        rows = [row for row in candidates if row.kind == kind]
        if kind == "structured":
            front |= {row.id for row in mark_pareto(rows, dense) if row.pareto}
        else:
            front |= {row.id for row in rows if not any(_denser_and_worse(row, other) for other in rows)}
    return [row for row in candidates if row.id in (front | best) - beaten]


def _denser_and_worse(row: Candidate, other: Candidate) -> bool:
    """Return whether `other` beats `row`: no less sparse, no less good, and better in one."""
    mine, theirs = (row.sparsity, *quality(row)), (other.sparsity, *quality(other))
    no_worse = theirs[0] >= mine[0] and theirs[1:] >= mine[1:]
    return no_worse and mine != theirs


def finetune_candidate(
    bench: Workbench,
    plan: Plan,
    row: Candidate,
    images: ImageSet,
    settings: Settings,
    checkpoints: Checkpoints,
    advance: Advance,
    tell: Callable[[str], None],
) -> Candidate:
    """Fine-tune the network of `row` and return its new record; the old one, with why, where nothing was better.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    assert bench.module is not None and row.masked_state_dict is not None
    plan, start = read_masked_state(bench.structure, plan, bench.folder / row.masked_state_dict)
    found = finetune(
        _student(bench, plan, start),
        images,
        bench.spec,
        lambda state: _score(bench, plan, state),
        settings,
        checkpoints,
        advance,
        tell,
    )
    if found.tensors is None:
        return replace(row, epochs=found.epochs, stopped=found.reason)
    made = save_trained(bench, plan, found.tensors, "finetune", f"{plan.file_name}-finetuned")
    return replace(made, epochs=found.epochs, stopped=found.reason)


def _student(bench: Workbench, plan: Plan, start: Arrays) -> Student:
    assert bench.module is not None
    structure = bench.structure
    groups: tuple[Slices, ...] = ()
    masks: dict[str, BoolArray] = {}
    idle: dict[str, BoolArray] = {}
    if isinstance(plan, WeightPlan):
        masks = dict(plan.masks)
    if isinstance(plan, ChannelPlan):
        masks = {name: mask.dense() for name, mask in mask_tensors(structure, plan.keep).items()}
        idle = {
            name: AxisMask(structure.kept(name, plan.keep)).dense()
            for name in bench.raw.buffers
            if name in structure.tensor_axes
        }
        groups = group_slices(structure, plan.keep, bench.raw.parameters | bench.raw.buffers)
    return Student(bench.module, start, masks, idle, bench.raw.parameters, groups)


def _score(bench: Workbench, plan: Plan, state: Arrays) -> Score | None:
    """Return what the validation images say of a state, by the graph that would be exported."""
    if bench.images.validation is None:
        return None
    model = ir.to_proto(compact_model(bench, plan, state)).SerializeToString()
    logits = run_onnx(model, bench.images.validation(), bench.threads)
    found = compare_logits(logits, bench.images.labels, bench.images.dense_logits)
    return Score(found.accuracy_top1, found.kl_to_dense)
