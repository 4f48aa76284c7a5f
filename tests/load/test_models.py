"""Every way a model comes in, and one clear line for every way it can be wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from mm_edge.errors import ModelError
from mm_edge.load.models import LoadOptions, load_model, wrap_module
from mm_edge.load.network import count_classes

NONE = LoadOptions()
IMAGENET = (0.485, 0.456, 0.406)

USER_CODE = """
from torch import nn

def build(num_classes=10):
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(4, num_classes))

def fail():
    raise ValueError("no such width")

number = 3
"""


def make(arch: str = "test_resnet", **arguments: Any) -> nn.Module:
    torch.manual_seed(1)
    result: nn.Module = timm.create_model(arch, **arguments)
    return result


def same_weights(module: nn.Module | None, other: nn.Module | None) -> bool:
    assert module is not None and other is not None
    a, b = module.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def refuse(source: object, options: LoadOptions = NONE) -> str:
    """The message of the error that loading raises: one line."""
    with pytest.raises(ModelError) as caught:
        load_model(str(source), options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def user_code(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(USER_CODE)
    return path


# ---- formats


def test_timm_checkpoint_prefers_ema_and_takes_its_own_preprocessing(tmp_path: Path) -> None:
    plain, averaged = make(num_classes=7), timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / "model.pt"
    arguments = argparse.Namespace(model="test_resnet", mean=[0.1, 0.2, 0.3], std=None, img_size=64, crop_pct=0.9)
    torch.save(
        {
            "arch": "test_resnet",
            "state_dict": plain.state_dict(),
            "state_dict_ema": averaged.state_dict(),
            "args": arguments,
        },
        path,
    )
    loaded = load_model(str(path), NONE)
    assert same_weights(loaded.module, averaged)
    assert loaded.input.shape == (3, 64, 64)
    assert loaded.input.mean == (0.1, 0.2, 0.3)
    assert loaded.input.std == averaged.pretrained_cfg["std"]
    assert loaded.input.crop_pct == 0.9
    assert loaded.module is not None and not loaded.module.training
    assert loaded.info.name == "test_resnet"
    assert loaded.info.source == "checkpoint, EMA weights model.pt"
    assert loaded.info.num_classes == 7
    assert loaded.info.macs is None
    assert loaded.info.params == sum(p.numel() for p in averaged.parameters())
    assert loaded.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.family == "ResNet"
    assert loaded.warnings == ()


def test_options_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"arch": "test_resnet", "state_dict": make().state_dict(), "args": argparse.Namespace(mean=[0.1])}, path)
    loaded = load_model(str(path), LoadOptions(input_size=(3, 96, 64), mean=(0.5,), std=(0.2, 0.3, 0.4)))
    assert loaded.input.shape == (3, 96, 64)
    assert loaded.input.mean == (0.5, 0.5, 0.5)
    assert loaded.input.std == (0.2, 0.3, 0.4)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_wrapper_prefixes_are_removed(tmp_path: Path, prefix: str) -> None:
    module = make()
    path = tmp_path / "bare.pth"
    torch.save({prefix + key: value for key, value in module.state_dict().items()}, path)
    assert same_weights(load_model(str(path), LoadOptions(arch="test_resnet")).module, module)


def test_a_prefix_the_network_has_itself_stays(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "    def forward(self, x):\n"
        "        return self.model(x)\n"
    )
    weights = {"model.1.weight": torch.ones(2, 12), "model.1.bias": torch.zeros(2)}
    torch.save(weights, tmp_path / "w.pt")
    options = LoadOptions(arch=f"{tmp_path / 'net.py'}:Net", input_size=(3, 2, 2))
    loaded = load_model(str(tmp_path / "w.pt"), options)
    assert loaded.module is not None
    assert torch.equal(loaded.module.get_parameter("model.1.weight"), torch.ones(2, 12))


def test_bare_state_dict_gives_classes_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    torch.save(make(num_classes=5, in_chans=1).state_dict(), path)
    loaded = load_model(str(path), LoadOptions(arch="test_resnet"))
    assert loaded.info.num_classes == 5
    assert loaded.input.shape[0] == 1
    assert len(loaded.input.mean) == len(loaded.input.std) == 1
    assert loaded.warnings == ("mean and std are known for 3 channels and the input has 1: their average is used",)


def test_torch_averaged_model_counter_is_dropped(tmp_path: Path) -> None:
    module = make()
    averaged = torch.optim.swa_utils.AveragedModel(module)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert same_weights(load_model(str(tmp_path / "swa.pt"), LoadOptions(arch="test_resnet")).module, module)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), [("test_vit", 64), ("levit_128s", 96), ("swin_tiny_patch4_window7_224", 96)])
def test_a_fixed_input_size_is_inferred_from_the_tensors(tmp_path: Path, arch: str, size: int) -> None:
    path = tmp_path / "small.pt"
    torch.save({"arch": arch, "state_dict": make(arch, img_size=size, num_classes=4).state_dict()}, path)
    loaded = load_model(str(path), NONE)
    assert loaded.input.shape == (3, size, size)
    assert loaded.info.num_classes == 4
    assert loaded.warnings == (f"input side {size} inferred from the tensors; --input-size says otherwise",)
    asked = load_model(str(path), LoadOptions(input_size=(3, size, size)))
    assert asked.input.shape == (3, size, size)
    assert asked.warnings == ()


def test_loading_leaves_caches_of_the_network_empty(tmp_path: Path) -> None:
    path = tmp_path / "levit.pt"
    torch.save({"arch": "levit_128s", "state_dict": make("levit_128s").state_dict()}, path)
    loaded = load_model(str(path), NONE)
    assert loaded.module is not None
    caches = [m.attention_bias_cache for m in loaded.module.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert not any(caches)


def test_safetensors_with_metadata_and_with_an_option(tmp_path: Path) -> None:
    module = make(num_classes=3)
    named, bare = tmp_path / "named.safetensors", tmp_path / "bare.safetensors"
    save_file(module.state_dict(), named, metadata={"arch": "test_resnet", "mean": "[0.5, 0.5, 0.5]"})
    save_file(module.state_dict(), bare)
    loaded = load_model(str(named), NONE)
    assert same_weights(loaded.module, module)
    assert loaded.input.mean == (0.5, 0.5, 0.5)
    assert same_weights(load_model(str(bare), LoadOptions(arch="test_resnet")).module, module)
    assert "does not name its architecture" in refuse(bare)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folder(tmp_path: Path, weights: str) -> None:
    module = make("test_vit", img_size=64, num_classes=2)
    if weights.endswith("safetensors"):
        save_file(module.state_dict(), tmp_path / weights)
    else:
        torch.save(module.state_dict(), tmp_path / weights)
    config = {
        "architecture": "test_vit",
        "num_classes": 2,
        "label_names": ["cat", "dog"],
        "model_args": {"img_size": 64},
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.4, 0.4, 0.4],
            "interpolation": "bilinear",
            "license": "cc-by-nc-4.0",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path), NONE)
    assert same_weights(loaded.module, module)
    assert loaded.labels == ("cat", "dog")
    assert loaded.info.licence == "cc-by-nc-4.0"
    assert loaded.input.shape == (3, 64, 64)
    assert loaded.input.mean == (0.4, 0.4, 0.4)
    assert loaded.input.interpolation == "bilinear"
    assert loaded.info.source == f"Hugging Face folder {weights}"


def test_timm_name_is_initialised_the_same_each_time_and_says_so() -> None:
    first, second = load_model("timm:test_resnet", NONE), load_model("timm:test_resnet", NONE)
    assert same_weights(first.module, second.module)
    assert first.info.sha256 is None
    assert first.info.source == "timm, random initialisation"
    assert first.warnings == (
        "no weights of test_resnet on this machine (none are downloaded): random initialisation, no accuracy",
    )
    assert load_model("timm:test_vit", LoadOptions(input_size=(1, 32, 32))).input.shape == (1, 32, 32)


def test_timm_name_uses_weights_an_earlier_download_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    cached = tmp_path / "model.safetensors"
    save_file(module.state_dict(), cached)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, filename: str(cached))
    loaded = load_model("timm:test_resnet", NONE)
    assert same_weights(loaded.module, module)
    assert loaded.info.source == "timm, weights from the local cache"
    assert loaded.warnings == ()


def test_user_code_builds_the_network(tmp_path: Path, user_code: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(USER_CODE, namespace)  # the same code as the file's
    module = namespace["build"](num_classes=3)
    torch.save(module.state_dict(), tmp_path / "w.pt")
    options = LoadOptions(arch=f"{user_code}:build", input_size=(3, 8, 8))
    loaded = load_model(str(tmp_path / "w.pt"), options)
    assert same_weights(loaded.module, module)
    assert loaded.info.num_classes == 3
    assert loaded.input.mean == IMAGENET
    assert loaded.warnings == (
        "preprocessing not stated, assumed: mean 0.485,0.456,0.406, std 0.229,0.224,0.225, scale 1/255, "
        "colours RGB, resize crop; give --preprocess NAME, or --mean, --std, --scale, --colours, --resize",
    )
    assert loaded.input.assumed == ("mean", "std", "scale", "colours", "resize")
    message = refuse(tmp_path / "w.pt", LoadOptions(arch=f"{user_code}:build"))
    assert message == "the input size of w is not known; add --input-size C,H,W"


def test_user_code_that_fails_is_quoted(tmp_path: Path, user_code: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    arch = f"{user_code}:fail"
    message = refuse(tmp_path / "w.pt", LoadOptions(arch=arch))
    assert message == f"--arch {arch}: calling it with () failed: ValueError: no such width"
    arch = f"{user_code}:biuld"
    message = refuse(tmp_path / "w.pt", LoadOptions(arch=arch))
    assert message == f"--arch {arch}: unknown callable 'biuld'; did you mean build or fail?"
    message = refuse(tmp_path / "w.pt", LoadOptions(arch="absent.py:build"))
    assert message == "--arch absent.py:build: the file 'absent.py' does not exist"


def test_a_file_cannot_name_code_to_run(tmp_path: Path, user_code: Path) -> None:
    torch.save({"arch": f"{user_code}:fail", "state_dict": {"w": torch.ones(1)}}, tmp_path / "w.pt")
    message = refuse(tmp_path / "w.pt")
    assert message == f"'{tmp_path / 'w.pt'}' names the code {user_code}:fail; to run it pass --arch {user_code}:fail"


def test_exported_program(tmp_path: Path) -> None:
    module = make(num_classes=4).eval()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 64, 64),)), path)
    loaded = load_model(str(path), NONE)
    assert loaded.module is not None
    assert set(dict(loaded.module.named_parameters())) == set(dict(module.named_parameters()))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(image), module(image))
    assert loaded.family == "ExportedProgram"
    assert loaded.input.shape == (3, 64, 64)
    assert loaded.info.num_classes == 4
    assert "net.pt2 was exported for a batch of 1; it is fed one image at a time" in loaded.warnings


def test_exported_program_of_any_batch(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    batch = torch.export.Dim("batch")
    program = torch.export.export(make().eval(), (torch.zeros(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    loaded = load_model(str(path), NONE)
    assert loaded.input.shape == (3, 64, 64)
    assert not any("batch of 1" in warning for warning in loaded.warnings)


def test_pickled_module_only_when_trusted(tmp_path: Path) -> None:
    module = make(num_classes=2)
    path = tmp_path / "whole.pt"
    torch.save(module, path)
    message = refuse(path)
    assert re.fullmatch(
        rf"'{path}' is a pickle that would run code when read \(it names timm\.\S+\); "
        "save its state_dict and give --arch, or pass --trust-pickle if you made the file",
        message,
    )
    loaded = load_model(str(path), LoadOptions(trust_pickle=True))
    assert same_weights(loaded.module, module)
    assert loaded.info.source == "pickled module whole.pt"


def test_wrapped_module_is_a_copy() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3)).half().train()
    loaded = wrap_module(module, torch.zeros(5, 1, 4, 4), name="mine", mean=[0.5], std=[0.25])
    assert module.training
    assert module[0].weight.dtype == torch.float16
    assert loaded.module is not None
    assert loaded.module.get_parameter("0.weight").dtype == torch.float32
    assert loaded.module is not None and not loaded.module.training
    assert loaded.input.shape == (1, 4, 4)
    assert (loaded.input.mean, loaded.input.std) == ((0.5,), (0.25,))
    assert (loaded.info.name, loaded.info.num_classes, loaded.family) == ("mine", 3, "Sequential")
    assert loaded.warnings == (
        "mine holds float16 weights; converted to float32",
        "preprocessing not stated, assumed: resize crop; give --preprocess NAME, or --resize",
    )
    with pytest.raises(ModelError, match=r"example_input has shape \(3, 4\); give a batch of images"):
        wrap_module(module, torch.zeros(3, 4), name="mine")


# ---- ONNX


def save_onnx(path: Path, shape: tuple[int | str | None, ...] = (1, 3, 4, 4), weight: np.ndarray | None = None) -> Path:
    weight = np.ones((48, 5), np.float32) if weight is None else weight
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (shape[0], 5))],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_onnx(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx")
    loaded = load_model(str(path), LoadOptions(mean=(0.5,), std=(0.5,)))
    assert loaded.module is None
    assert loaded.onnx_path == path
    assert loaded.input.shape == (3, 4, 4)
    assert (loaded.info.params, loaded.info.num_classes, loaded.family) == (240, 5, "onnx")
    assert loaded.warnings == (
        "preprocessing not stated, assumed: colours RGB, resize crop; give --preprocess NAME, or --colours, --resize",
    )
    assert len(load_model(str(path), NONE).warnings) == 1


def test_onnx_carries_its_preprocessing(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx")
    model = ir.load(path)
    model.metadata_props["mm_edge.input"] = json.dumps({"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.95})
    ir.save(model, path)
    loaded = load_model(str(path), NONE)
    assert (loaded.input.mean, loaded.input.std, loaded.input.crop_pct) == ((0.1,) * 3, (0.2,) * 3, 0.95)
    assert loaded.warnings == ()


def test_onnx_input_left_open_needs_the_option(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx", shape=("N", 3, "H", "W"))
    assert refuse(path) == f"'{path}' leaves sizes of its input open: x (?, 3, ?, ?); add --input x=1,3,H,W"
    assert load_model(str(path), LoadOptions(input_size=(3, 4, 4))).input.shape == (3, 4, 4)
    fixed = save_onnx(tmp_path / "fixed.onnx")
    message = refuse(fixed, LoadOptions(input_size=(3, 8, 8)))
    assert message == f"--input-size (3, 8, 8) is not the input of '{fixed}', (3, 4, 4)"


def test_onnx_external_data_must_be_beside_it(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx")
    ir.save(ir.load(path), path, external_data="net.data", size_threshold_bytes=0)
    assert load_model(str(path), NONE).info.params == 240
    (tmp_path / "net.data").unlink()
    assert refuse(path) == f"'{path}' keeps its weights in 'net.data', which is not beside it"


def test_onnx_refusals(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"this is no protobuf")
    assert refuse(path).startswith(f"'{path}' is not a valid ONNX model: ")
    weight = np.ones((48, 5), np.float32)
    weight[3, 1] = np.nan
    bad = save_onnx(tmp_path / "bad.onnx", weight=weight)
    assert refuse(bad) == f"'{bad}': 1 of 240 values of w are NaN or infinite; export it again"


# ---- bad input


def test_missing_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "absent.pt"
    assert refuse(path) == f"model '{path}' does not exist; give a file, a folder or timm:NAME"
    assert refuse("resnet18") == ("model 'resnet18' does not exist; for timm's network of that name give timm:resnet18")
    for name in ("empty.pt", "empty.onnx", "empty.safetensors", "empty.pt2"):
        (tmp_path / name).touch()
        assert refuse(tmp_path / name) == f"'{tmp_path / name}' is empty; save the model again"


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoint(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(make().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refuse(path, LoadOptions(arch="test_resnet")) == f"'{path}' is damaged or cut short; copy or save it again"


def test_truncated_safetensors_and_pt2(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(make().state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    assert refuse(path).startswith(f"'{path}' is not a safetensors file, or it is cut short: ")
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 and no more")
    assert refuse(path) == f"'{path}' is not a .pt2 file, or it is cut short; save it again with torch.export.save"


def test_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert refuse(path) == (
        f"'{path}' is not a model file; allowed: a PyTorch checkpoint or state_dict, .safetensors, .pt2, .onnx, "
        "or a Hugging Face folder"
    )
    torch.save([1, 2], tmp_path / "list.pt")
    assert refuse(tmp_path / "list.pt") == (
        f"'{tmp_path / 'list.pt'}' holds a list; give a checkpoint, a state_dict or a module"
    )
    torch.save({"epoch": 3}, tmp_path / "hollow.pt")
    assert refuse(tmp_path / "hollow.pt").endswith("found epoch")


class Attack:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", ["plain pickle", "zip", "old format"])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, write: str) -> None:
    path, touched = tmp_path / "model.pt", tmp_path / "touched"
    data = {"state_dict": {"w": torch.ones(1)}, "extra": Attack(touched)}
    if write == "plain pickle":
        path.write_bytes(pickle.dumps(Attack(touched), protocol=2))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=write == "zip")
    message = refuse(path, LoadOptions(arch="test_resnet"))
    assert message.startswith(f"'{path}' is a pickle that would run code when read (it names ")
    assert not touched.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, for what the test needs made
def test_torchscript_says_what_to_give_instead(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert refuse(path) == (
        f"'{path}' is TorchScript, which cannot be pruned; give the state_dict with --arch, or export an .onnx"
    )


def tampered(path: Path, out: Path, change: dict[str, str], extra: dict[str, bytes] | None = None) -> Path:
    """Copy a zip archive, replacing text in its members and adding some."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            for before, after in change.items():
                data = data.replace(before.encode(), after.encode()) if name.endswith(".json") else data
            target.writestr(name, data)
        for name, data in (extra or {}).items():
            target.writestr(f"{source.namelist()[0].partition('/')[0]}/{name}", data)
    return out


