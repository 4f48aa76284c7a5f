"""Roles, stages and MACs on nets worked out by hand and on shortened real networks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

import mm_edge  # noqa: F401  makes timm importable beside CPU-only torch
from mm_edge.demo import MODEL
from mm_edge.errors import ModelError
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.layers import ROLES, read_layer_weights, read_layers
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.plan.ranges import DEFAULT_ROLE_RANGES, GENERAL_ROLE, rule_ranges
from mm_edge.records import Layer


def layers_of(module: nn.Module, *shape: int) -> dict[str, Layer]:
    return {layer.fqn: layer for layer in read_layers(export_raw(module.eval(), torch.zeros(1, *shape)))}


def timm_layers(name: str, px: int, **options: object) -> tuple[Layer, ...]:
    import timm

    module = timm.create_model(name, num_classes=7, **options)
    return read_layers(export_raw(module.eval(), torch.zeros(1, 3, px, px)))


def count_roles(layers: tuple[Layer, ...]) -> Counter[str]:
    return Counter(layer.role for layer in layers)


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(width, 2, 1)
        self.grow = nn.Conv2d(2, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.grow(torch.relu(self.shrink(pooled))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = Gate(8)
        self.c = nn.Conv2d(8, 16, 1)
        self.swish = nn.SiLU()
        self.d = nn.Conv2d(16, 12, 3, stride=2, padding=1, groups=4)
        self.e = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(self.b(torch.relu(self.norm(self.a(x)))))
        x = self.d(self.swish(self.c(x)))
        result: torch.Tensor = self.e(x.mean((2, 3)))
        return result


def test_conv_net_by_hand() -> None:
    layers = layers_of(ConvNet(), 3, 16, 16)
    assert {fqn: (layer.kind, layer.role, layer.stage, layer.macs) for fqn, layer in layers.items()} == {
        "a.weight": ("conv", "stem", 0, 8 * 8 * 8 * 27),
        "b.weight": ("depthwise", "depthwise", 0, 8 * 8 * 8 * 9),
        "gate.shrink.weight": ("conv", "se", 0, 16),
        "gate.grow.weight": ("conv", "se", 0, 16),
        "c.weight": ("conv", "conv", 0, 8 * 8 * 8 * 16),
        "d.weight": ("conv", "downsample", 1, 4 * 4 * 12 * 4 * 9),
        "e.weight": ("linear", "classifier", 1, 60),
    }
    assert [layer.index for layer in layers.values()] == list(range(7))
    assert layers["d.weight"].shape == (12, 4, 3, 3) and layers["d.weight"].numel == 432


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.w1, self.w2 = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w3, self.w4 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.w1(self.norm_a(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.w2(mixed)
        result: torch.Tensor = x + self.w4(functional.gelu(self.w3(self.norm_b(x))))
        return result


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(Block(8, 2), Block(8, 2))
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.cut(x).flatten(2).transpose(1, 2))
        result: torch.Tensor = self.out(self.norm(x).mean(1))
        return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transformer_by_hand_and_from_an_onnx_file(tmp_path: Path) -> None:
    raw = export_raw(Transformer().eval(), torch.zeros(1, 3, 16, 16))
    layers = read_layers(raw)
    roles = {layer.fqn: layer.role for layer in layers}
    assert roles == {
        "cut.weight": "patch_embedding",
        **{f"blocks.{i}.w1.weight": "qkv" for i in (0, 1)},
        **{f"blocks.{i}.w2.weight": "attention_projection" for i in (0, 1)},
        **{f"blocks.{i}.w3.weight": "mlp_fc1" for i in (0, 1)},
        **{f"blocks.{i}.w4.weight": "mlp_fc2" for i in (0, 1)},
        "out.weight": "classifier",
    }
    macs = {layer.fqn: layer.macs for layer in layers}
    assert macs["cut.weight"] == 16 * 8 * 48 and macs["blocks.0.w1.weight"] == 16 * 8 * 24
    assert {layer.stage for layer in layers} == {0}

    torch.onnx.export(Transformer().eval(), (torch.zeros(1, 3, 16, 16),), tmp_path / "own.onnx", verbose=False)
    own = read_layers(raw_from_onnx(tmp_path / "own.onnx"))
    assert [(layer.role, layer.macs, layer.numel) for layer in own] == [
        (layer.role, layer.macs, layer.numel) for layer in layers
    ]


class Odd(nn.Module):
    """A standardised weight, a shared weight, an einsum, a bias network and a hidden linear."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.shared = nn.Linear(4, 4)
        self.mix = nn.Parameter(torch.randn(4, 6))
        self.table = nn.Parameter(torch.randn(5, 2))
        self.lift = nn.Linear(2, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = (self.kernel - self.kernel.mean((1, 2, 3), keepdim=True)) * self.gain
        x = functional.conv2d(x, kernel, padding=1).flatten(2).transpose(1, 2)
        x = self.shared(torch.tanh(self.shared(x)))
        x = torch.einsum("btc,cd->btd", x, self.mix)
        result: torch.Tensor = self.last(x.mean(1) + self.lift(self.table).mean(0))
        return result


def test_odd_places_do_not_raise() -> None:
    layers = layers_of(Odd(), 3, 8, 8)
    # What "lift" computes of parameters alone is folded, and no layer any more.
    assert list(layers) == ["kernel", "shared.weight", "mix", "last.weight"]
    assert layers["kernel"].role == "stem" and layers["kernel"].macs == 64 * 108
    assert layers["shared.weight"].macs == 2 * 64 * 16
    assert layers["mix"].macs == 64 * 24
    assert layers["last.weight"].role == "classifier"


def test_no_weights_and_unknown_shapes_do_not_raise() -> None:
    x, w = ir.val("x", ir.DataType.FLOAT, (1, 4)), ir.val("w", ir.DataType.FLOAT, (4, 2))
    w.const_value = ir.tensor(np.ones((4, 2), np.float32), name="w")
    node = ir.node("MatMul", [x, w])
    model = ir.Model(
        ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[w], opset_imports={"": 20}), ir_version=10
    )
    (layer,) = read_layers(RawGraph(model, frozenset({"w"}), frozenset()))
    assert (layer.shape, layer.macs) == ((4, 2), 8)
    assert read_layers(RawGraph(model, frozenset(), frozenset())) == ()


