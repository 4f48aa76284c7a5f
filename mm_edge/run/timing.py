"""How long a plan takes on the target, before anything is recovered or judged: time does not depend on the weights.

A plan's graph with the dense weights is timed in turn with the dense network, in a short measurement. Candidates
are measured longer later. Times are stored per device, under the hash of everything they depend on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mm_edge.bench.session import environment, measure_pair
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.errors import BenchError
from mm_edge.formats.device_files import write_model
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.store import RunStore, hash_file, hash_key

PAIRS = 60


@dataclass(frozen=True)
class DeviceTimer:
    """Times graphs on one device.

    Attributes:
        dense: the file of the dense network, which graphs are compared with.
        target: the device profile, with threads and session options.
        transport: the connection to the device.
        fingerprint: the device's.
        store: holds the times.
        pairs: how many pairs of runs one measurement takes.
    """

    dense: Path
    target: Target
    transport: Transport
    fingerprint: str
    store: RunStore
    pairs: int = PAIRS

    def share(self, key: Mapping[str, Any], raw: RawGraph, structure: Structure, keep: Keep, *, quiet: bool) -> float:
        """Return the time of what `keep` leaves of a network, as a share of the dense network's.

        Args:
            key: what identifies the network; the widths are added.
            raw: the network.
            structure: its coupled groups.
            keep: the indices that stay, by group.
            quiet: use undisturbed runs only. This has less noise, for small differences, but is below the usual time.

        Raises:
            BenchError: the device could not measure.
        """
        widths = [int(keep[group.leaf].sum()) if group.leaf in keep else group.size for group in structure.groups]
        found = self._timed({**key, "widths": widths}, lambda: materialise(raw, structure, keep))
        return found[2 if quiet else 0]

    def dense_ms(self) -> float:
        """Return the median latency of the dense network, in milliseconds.

        Raises:
            BenchError: the device could not measure.
        """
        return self._timed({"model": "dense"}, None)[1]

    def _timed(self, key: Mapping[str, Any], make: Callable[[], ir.Model] | None) -> tuple[float, float, float]:
        """Return (share, dense milliseconds, quiet share); without `make` the dense network is timed against itself."""
        full = {
            **key,
            "dense": hash_file(self.dense),
            "target": self.target,
            "fingerprint": self.fingerprint,
            "pairs": self.pairs,
        }
        name = f"timed/{hash_key(full)[:16]}"
        stored = self.store.load_json(name, full)
        if stored is None:
            with tempfile.TemporaryDirectory() as folder:
                file = self.dense
                if make is not None:
                    file = Path(folder) / "plan.onnx"
                    write_model(ir.to_proto(deploy(make())), file)
                found = measure_pair(self.dense, file, self.target, transport=self.transport, pairs=self.pairs)
            if found.ratio is None or found.quiet_ratio is None or found.dense_latency.p50 is None:
                raise BenchError(f"{self.transport.name} gives no times, and a budget of time was asked for")
            stored = [1 / found.ratio, found.dense_latency.p50, 1 / found.quiet_ratio]
            self.store.save_json(name, full, stored)
        return float(stored[0]), float(stored[1]), float(stored[2])


def open_timer(dense: Path, target: Target, transport: Transport | None, store: RunStore) -> DeviceTimer | None:
    """Return the timer of the device of `transport`; None where nothing is measured or the device is emulated."""
    if transport is None or transport.source == "emulated":
        return None
    return DeviceTimer(dense, target, transport, str(environment(target, transport)["fingerprint"]), store)