@pytest.mark.parametrize(
    ("change", "extra", "named"),
    [
        ({"torch.ops.aten.relu_.default": "torch.serialization.os.system"}, {}, "the operator torch.serialization.os"),
        ({"torch.ops.aten.relu_.default": "torch.ops.aten.from_file.default"}, {}, "the operator torch.ops.aten.from"),
        ({"torch.ops.aten.relu_.default": "_operator.methodcaller"}, {}, "the operator _operator.methodcaller"),
        ({'"target": "torch.ops.aten.relu_.default"': '"target": "x", "expr_str": "exec(chr(49))"'}, {}, "the "),
        ({}, {"data/constants/opaque_obj_0": b"x"}, "the member "),
        ({}, {"data/aotinductor/model/a.so": b"x"}, "the member "),
        ({}, {"DATA/weights/weight_0": b"x"}, "members of the same name"),
    ],
)
def test_a_pt2_that_could_run_code_is_refused(
    tmp_path: Path, change: dict[str, str], extra: dict[str, bytes], named: str
) -> None:
    path = tmp_path / "net.pt2"
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2)).eval()
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 4, 4),)), path)
    bad = tampered(path, tmp_path / "bad.pt2", change, extra)
    message = refuse(bad)
    assert message.startswith(f"'{bad}' holds {named}")
    assert message.endswith(
        "which could run code; give the state_dict with --arch or an .onnx, or pass --trust-pickle if you made the file"
    )


