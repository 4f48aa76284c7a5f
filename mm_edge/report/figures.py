"""What a report says about each of its networks, as rows that the page, the comparison and the bundle show.

A row is read from the plain JSON of a candidate, so that a report of an older version gives rows too; what it does not
have is None. The quality of a row is the figure the run decided by, the first of these that is known:

    the user's metric, top-1 accuracy, mean average precision or intersection over union to dense, agreement with dense
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_edge.records import Fidelity, Report, from_json, to_json

DENSE = "dense"
CONTROL = "control"
CHOSEN = "chosen"
FRONT = "front"
OTHER = "candidate"
ROLES = (CHOSEN, FRONT, OTHER, CONTROL, DENSE)

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Quality:
    """A figure that says how good a network is.

    Attributes:
        name: what tables and axes call it.
        interval: the name of its 95 % interval in the JSON of a candidate; None where it has none.
        is_fraction: whether it lies in [0, 1] and is shown in percent, losses in points.
        higher_is_better: whether a larger value is the better one.
        read: takes the JSON of a candidate or of the dense figures and returns the value or None.
        of_dense: the dense network's value where `read` cannot tell.
    """

    name: str
    interval: str | None
    is_fraction: bool
    higher_is_better: bool
    read: Callable[[Figures], float | None]
    of_dense: float | None = None

    def loss(self, dense: float | None, value: float | None) -> float | None:
        """Return by how much `value` is worse than `dense`, in points of 100 where it is a fraction."""
        if dense is None or value is None:
            return None
        worse = dense - value if self.higher_is_better else value - dense
        return 100 * worse if self.is_fraction else worse


@dataclass(frozen=True)
class Row:
    """One network of a report; what was not measured is None.

    Attributes:
        id: the candidate's id, or "dense".
        role: one of ROLES.
        on_front: whether nothing else is both as good and as fast.
        loss: by how much its quality is worse than the dense network's, `loss_ci` its 95 % interval.
        macs_share: its multiply-adds as a share of the dense network's.
        verdict: how far its times can be trusted.
        same_as: other ids of the same network.
    """

    id: str
    role: str
    on_front: bool
    signal: str
    strategy: str
    kind: str
    precision: str
    size: str
    quality: float | None
    quality_ci: tuple[float, float] | None
    loss: float | None
    loss_ci: tuple[float, float] | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    p50: float | None
    p90: float | None
    p99: float | None
    verdict: str | None
    macs: int
    macs_share: float | None
    params: int
    sparsity: float | None
    file_bytes: int | None
    memory_bytes: int | None
    agreement: float | None
    divergence: float | None
    parity: float | None
    recovered_by: str | None
    planned_by: str | None
    artifact: str | None
    same_as: tuple[str, ...] = ()

    @property
    def loses_by_chance(self) -> bool:
        """Whether the interval of the loss holds 0: it cannot be told from the dense network."""
        return self.loss_ci is not None and self.loss_ci[0] <= 0 <= self.loss_ci[1]


@dataclass(frozen=True)
class Overview:
    """All rows of a report, the dense network first, and the quality they are compared by.

    `quality` is None where no figure is known.
    """

    quality: Quality | None
    dense: Row
    rows: tuple[Row, ...]

    @property
    def all(self) -> tuple[Row, ...]:
        """The dense network and every candidate."""
        return (self.dense, *self.rows)

    @property
    def chosen(self) -> Row | None:
        """The chosen candidate, or None."""
        return next((row for row in self.rows if row.role == CHOSEN), None)

    @property
    def is_timed(self) -> bool:
        """Whether the speed-up of any candidate was measured."""
        return any(row.speedup is not None for row in self.rows)


def read_overview(report: Report) -> Overview:
    """Return the rows of `report`."""
    dense, candidates = to_json(report.dense), [to_json(c) for c in report.candidates]
    quality = _pick_quality(dense, candidates)
    value = None if quality is None else _dense_value(quality, dense)
    chosen = None if report.chosen is None else report.chosen.id
    same: dict[str, list[str]] = {}
    for c in report.candidates:
        same.setdefault(c.artifact or c.id, []).append(c.id)
    rows = []
    for candidate, figures in zip(report.candidates, candidates, strict=True):
        if candidate.id == chosen:
            role = CHOSEN
        elif report.is_control(candidate):
            role = CONTROL
        else:
            role = FRONT if candidate.pareto else OTHER
        listed = [name for name in same[candidate.artifact or candidate.id] if name != candidate.id]
        others = tuple(dict.fromkeys((*candidate.also_ids, *listed)))
        rows.append(_read_row(figures, role, quality, value, report.dense.macs, others))
    return Overview(quality, _read_dense(report, dense, quality, value), tuple(rows))


def _pick_quality(dense: Figures, candidates: list[Figures]) -> Quality | None:
    known = [*_metric_quality(dense, candidates), *_FIXED]
    return next((q for q in known if any(q.read(figures) is not None for figures in (dense, *candidates))), None)


def _metric_quality(dense: Figures, candidates: list[Figures]) -> list[Quality]:
    """Return the user's metric as a quality, where there is one."""
    metric = next((figures["metric"] for figures in (dense, *candidates) if figures.get("metric")), None)
    if metric is None:
        return []
    return [
        Quality(
            str(metric.get("name", "metric")),
            None,
            bool(metric.get("is_fraction", False)),
            bool(metric.get("higher_is_better", True)),
            lambda figures: _inside(figures, "metric", "value"),
        )
    ]


