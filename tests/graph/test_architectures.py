"""Whole networks, shortened inputs: pruned for real at `balanced`, and the compact model equal to the masked module.

Norms, layer scales and BatchNorm statistics are randomised: with their initial ones and zeros nothing could go wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mm_edge.graph.compact import mask_tensors, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layer_weights, read_layers
from mm_edge.graph.rounding import round_widths
from mm_edge.graph.widths import allowed_widths, group_scores, select_indices
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.scores import score_weights
from mm_edge.plan.strategies import assign
from mm_edge.quality.parity import TOLERANCE, compare, onnx_runner, torch_runner

pytestmark = pytest.mark.slow

MULTIPLE = 8


class Plain(nn.Module):
    """What a user may write: residual, depthwise, gate, concatenation, chunk, attention and a token mean."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.wide = nn.Conv2d(width, 4 * width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.squeeze, self.excite = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, 4 * width, 1)
        self.narrow = nn.Conv2d(4 * width, width, 1)
        self.gated = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.qkv, self.proj = nn.Linear(2 * width, 6 * width), nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        h = nn.functional.hardswish(self.depthwise(self.wide(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        x = x + self.narrow(h * gate)
        a, b = self.gated(x).chunk(2, dim=1)
        x = self.norm(self.join(torch.cat([a * torch.sigmoid(b), x], dim=1)))
        tokens = x.flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, count, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        result: torch.Tensor = self.head(tokens.mean(1))
        return result


def randomise_(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Give one-dimensional parameters and BatchNorm statistics values of their own that keep activations in bounds."""
    torch.manual_seed(0)

    def set_statistics(part: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].transpose(0, 1).flatten(1)
        mean, var = x.mean(1), x.var(1)
        var = torch.maximum(var, torch.maximum(0.1 * var.mean(), 0.01 * mean.square()))
        part.get_buffer("running_mean").copy_(mean + 0.1 * var.sqrt() * torch.randn(len(mean)))
        part.get_buffer("running_var").copy_(var * (0.5 + torch.rand(len(mean))))

    with torch.no_grad():
        for parameter in module.parameters():
            largest = float(parameter.abs().max())
            if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):
                noise = torch.randn(parameter.shape)
                parameter.copy_(parameter + 0.2 * noise if largest > 0.5 else 0.2 + 0.1 * noise)
            elif largest < 1e-3:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
        norms = [part for part in module.modules() if getattr(part, "running_mean", None) is not None]
        hooks = [part.register_forward_pre_hook(set_statistics) for part in norms]
        module(torch.randn(4, *shape))
    for hook in hooks:
        hook.remove()


def assert_pruned_exactly(module: nn.Module, shape: tuple[int, int, int], least: float = 0.25) -> Structure:
    """Prune at `balanced` under the rules: at least `least` of the MACs go, and nothing else changes."""
    module.eval()
    randomise_(module, shape)
    raw = export_raw(module, torch.zeros(1, *shape))
    structure, layers = read_structure(raw), read_layers(raw)
    ranges = apply_constraints(layers, rule_ranges(layers, type(module).__name__), structured=True)
    (balanced,) = assign(("balanced",), "magnitude", layers, ranges)
    allowed = [allowed_widths(group, MULTIPLE) for group in structure.groups]
    counts = round_widths(structure, layers, balanced.sparsity, allowed)
    scores = score_weights(read_layer_weights(raw, layers), {}, ("magnitude",))["magnitude"]
    keep = select_indices(counts, group_scores(structure, scores))
    assert 1 - structure.macs({leaf: float(count) for leaf, count in counts.items()}) / structure.macs() >= least
    masked = copy.deepcopy(module)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in mask_tensors(structure, keep).items():
            parameters[name].mul_(torch.from_numpy(mask.dense()))
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).numpy()
    compact = onnx_runner(deploy(materialise(raw, structure, keep)))
    parity = compare(compact, torch_runner(masked), inputs, "noise")
    assert parity.max_rel_err <= TOLERANCE
    assert parity.top1_agreement == 1.0
    assert [out.shape for out in compact(inputs[:1])] == [out.shape for out in torch_runner(module)(inputs[:1])]
    assert compare(torch_runner(module), torch_runner(masked), inputs, "noise").max_rel_err > 1e-3, "a void test"
    return structure


def timm_net(name: str, **options: Any) -> nn.Module:
    import timm

    result: nn.Module = timm.create_model(name, num_classes=10, **options)
    return result


def reasons(structure: Structure) -> set[str]:
    return {group.reason for group in structure.pinned}


def test_a_plain_module_of_a_user() -> None:
    structure = assert_pruned_exactly(Plain(), (3, 32, 32))
    assert reasons(structure) == {"input of the model", "output of the model"}


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("resnet18", 64),
        ("resnet50", 64),
        ("vgg11_bn", 64),
        ("mobilenetv3_small_100", 64),
        ("tf_efficientnet_lite0", 64),
        ("regnety_002", 64),
    ],
)
def test_convolutional_networks_lose_channels_of_every_stream(name: str, pixels: int) -> None:
    structure = assert_pruned_exactly(timm_net(name), (3, pixels, pixels))
    assert reasons(structure) <= {"input of the model", "output of the model"}


def test_convnext_keeps_its_streams_because_of_their_norms() -> None:
    structure = assert_pruned_exactly(timm_net("convnext_atto"), (3, 64, 64))
    assert any(
        reason.startswith("LayerNormalization averages") or "a mean over it" in reason for reason in reasons(structure)
    )


def test_vision_transformer_loses_heads_widths_and_hidden_units() -> None:
    structure = assert_pruned_exactly(timm_net("vit_tiny_patch16_224", img_size=64), (3, 64, 64))
    ids = [group.id for group in structure.groups if group.id.startswith("blocks.0.")]
    assert len(ids) == 3, "heads, their width, hidden units"


# --- the rest of the zoo, by mechanism --------------------------------------------------------------

MECHANISMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "shifted windows, patch merging": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "window_size": 7, "depths": (2, 2, 2, 2)},
    ),
    "attention biases, shrinking attention": ("levit_128s", 224, {}),
    "dense connections": ("densenet121", 64, {"block_config": (3, 6, 6, 4)}),
    "ghost modules": ("ghostnet_050", 64, {}),
    "cross-covariance attention": ("xcit_nano_12_p8_224", 64, {"img_size": 64, "depth": 2}),
    "grouped convolutions in scales": ("res2next50", 64, {"layers": (1, 1, 1, 1)}),
    "split attention": ("resnest14d", 64, {}),
    "selective kernels": ("skresnet18", 64, {"layers": (1, 1, 1, 1)}),
    "linear attention": ("efficientvit_b0", 64, {}),
    "class attention, talking heads": ("cait_xxs24_224", 64, {"img_size": 64, "depth": 2}),
    "space to depth, blurred pooling": ("tresnet_m", 64, {"layers": (1, 1, 1, 1)}),
    "gated linear blocks": ("mambaout_femto", 64, {"depths": (1, 1, 2, 1)}),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_mechanisms(mechanism: str) -> None:
    name, pixels, options = MECHANISMS[mechanism]
    assert_pruned_exactly(timm_net(name, **options), (3, pixels, pixels), least=0.20)