@pytest.mark.parametrize(
    "expression",
    ["s0", "2*s0 + s77", "Max(1, s0)", "s0 <= 3", "0.5*u0", "Symbol('s7', positive=True)", "FloorDiv(s0, 2) - 1"],
)
def test_expressions_of_dynamic_shapes_are_allowed(expression: str) -> None:
    from mm_edge.load.exported import _EXPRESSION

    assert _EXPRESSION.match(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "exec(1)",
        "s0.__class__",
        "__import__('os')",
        "a[0]",
        "exec (1)",
        "s0.real",
        "lambda: 1",
        "'x + 1'",
        "Lambda('exec(1)')",
    ],
)
def test_expressions_that_could_call_are_not(expression: str) -> None:
    from mm_edge.load.exported import _EXPRESSION

    assert not _EXPRESSION.match(expression)


@pytest.mark.slow
def test_wrong_arch_names_tensors_and_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(make("resnet18").state_dict(), path)
    message = refuse(path, LoadOptions(arch="resnet50"))
    assert message.startswith(
        f"'{path}' does not fit resnet50: layer1.0.conv1.weight is (64, 64, 3, 3) in the file and (64, 64, 1, 1) in "
        "the model; layer1.0.conv3.weight (256, 64, 1, 1) is missing from the file; layer1.0.bn3.weight (256,) is "
        "missing from the file; and "
    )
    assert re.search(r"; it fits --arch .*resnet18", message)