def test_weights_are_read_by_name_and_must_be_finite() -> None:
    module = Transformer()
    raw = export_raw(module, torch.zeros(1, 3, 16, 16))
    weights = read_layer_weights(raw, read_layers(raw))
    state = dict(module.named_parameters())
    assert all(np.array_equal(value, state[fqn].detach().numpy()) for fqn, value in weights.items())
    with torch.no_grad():
        module.out.weight[0, 0] = float("nan")
    broken = export_raw(module, torch.zeros(1, 3, 16, 16))
    with pytest.raises(ModelError) as caught:
        read_layer_weights(broken, read_layers(broken))
    assert str(caught.value) == "weight 'out.weight' holds NaN or infinite values; give a sound checkpoint"


@pytest.mark.slow
def test_resnet() -> None:
    layers = timm_layers("resnet18", 64)
    assert count_roles(layers) == {"stem": 1, "conv": 13, "downsample": 6, "classifier": 1}
    stages = {layer.fqn.split(".")[0]: layer.stage for layer in layers}
    assert stages == {"conv1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "fc": 4}


def test_resnet_whose_last_stage_sees_one_pixel_keeps_its_stages() -> None:
    stages = {layer.fqn.split(".")[0]: layer.stage for layer in timm_layers("resnet18", 32)}
    assert stages == {"conv1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "fc": 4}


@pytest.mark.slow
def test_swin() -> None:
    layers = timm_layers("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=2, depths=(1, 2, 1, 1))
    assert count_roles(layers) == {
        "patch_embedding": 1,
        "qkv": 5,
        "attention_projection": 5,
        "mlp_fc1": 5,
        "mlp_fc2": 5,
        "downsample": 3,
        "classifier": 1,
    }
    by_stage = [{layer.stage for layer in layers if layer.fqn.startswith(f"layers.{i}.")} for i in range(4)]
    assert by_stage == [{0}, {1}, {2}, {3}]


@pytest.mark.slow
def test_levit() -> None:
    layers = timm_layers("levit_128s", 224, depth=(1, 1, 1))
    roles = count_roles(layers)
    assert roles["patch_embedding"] == 4 and roles["classifier"] == 2
    assert roles["qkv"] == 7 and roles["attention_projection"] == 5
    assert roles["mlp_fc1"] == roles["mlp_fc2"] == 5 and sum(roles.values()) == 28


@pytest.mark.slow
def test_mobilenet_with_squeeze_and_excitation() -> None:
    roles = count_roles(timm_layers("mobilenetv3_small_100", 64))
    assert roles == {"stem": 1, "conv": 23, "depthwise": 11, "se": 18, "classifier": 1}


def roles_of(name: str, side: int) -> dict[str, str]:
    return {layer.fqn: layer.role for layer in timm_layers(name, side)}


@pytest.mark.slow
def test_a_deep_stem_and_pooled_shortcuts_of_resnet_d() -> None:
    layers = {layer.fqn: layer for layer in timm_layers("resnet18d", 64)}
    assert [layers[f"conv1.{i}.weight"].role for i in (0, 3, 6)] == ["stem", "deep_stem", "deep_stem"]
    pooled = [layers[f"layer{i}.0.downsample.1.weight"] for i in (2, 3, 4)]
    assert [(layer.role, layer.stage) for layer in pooled] == [("downsample", 2), ("downsample", 3), ("downsample", 4)]
    ranges = rule_ranges(tuple(layers.values()), "ResNet")
    rows = {fqn: ranges[fqn].reason for fqn in ranges}
    assert rows["conv1.3.weight"] == "rule ResNet: deep_stem"
    # The stages of the blocks are counted from the first block, not from the stem.
    assert [rows[f"layer{i}.1.conv1.weight"] for i in (1, 2, 3, 4)] == [
        f"rule ResNet: conv, stage row {i}" for i in (1, 2, 3, 4)
    ]


def rows_of(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Return the row of each layer of a ResNet, without the words that all share."""
    ranges = rule_ranges(layers, "ResNet")
    return {fqn.removesuffix(".weight"): found.reason.removeprefix("rule ResNet: ") for fqn, found in ranges.items()}


def test_the_rows_of_the_demo() -> None:
    """A ResNet with a deep stem, pooled shortcuts and one bottleneck, whose first convolution sees the larger map."""
    import timm

    module = timm.create_model(f"local-dir:{MODEL}").eval()
    assert rows_of(read_layers(export_raw(module, torch.zeros(1, 1, 32, 32)))) == {
        "conv1.0": "stem",
        "conv1.3": "deep_stem",
        "conv1.6": "deep_stem",
        "layer1.0.conv1": "conv, stage row 1",
        "layer1.0.conv2": "conv, stage row 1",
        "layer2.0.conv1": "downsample",
        "layer2.0.conv2": "conv, stage row 2",
        "layer2.0.downsample.1": "downsample",
        "layer3.0.conv1": "conv, stage row 2",
        "layer3.0.conv2": "downsample",
        "layer3.0.conv3": "conv, stage row 3",
        "layer3.0.downsample.1": "downsample",
        "layer4.0.conv1": "downsample",
        "layer4.0.conv2": "conv, stage row 4",
        "layer4.0.downsample.1": "downsample",
        "fc": "classifier",
    }


@pytest.mark.slow
def test_the_rows_of_bottlenecks() -> None:
    """ResNet-50 with two blocks a stage: the 1x1 before the strided 3x3 sees the stage before."""
    rows = rows_of(timm_layers("resnet50", 64, layers=(2, 2, 2, 2)))
    for stage in (1, 2, 3, 4):
        later = {rows[f"layer{stage}.0.conv3"], *(rows[f"layer{stage}.1.conv{i}"] for i in (1, 2, 3))}
        assert later == {f"conv, stage row {stage}"}
        assert rows[f"layer{stage}.0.conv1"] == f"conv, stage row {max(1, stage - 1)}"
        strided = {rows[f"layer{stage}.0.conv2"], rows[f"layer{stage}.0.downsample.0"]}
        assert strided == ({"downsample"} if stage > 1 else {"conv, stage row 1"})
    assert (rows["conv1"], rows["fc"]) == ("stem", "classifier")


@pytest.mark.slow
def test_vgg_s_linear_layers_are_no_convolutions_though_they_are_written_as_such() -> None:
    roles = roles_of("vgg11_bn", 64)
    assert (roles["pre_logits.fc1.weight"], roles["pre_logits.fc2.weight"]) == ("mlp_fc1", "mlp_fc1")
    assert roles["features.0.weight"] == "stem" and roles["features.25.weight"] == "conv"


@pytest.mark.slow
def test_a_last_stage_of_one_pixel_is_no_linear_layer_and_a_plain_shortcut_is_not_pooled() -> None:
    roles = roles_of("resnet26", 32)
    assert roles["layer4.1.conv2.weight"] == "conv" and roles["layer4.1.conv3.weight"] == "conv"
    assert roles["layer1.0.downsample.0.weight"] == "conv"


def test_every_role_is_described() -> None:
    roles = {*DEFAULT_ROLE_RANGES, *GENERAL_ROLE}
    assert set(ROLES) == roles | {"mlp_fc1", "mlp_fc2"}
