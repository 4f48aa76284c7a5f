"""A model file that asks timm for more than a network: nothing is run, nothing is fetched, each trick is one line."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from mm_edge.errors import ModelError
from mm_edge.load.arguments import ARGUMENTS
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.load.timm_models import create_timm

NONE = LoadOptions()
ADDRESS = "http://192.0.2.1/weights.pth"


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        return open, (str(self._path), "w")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count every try to reach the network, with every switch that would forbid it off."""
    tries: list[str] = []

    def refuse(*_: Any, **__: Any) -> None:
        tries.append("socket")
        raise OSError("the network was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tries


def save_checkpoint(path: Path, model_args: dict[str, Any], **more: Any) -> Path:
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"arch": "test_resnet", "state_dict": state, "model_args": model_args, **more}, path)
    return path


def save_folder(path: Path, model_args: dict[str, Any], **more: Any) -> Path:
    path.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), path / "model.safetensors")
    config = {"architecture": "test_resnet", "model_args": model_args, **more}
    (path / "config.json").write_text(json.dumps(config))
    return path


def save_tensors(path: Path, model_args: dict[str, Any], **more: Any) -> Path:
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    values = {"model_args": json.dumps(model_args), **{name: json.dumps(value) for name, value in more.items()}}
    save_file(state, path, metadata={"arch": "test_resnet", **values})
    return path


SAVERS = {"net.pt": save_checkpoint, "folder": save_folder, "net.safetensors": save_tensors}


def same_weights_as(module: torch.nn.Module | None, state: dict[str, torch.Tensor]) -> bool:
    return module is not None and all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


def refuse(path: Path, options: LoadOptions = NONE) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(path), options)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 600
    assert caught.value.exit_code == 2
    return message


TRICKS: dict[str, Any] = {
    "checkpoint_path": "evil.pth",
    "pretrained": True,
    "pretrained_cfg": {"url": ADDRESS},
    "pretrained_cfg_overlay": {"url": ADDRESS},
    "pretrained_strict": False,
    "pretrained_model_args": {"num_classes": 3},
    "cache_dir": "/tmp/elsewhere",
    "features_only": True,
    "feature_cls": "hook",
    "out_indices": [0],
    "pruned": True,
    "scriptable": True,
    "no_jit": False,
    "device": "cuda",
    "dtype": "float16",
    "hybrid_backbone": "resnet18",
    "block": "os.system",
    "model_cfg": {},
    "__class__": "x",
    "weights\nnewline": 1,
    "x" * 5000: 1,
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("name", TRICKS, ids=lambda name: ascii(name)[:20])
def test_what_does_not_describe_a_network_is_refused_by_name(
    tmp_path: Path, no_network: list[str], saver: str, name: str
) -> None:
    path = SAVERS[saver](tmp_path / saver, {name: TRICKS[name]})
    message = refuse(path)
    assert ascii(name)[:60] in message and "which a model file may not set" in message
    assert no_network == []


def test_the_refusal_says_what_was_given_and_what_to_do(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "net.pt", {"checkpoint_path": "x.pth"})
    assert refuse(path) == (
        f"'{path}' gives timm the argument 'checkpoint_path', which a model file may not set; "
        "save it without that in its model_args, or give its state_dict with --arch NAME"
    )


@pytest.mark.parametrize("saver", SAVERS)
def test_a_pickle_named_by_the_file_is_not_read(tmp_path: Path, saver: str) -> None:
    evil, proof = tmp_path / "evil.pth", tmp_path / "it-ran"
    evil.write_bytes(pickle.dumps(Touch(proof)))
    for arguments in (
        {"checkpoint_path": str(evil)},
        {"pretrained": True, "pretrained_cfg": {"file": str(evil)}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(evil)}},
    ):
        path = SAVERS[saver](tmp_path / f"{len(list(tmp_path.iterdir()))}-{saver}", arguments)
        refuse(path)
        assert not proof.exists()


@pytest.mark.parametrize("where", ["args", "model_kwargs"])
def test_training_arguments_are_no_other_way_in(tmp_path: Path, no_network: list[str], where: str) -> None:
    tricks = {"pretrained": True, "pretrained_cfg_overlay": {"url": ADDRESS}}
    given = {"args": {"model_kwargs": tricks}} if where == "args" else {"args": {"model_args": tricks}}
    state = timm.create_model("test_resnet").state_dict()
    torch.save({"arch": "test_resnet", "state_dict": state, **given}, tmp_path / "net.pt")
    assert "'pretrained'" in refuse(tmp_path / "net.pt")
    assert no_network == []


@pytest.mark.parametrize("saver", SAVERS)
def test_a_configuration_of_weights_beside_the_arguments_is_never_followed(
    tmp_path: Path, no_network: list[str], saver: str
) -> None:
    more = {"pretrained": True, "pretrained_cfg": {"url": ADDRESS, "hf_hub_id": "nobody/nothing", "file": "evil.pth"}}
    path = SAVERS[saver](tmp_path / saver, {}, **more)
    assert load_model(str(path), NONE).info.num_classes == 3
    assert no_network == []


@pytest.mark.parametrize(
    "arch",
    ["hf-hub:nobody/nothing", "hf_hub:nobody/nothing", "local-dir:/tmp/x", "timm/resnet18", "http://192.0.2.1/x"],
)
def test_an_architecture_from_elsewhere_is_unknown(tmp_path: Path, no_network: list[str], arch: str) -> None:
    torch.save({"arch": arch, "state_dict": {"w": torch.ones(1)}}, tmp_path / "net.pt")
    assert refuse(tmp_path / "net.pt").startswith(f"unknown timm model '{arch}'")
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    assert refuse(tmp_path / "bare.pt", LoadOptions(arch=arch)).startswith(f"unknown timm model '{arch}'")
    assert no_network == []


