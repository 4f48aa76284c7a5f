"""What the report says about a finished job: the layers of the chosen network and the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy

from mm_edge.graph.groups import Group, TensorSlice
from mm_edge.records import Candidate, Layer, LayerPicture
from mm_edge.run.describe import describe_layers, write_command
from mm_edge.run.request import make_request


def test_the_command_has_every_option_that_is_not_its_default() -> None:
    request = make_request(
        data="my photos",
        out=Path("run"),
        input_size="3,32,32",
        inputs={"left": (1, 3, 32, 32), "right": (1, 8)},
        max_drop=1,
        macs="0.5,0.25",
        keep=("a*", "b"),
        ort=True,
        bench=False,
        recover="none",
    )
    assert write_command(request, "net.pt") == (
        "mm-edge prune-export net.pt --input-size 3,32,32 --input left=1,3,32,32 --input right=1,8 "
        "--keep 'a*' --keep b --data 'my photos' --out run "
        "--recover none --macs 0.5,0.25 --max-drop 1 --no-bench --ort"
    )


def picture(folder: Path, ranges: str, masked: str | None = "chosen.safetensors") -> tuple[LayerPicture, ...]:
    layer = Layer("a.weight", "conv", "expand", (4, 2, 1, 1), 0, 0, 8)
    weight = np.ones((4, 2, 1, 1), np.float32)
    weight[:2] = 0
    weight[2, 1] = 0
    safetensors.numpy.save_file({"a.weight": weight}, folder / "chosen.safetensors")
    group = Group("a.weight:0", 7, 4, (TensorSlice("a.weight", 0, np.arange(4)),), 1)
    measured = SimpleNamespace(kl=lambda count: count / 100)
    network: Any = SimpleNamespace(
        layers=(layer,), structure=SimpleNamespace(groups=(group,)), sensitivities={7: measured}
    )
    job: Any = SimpleNamespace(
        folder=folder, request=SimpleNamespace(ranges=ranges), model=SimpleNamespace(family="ResNet")
    )
    chosen = Candidate("a", "a", "a", "structured", "fp32", 0.5, 1, 1, (3, 8, 8), masked_state_dict=masked)
    return describe_layers(job, network, chosen)


def test_a_layer_has_its_widths_range_and_sensitivity(tmp_path: Path) -> None:
    (found,) = picture(tmp_path, "rules")
    assert (found.fqn, found.role, found.width, found.kept, found.sparsity) == ("a.weight", "expand", 4, 2, 0.625)
    assert found.lo is not None and found.hi is not None and 0 <= found.lo <= found.hi <= 1
    assert found.sensitivity == 0.03  # at 3 of 4 channels


def test_observed_ranges_are_left_out_and_networks_without_stored_weights_have_no_layers(tmp_path: Path) -> None:
    (found,) = picture(tmp_path, "observed")
    assert found.lo is found.hi is None
    assert picture(tmp_path, "rules", masked=None) == ()