def _inside(figures: Figures, section: str, name: str) -> float | None:
    """Return a figure of a section that may be absent."""
    found = (figures.get(section) or {}).get(name)
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _fidelity(figures: Figures) -> Fidelity:
    return from_json(Fidelity, figures.get("fidelity") or {})


def _read_map50(figures: Figures) -> float | None:
    found = _fidelity(figures)
    return found.map50_to_dense if found.has_enough_boxes else None


_FIXED = (
    Quality("top-1", "accuracy_ci", True, True, lambda figures: figures.get("accuracy_top1")),
    Quality("mAP50 to dense", None, True, True, _read_map50, 1.0),
    Quality("mIoU to dense", None, True, True, lambda figures: _inside(figures, "fidelity", "miou_to_dense"), 1.0),
    Quality("agreement with dense", None, True, True, lambda figures: figures.get("agreement_top1"), 1.0),
    Quality("likeness of the outputs to dense", None, True, True, lambda figures: _fidelity(figures).likeness, 1.0),
)


def _dense_value(quality: Quality, dense: Figures) -> float | None:
    found = quality.read(dense)
    return quality.of_dense if found is None else found


def _read_row(
    figures: Figures,
    role: str,
    quality: Quality | None,
    dense_value: float | None,
    dense_macs: int,
    same_as: tuple[str, ...],
) -> Row:
    latency = figures["latency_ms"]
    value = None if quality is None else quality.read(figures)
    is_accuracy = quality is not None and quality.interval is not None
    return Row(
        id=figures["id"],
        role=role,
        on_front=bool(figures["pareto"]),
        signal=figures["signal"],
        strategy=figures["strategy"],
        kind=figures["kind"],
        precision=figures["precision"],
        size=_size(figures["input_shape"]),
        quality=value,
        quality_ci=_interval(figures.get(quality.interval)) if quality is not None and quality.interval else None,
        loss=None if quality is None else quality.loss(dense_value, value),
        loss_ci=_interval(figures.get("drop_ci")) if is_accuracy else None,
        speedup=figures["speedup"],
        speedup_ci=_interval(figures["speedup_ci"]),
        p50=latency["p50"],
        p90=latency["p90"],
        p99=latency["p99"],
        verdict=latency.get("verdict"),
        macs=figures["macs"],
        macs_share=figures["macs"] / dense_macs if dense_macs else None,
        params=figures["params"],
        sparsity=figures["sparsity"],
        file_bytes=figures["file_bytes"],
        memory_bytes=figures["peak_memory_bytes"],
        agreement=figures["agreement_top1"],
        divergence=figures["kl_to_dense"],
        parity=None if figures["parity"] is None else figures["parity"]["max_rel_err"],
        recovered_by=figures["recovered_by"],
        planned_by=figures["planned_by"],
        artifact=figures["artifact"],
        same_as=same_as,
    )


def _read_dense(report: Report, dense: Figures, quality: Quality | None, value: float | None) -> Row:
    latency = dense["latency_ms"]
    return Row(
        id=DENSE,
        role=DENSE,
        on_front=False,
        signal="none",
        strategy=DENSE,
        kind=DENSE,
        precision="fp32",
        size=_size(report.model.input_shape),
        quality=value,
        quality_ci=_interval(dense.get(quality.interval)) if quality is not None and quality.interval else None,
        loss=None,
        loss_ci=None,
        speedup=None if latency["p50"] is None else 1.0,
        speedup_ci=None,
        p50=latency["p50"],
        p90=latency["p90"],
        p99=latency["p99"],
        verdict=latency.get("verdict"),
        macs=dense["macs"],
        macs_share=1.0 if dense["macs"] else None,
        params=dense["params"],
        sparsity=None,
        file_bytes=dense["file_bytes"],
        memory_bytes=dense["peak_memory_bytes"],
        agreement=None,
        divergence=None,
        parity=None,
        recovered_by=None,
        planned_by=None,
        artifact="dense.onnx",
    )


def _interval(found: Any) -> tuple[float, float] | None:
    return None if found is None else (float(found[0]), float(found[1]))


def _size(shape: Any) -> str:
    """Return the input's last two sizes, or one where they are equal."""
    sizes = list(shape)[-2:]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        return f"{sizes[0]} px"
    return "x".join(map(str, sizes))