@pytest.mark.parametrize("arch", ["a" * 201, "two\nlines", "\x1b[2J"])
def test_an_architecture_that_cannot_be_shown_is_refused(tmp_path: Path, arch: str) -> None:
    torch.save({"arch": arch, "state_dict": {"w": torch.ones(1)}}, tmp_path / "net.pt")
    assert "names the architecture" in refuse(tmp_path / "net.pt")


NESTED = [[[[2]]]]
OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    ("layers", [2, 2, 2, 201]),
    ("depth", 10**9),
    ("depths", [1] * 65),
    ("depths", NESTED),
    ("in_chans", 0),
    ("in_chans", 65),
    ("in_chans", [3]),
    ("in_chans", True),
    ("num_classes", -1),
    ("num_classes", 1_000_001),
    ("num_classes", "3"),
    ("img_size", 8193),
    ("img_size", [0, 32]),
    ("img_size", 8192),
    ("embed_dim", 1 << 40),
    ("window_size", 65),
    ("drop_rate", float("nan")),
    ("drop_rate", 2.0),
    ("mlp_ratio", float("inf")),
    ("qkv_bias", 1),
    ("act_layer", "os.system"),
    ("act_layer", "a" * 201),
    ("norm_layer", {"name": "x"}),
    ("global_pool", "avg\n"),
]


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS, ids=lambda value: ascii(value)[:20])
def test_a_value_out_of_bounds_is_refused_by_name(tmp_path: Path, saver: str, name: str, value: Any) -> None:
    path = SAVERS[saver](tmp_path / saver, {name: value})
    message = refuse(path)
    assert name in message and "; allowed: " in message and str(tmp_path) in message


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("given", [{"input_size": [3, 8193, 32]}, {"input_size": [0, 32, 32]}, {"img_size": 10**6}])
def test_an_input_too_large_is_refused(tmp_path: Path, saver: str, given: dict[str, Any]) -> None:
    path = SAVERS[saver](tmp_path / saver, {}, **({"args": given} if saver == "net.pt" else given))
    name = next(iter(given))
    assert f"{name} " in refuse(path)


def test_an_input_too_large_in_all_is_refused(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "folder", {}, input_size=[3, 8192, 8192])
    assert refuse(path) == (
        f"'{path / 'model.safetensors'}' states input_size [8192, 8192] for 3 channels; allowed: 67108864 values in "
        "all; save the model with its own input size"
    )


def test_the_bound_of_an_argument_is_in_the_message(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "net.pt", {"in_chans": 0})
    assert refuse(path) == (
        f"'{path}' gives in_chans 0; allowed: a whole number from 1 to 64; save the model with its own arguments"
    )


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("test_resnet", {"num_classes": 5, "in_chans": 1, "global_pool": "catavgmax", "drop_rate": 0.1}),
        ("test_resnet", {"layers": [1, 1, 1, 1], "channels": [16, 32, 32, 48], "act_layer": "silu", "stem_width": 16}),
        ("resnet18", {"channels": (16, 16, 32, 32), "output_stride": 16, "drop_path_rate": 0.1, "num_classes": 4}),
        (
            "vit_tiny_patch16_224",
            {
                "img_size": 32,
                "patch_size": 4,
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 3,
                "num_classes": 4,
                "qkv_bias": False,
                "init_values": 1e-5,
                "reg_tokens": 2,
                "class_token": True,
                "mlp_ratio": 2.0,
            },
        ),
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 32,
                "window_size": 4,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "embed_dim": 16,
                "num_classes": 3,
            },
        ),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "conv_mlp": True, "num_classes": 3}),
        ("levit_128s", {"depth": [1, 1, 1], "num_classes": 4, "act_layer": None}),
    ],
)
def test_what_honest_checkpoints_carry_is_taken(tmp_path: Path, arch: str, arguments: dict[str, Any]) -> None:
    given = {name: value for name, value in arguments.items() if value is not None}
    state = timm.create_model(arch, **given).state_dict()
    shape = [given.get("in_chans", 3), *[given.get("img_size", 224)] * 2]
    torch.save({"arch": arch, "state_dict": state, "model_args": arguments, "input_size": shape}, tmp_path / "net.pt")
    loaded = load_model(str(tmp_path / "net.pt"), NONE)
    assert loaded.build is not None
    taken = dict(loaded.build.arguments)
    assert all(taken[name] == value for name, value in given.items() if name != "img_size")
    assert same_weights_as(loaded.module, state)


def test_no_allowed_argument_names_a_place_or_code() -> None:
    words = {"path", "url", "file", "dir", "cfg", "fn", "cls", "device", "hub", "pretrained", "checkpoint", "cache"}
    named = {name for name in ARGUMENTS if words & set(name.split("_"))}
    assert named == {
        "head_fn",
        "pretrained_window_sizes",
        "drop_path_rate",
        "cls_attn_layers",
    }  # names of variants, numbers


def test_the_builder_itself_takes_nothing_else() -> None:
    with pytest.raises(ValueError, match="not an argument that describes a network: checkpoint_path"):
        create_timm("test_resnet", meta=True, checkpoint_path="x")


def test_a_timm_name_on_the_command_line_works_as_before_without_the_network(
    tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_model("timm:test_resnet", NONE).info.source == "timm, random initialisation"
    cached = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), cached)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, filename: str(cached))
    assert load_model("timm:test_resnet", NONE).info.source == "timm, weights from the local cache"
    assert no_network == []
