"""What a model file may say of the network it is for.

A file's `model_args` go to a timm constructor, which takes much more than sizes: places to download from, files to
unpickle, classes to call. So only the arguments listed here are passed on, with values inside bounds. They describe
the network; none of them names a file, an address or code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_edge.errors import ModelError

MAX_SIDE = 8192
MAX_INPUT_VALUES = 1 << 26  # channels x height x width: 256 MiB in fp32
MAX_CHANNELS = 64
MAX_CLASSES = 1_000_000
MAX_TEXT = 200
MAX_ENTRIES = 64
MAX_NESTING = 3
_SHOWN = 60
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]*")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; with `many`, also lists of such."""

    low: int
    high: int
    many: bool = True

    def accepts(self, value: Any) -> bool:
        """Return whether one value is allowed."""
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        """Say what is allowed."""
        return f"{'whole numbers' if self.many else 'a whole number'} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`, or lists of such."""

    low: float
    high: float
    many: bool = True

    def accepts(self, value: Any) -> bool:
        """Return whether one value is allowed; NaN is not."""
        return type(value) in (int, float) and self.low <= value <= self.high

    def __str__(self) -> str:
        """Say what is allowed."""
        return f"numbers from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Switch:
    """True or false, or lists of such."""

    many: bool = True

    def accepts(self, value: Any) -> bool:
        """Return whether one value is allowed."""
        return type(value) is bool

    def __str__(self) -> str:
        """Say what is allowed."""
        return "true or false"


@dataclass(frozen=True)
class Name:
    """The plain name of a layer or variant timm knows, or lists of such; `or_switch` allows true and false as well."""

    or_switch: bool = False
    many: bool = True

    def accepts(self, value: Any) -> bool:
        """Return whether one value is allowed."""
        if type(value) is bool:
            return self.or_switch
        return type(value) is str and len(value) <= MAX_TEXT and _PLAIN_NAME.fullmatch(value) is not None

    def __str__(self) -> str:
        """Say what is allowed."""
        return f"plain names of letters, digits and _, at most {MAX_TEXT} characters"


Kind = Whole | Real | Switch | Name

_GROUPS: tuple[tuple[Kind, str], ...] = (
    (Whole(0, MAX_CLASSES, many=False), "num_classes"),
    (Whole(1, MAX_CHANNELS, many=False), "in_chans"),
    (Whole(1, MAX_SIDE), "img_size ref_feat_shape"),
    # A layer of these costs time even where it has no weights.
    (Whole(0, 200), "depth depths depth_list layers stages num_blocks num_blocks_list serial_depths parallel_depth"),
    (Whole(0, 200), "transformer_depths block_config levels depth_token_only cls_attn_layers num_vit num_rnn_layers"),
    (Whole(0, 64), "window_size window_sizes pretrained_window_sizes window_ratio focal_windows focal_levels"),
    (Whole(0, 64), "pooling_kernel_size stem_kernel_size kernel_size kernel_sizes down_kernel_size mask_unit_size"),
    (Whole(0, 64), "repmixer_kernel_size pool_size q_pool q_stride num_levels"),
    (Whole(1, 256), "patch_size patch_sizes patch_kernel patch_stride down_patch_size down_stride stride strides"),
    (Whole(1, 64), "output_stride stem_stride first_stride downsample_ratio"),
    (Whole(0, 1024), "reg_tokens num_reg_tokens num_heads num_kv_heads heads attn_groups cardinality groups group"),
    (
        Whole(0, 65536),
        "embed_dim embed_dims dim dims base_dim base_dims channels widths width_list head_widths hidden_sizes head_dim "
        "head_hidden_size hidden_size num_features feature_dim key_dim qk_dim state_dim partial_dim inner_dim "
        "stem_width stem_size stem_chs stem_hidden_dim inplanes base_width growth_rate growth_rates num_init_features "
        "init_channels initial_chs final_chs neck_chans rel_pos_dim rope_dim block_reduce_first channel_multiplier",
    ),
    (
        Real(0, 1),
        "drop_rate drop_path_rate attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate drop_block_rate dropout "
        "drop norm_eps momentum",
    ),
    (
        Real(0, 100),
        "mlp_ratio mlp_ratios attn_mlp_ratio mlp_ratio_token_only ffn_ratio attn_ratio expand_ratio expansion_ratio "
        "stem_expand_ratio mbconv_expand_ratio downsample_expand_ratios conv_ratio bottle_ratio se_ratio sr_ratios "
        "width_factor width_mult depth_mult deepen_factor widen_factor init_values ls_init_value layerscale_value "
        "layer_scale layer_scale_init_value layer_scale_init_values res_scale_init_values head_init_scale eta "
        "dim_mul head_mul reduction ch_div img_scale",
    ),
    (Real(0, 1e9), "rope_temperature rope_theta"),
    (
        Switch(),
        "qkv_bias qkv_fused proj_bias mlp_bias bias conv_bias head_bias stem_bias qk_norm scale_norm scale_attn_norm "
        "scale_attn_inner scale_mlp scale_mlp_norm swiglu_mlp class_token no_embed_class pre_norm final_norm fc_norm "
        "patch_norm stem_norm stem_mid_norm embed_norm head_norm head_norm_first tokens_norm use_fc_norm use_post_norm "
        "use_grn use_conv use_pos_emb use_pos_embed use_abs_pos use_abs_pos_emb use_rel_pos use_rel_pos_bias "
        "use_shared_rel_pos_bias use_rot_pos_emb use_rope use_layer_scale use_mlp_head use_expand_proj "
        "use_pre_transformer_norm use_post_transformer_norm use_overlap_down use_post_norm_in_modulation "
        "use_lab use_aux_head use_mix_token shared_rel_pos dynamic_img_size dynamic_img_pad strict_img_size "
        "always_partition distilled distillation conv_mlp fused_conv fused_downsample multi_conv small_kernels "
        "avg_down zero_init_last replace_stem_pool aa_stem_only input_3x3 memory_efficient preact vit_stem "
        "downsamples se_downsamples outlook_attention mask_unit_attn sep_pos_embed abs_win_pos_embed fix_init fix_stem "
        "legacy linear basic bidirectional with_fc shortcut_root channel_attention ffn cpe_act extra_norm_stage v2 "
        "rope_rotate_half rope_mixed_mode named_blocks pool_include_prefix inference_mode",
    ),
    (Name(or_switch=True), "global_pool"),
    (
        Name(),
        "act_layer norm_layer norm_layer_cl norm_layer_2d aa_layer attn_layer se_layer fc_act_layer dw_act_layer "
        "attn_act_layer embed_norm_layer pad_type pool_type stem_type attn_type attn_types rope_type rel_pos_type "
        "block_type pos_embed weight_init union token_mixers encoder_pool attn_upsample rope_grid_indexing head_fn "
        "downsample down_op types",
    ),
)
ARGUMENTS: dict[str, Kind] = {name: kind for kind, names in _GROUPS for name in names.split()}