def test_wrong_arch_with_nothing_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.ones(2)}, path)
    message = refuse(path, LoadOptions(arch="test_vit"))
    assert "; nearest timm names: test_vit" in message
    assert "cls_token (1, 1, 64) is missing from the file" in message


def test_unknown_arch_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(make().state_dict(), path)
    message = refuse(path, LoadOptions(arch="tset_resnet"))
    assert message.startswith("unknown timm model 'tset_resnet'; did you mean test_resnet")
    assert refuse("timm:resnet81").startswith("unknown timm model 'resnet81'; did you mean resnet")
    assert refuse("timm:@").startswith("unknown timm model '@'; ")
    assert refuse(path) == (
        f"'{path}' does not name its architecture; add --arch NAME (a timm name) or --arch FILE.py:CALLABLE"
    )


def test_nan_weights_are_named_and_counted(tmp_path: Path) -> None:
    state = make().state_dict()
    name = "layer1.0.conv1.weight"
    state[name][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    path = tmp_path / "model.pt"
    torch.save({"arch": "test_resnet", "state_dict": state}, path)
    total = state[name].numel()
    assert refuse(path) == (
        f"'{path}': 2 of {total} values of {name} are NaN or infinite; give weights from before training diverged"
    )


def test_half_precision_is_converted_and_said(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"arch": "test_resnet", "state_dict": make().half().state_dict()}, path)
    loaded = load_model(str(path), NONE)
    assert loaded.module is not None
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.warnings == ("model.pt holds float16 weights; converted to float32",)