def read_arguments(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments the file `path` gives its timm network, every one of them allowed and inside its bounds.

    `config` is what the file says of itself; the arguments are its `model_args`.

    Raises:
        ModelError: an argument is not allowed, or out of bounds; the message names it.
    """
    given = config.get("model_args")
    if not isinstance(given, Mapping):
        return {}
    for name, value in given.items():
        _check_argument(path, name, value)
    arguments = {str(name): value for name, value in given.items() if value is not None}
    _check_total(path, "img_size", arguments.get("img_size"), arguments.get("in_chans", 3))
    return arguments


def check_name(path: Path, arch: str | None) -> None:
    """Refuse an architecture whose name is too long or cannot be shown in one line.

    Raises:
        ModelError: the name is no name.
    """
    if arch is not None and (len(arch) > MAX_TEXT or not arch.isprintable()):
        raise ModelError(
            f"'{path}' names the architecture {_show(arch)}; allowed: at most {MAX_TEXT} printable characters; "
            "give --arch NAME"
        )


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an input too large to run; what is not a size at all is left for the readers, which ignore it.

    Raises:
        ModelError: the channels, the height or the width are out of bounds.
    """
    shape = config.get("input_size")
    if isinstance(shape, (list, tuple)) and len(shape) == 3 and all(type(size) is int for size in shape):
        bounds = (Whole(1, MAX_CHANNELS), Whole(1, MAX_SIDE), Whole(1, MAX_SIDE))
        if not all(bound.accepts(size) for bound, size in zip(bounds, shape, strict=True)):
            raise ModelError(
                f"'{path}' states input_size {_show(shape)}; allowed: 1 to {MAX_CHANNELS} channels, "
                f"height and width from 1 to {MAX_SIDE}; save the model with its own input size"
            )
        _check_total(path, "input_size", list(shape[1:]), shape[0])
    for name, kind in (("img_size", ARGUMENTS["img_size"]), ("in_chans", ARGUMENTS["in_chans"])):
        if type(config.get(name)) is int and not kind.accepts(config[name]):
            raise _out_of_bounds(path, name, config[name], kind)
    if type(config.get("img_size")) is int:
        _check_total(path, "img_size", config["img_size"], 3)


def _check_argument(path: Path, name: Any, value: Any) -> None:
    kind = ARGUMENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ModelError(
            f"'{path}' gives timm the argument {_show(name)}, which a model file may not set; "
            "save it without that in its model_args, or give its state_dict with --arch NAME"
        )
    if value is not None and not _fits(kind, value, MAX_NESTING):
        raise _out_of_bounds(path, name, value, kind)


def _fits(kind: Kind, value: Any, nesting: int) -> bool:
    """Return whether `value` is of the kind, or a list of at most MAX_ENTRIES of it; lists nest at most `nesting`."""
    if not isinstance(value, (list, tuple)):
        return kind.accepts(value)
    if not kind.many or nesting == 0 or not len(value) <= MAX_ENTRIES:
        return False
    return all(item is None or _fits(kind, item, nesting - 1) for item in value)


def _check_total(path: Path, name: str, size: Any, channels: int) -> None:
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if not all(type(side) is int for side in sides):
        return
    height, width = (sides * 2)[:2] if sides else (0, 0)
    if height * width * channels > MAX_INPUT_VALUES:
        raise ModelError(
            f"'{path}' states {name} {_show(size)} for {channels} channels; allowed: {MAX_INPUT_VALUES} values in all; "
            "save the model with its own input size"
        )


def _out_of_bounds(path: Path, name: str, value: Any, kind: Kind) -> ModelError:
    lists = f" or lists of at most {MAX_ENTRIES}, nested {MAX_NESTING} deep" if kind.many else ""
    return ModelError(
        f"'{path}' gives {name} {_show(value)}; allowed: {kind}{lists}; save the model with its own arguments"
    )


def _show(value: Any) -> str:
    """Return `value` in a few printable characters."""
    if isinstance(value, (list, tuple)) and len(value) > MAX_ENTRIES:
        return f"a list of {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