def test_folder_without_weights_or_configuration(tmp_path: Path) -> None:
    assert refuse(tmp_path) == (
        f"folder '{tmp_path}' holds none of model.safetensors and pytorch_model.bin; give a Hugging Face folder"
    )
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    assert "does not name its architecture" in refuse(tmp_path)
    (tmp_path / "config.json").write_text("[")
    assert refuse(tmp_path) == f"'{tmp_path / 'config.json'}' is not a JSON object; download the folder again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoadOptions(mean=(0.1, 0.2)), "--mean has 2 values; the input has 3 channels: give 1 or 3"),
        (LoadOptions(std=(0.0,)), "--std (0.0, 0.0, 0.0) must be above 0 in every channel"),
    ],
)
def test_preprocessing_options_are_checked(options: LoadOptions, message: str) -> None:
    assert refuse("timm:test_resnet", options) == message


def test_an_input_the_network_cannot_take(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"arch": "test_resnet", "state_dict": make().state_dict()}, path)
    message = refuse(path, LoadOptions(input_size=(4, 32, 32)))
    assert message.startswith("the network does not accept an input of shape (1, 4, 32, 32): RuntimeError: ")


def test_embeddings_and_single_columns_are_no_class_scores() -> None:
    probabilities = torch.tensor([[1.0, 0.0, 0.0]])
    assert count_classes(probabilities) == count_classes(torch.tensor([[-0.5, 2.0, 0.1]])) == 3
    assert count_classes(torch.tensor([[0.6, -0.8]])) is None
    assert count_classes(torch.tensor([[0.6]])) is None
    assert count_classes(torch.zeros(1, 3, 4)) is None
