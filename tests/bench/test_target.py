"""Profiles: what is packaged is valid, what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_edge.bench import target as target_module
from mm_edge.bench.target import (
    DATA_TYPES,
    OP_CLASSES,
    list_targets,
    load_target,
    matches_this_machine,
    mismatches,
    resolve_host,
    unfit_multiples,
)
from mm_edge.errors import TargetError

NAMES = [
    "android-arm64",
    "apple-m",
    "arm64",
    "graviton3",
    "host",
    "jetson-orin",
    "nvidia-a100",
    "nvidia-h100",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "rk3588",
    "x86_64-avx2",
    "x86_64-avx512",
    "x86_64-avx512-vnni",
]

VALID = """\
name = "board"
description = "a board"
isa = "aarch64"
features = ["asimd"]
data_types = ["fp32"]
threads = 2
[multiples.conv]
fp32 = 8
int8 = 16
[multiples.pointwise]
fp32 = 8
int8 = 16
[multiples.depthwise]
fp32 = 8
int8 = 8
[multiples.grouped]
fp32 = 8
int8 = 8
[multiples.matmul]
fp32 = 8
int8 = 8
[sources]
multiples = "measured"
data_types = "measured"
n_m = "none"
threads = "two cores"
"""

PI5 = {
    "isa": "aarch64",
    "flags": ["asimd", "asimddp"],
    "cpu_parts": ["0x41/0xd0b"],
    "providers": ["CPUExecutionProvider"],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    monkeypatch.setattr(target_module, "user_folder", lambda: folder)
    return folder


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "board.toml"
    path.write_text(text)
    return str(path)


def test_packaged_names() -> None:
    assert list_targets() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_packaged_profile_is_complete(name: str) -> None:
    profile = load_target(name)
    assert profile.name == name
    for op_class in OP_CLASSES:
        for data_type in DATA_TYPES:
            assert profile.multiple(op_class, data_type) >= 1


def test_profile_from_a_path(tmp_path: Path) -> None:
    profile = load_target(write(tmp_path, VALID))
    assert (profile.threads, profile.multiple("conv", "int8"), profile.multiple("conv", "fp16")) == (2, 16, 8)


def test_profile_from_own_folder(own_folder: Path) -> None:
    own_folder.mkdir()
    (own_folder / "board.toml").write_text(VALID)
    assert load_target("board").description == "a board"
    assert "board" in list_targets()


def test_own_profile_may_not_shadow_a_packaged_one(own_folder: Path) -> None:
    own_folder.mkdir()
    (own_folder / "arm64.toml").write_text(VALID)
    with pytest.raises(TargetError, match="has the name of a packaged target; rename it"):
        load_target("arm64")


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(
        TargetError, match=r"^unknown target 'raspberypi5'; did you mean raspberry-pi-5 or raspberry-pi-4"
    ):
        load_target("raspberypi5")


def test_missing_file() -> None:
    with pytest.raises(TargetError, match=r"^target file 'no/such.toml' does not exist; see 'mm-edge targets list'$"):
        load_target("no/such.toml")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('isa = "aarch64"', 'isa = "arm"', 3, "unknown isa 'arm'; did you mean aarch64?"),
        ("threads = 2", "threads = 0", 6, "threads must be 'auto' or 1 to 256, not 0"),
        ("threads = 2", "threads = true", 6, "threads must be 'auto' or 1 to 256, not True"),
        ("threads = 2", "thread = 2", 6, "unknown key 'thread'; did you mean threads"),
        ('features = ["asimd"]', "features = [1]", 4, "features must hold strings, not 1"),
        ('data_types = ["fp32"]', 'data_types = ["fp8"]', 5, "unknown data_types 'fp8'; did you mean"),
        (
            "fp32 = 8\nint8 = 16\n[multiples.pointwise]",
            "fp32 = 8\n[multiples.pointwise]",
            7,
            "multiples.conv.int8 is missing",
        ),
        ("fp32 = 8", "fp32 = 0", 8, "multiples.conv.fp32 must be a whole number from 1 to 256, not 0"),
        ("[multiples.conv]", "[multiples.convs]", 7, "unknown operator class 'convs'; did you mean conv or pointwise?"),
        ('n_m = "none"\n', "", 22, "sources.n_m is missing: say where the claim comes from"),
        ("threads = 2", 'threads = 2\nn_m = ["4:2"]', 7, "n_m '4:2' is not N:M with N below M, such as 2:4"),
        ("threads = 2", "threads = 2\naffinity = [-1]", 7, "affinity must hold core numbers from 0, not [-1]"),
        ('name = "board"', 'name = "other"', 1, "name is 'other', but the file is called board.toml"),
        ('description = "a board"', "", 1, "description is missing"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in VALID
    path = write(tmp_path, VALID.replace(old, new, 1))
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")
    assert "\n" not in str(caught.value)


def test_toml_syntax_error_gives_the_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"not valid TOML: .*line 3"):
        load_target(write(tmp_path, VALID.replace('isa = "aarch64"', "isa = aarch64")))


def test_host_takes_the_most_specific_profile() -> None:
    host = load_target("host")
    flags = ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]
    assert resolve_host(host, "x86_64", [*flags, "avx512_vnni"]).multiple("conv", "fp32") == 16
    assert resolve_host(host, "x86_64", ["avx2", "fma"]).multiple("conv", "fp32") == 8
    assert resolve_host(host, "x86_64", ["avx2", "fma"]).name == "host"
    assert "chosen by this machine's ISA flags" in resolve_host(host, "aarch64", ["asimd"]).sources["profile"]
    assert resolve_host(host, "riscv64", []).multiples == host.multiples
    pi = load_target("raspberry-pi-5")
    assert resolve_host(pi, "x86_64", []) is pi


def test_mismatches_say_what_differs() -> None:
    pi5, pi4 = load_target("raspberry-pi-5"), load_target("raspberry-pi-4")
    assert mismatches(pi5, PI5) == []
    assert mismatches(pi4, PI5) == ["the cores are 0x41/0xd0b, those of raspberry-pi-4 are 0x41/0xd08"]
    assert mismatches(pi5, {**PI5, "isa": "x86_64"}) == [
        "the machine is x86_64, the profile raspberry-pi-5 describes aarch64"
    ]
    assert mismatches(pi5, {**PI5, "flags": ["asimd"]}) == [
        "the CPU lacks asimddp, which the profile raspberry-pi-5 relies on"
    ]
    (provider,) = mismatches(load_target("jetson-orin"), PI5)
    assert provider == "onnxruntime there lacks TensorrtExecutionProvider (it has CPUExecutionProvider)"


def test_multiples_that_do_not_fill_a_cpu() -> None:
    avx512 = {"isa": "x86_64", "flags": load_target("x86_64-avx512").features, "cpu_parts": []}
    assert unfit_multiples(load_target("x86_64-avx512"), avx512) is None
    assert unfit_multiples(load_target("x86_64-avx2"), avx512) == (
        "this CPU rewards other channel multiples (x86_64-avx512): conv fp32 16, not 8; pointwise fp32 16, not 8; "
        "depthwise fp32 16, not 8; grouped fp32 16, not 8"
    )
    pi4 = {"isa": "aarch64", "flags": ["asimd"], "cpu_parts": ["0x41/0xd08"]}
    assert unfit_multiples(load_target("raspberry-pi-4"), pi4) is None
    assert unfit_multiples(load_target("raspberry-pi-4"), {**pi4, "isa": "riscv64"}) is None


def test_matches_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "this_machine", lambda: PI5)
    matching = [name for name in NAMES if matches_this_machine(load_target(name))]
    # rk3588 and raspberry-pi-5 have the same big cores: only the part number can tell
    assert matching == ["arm64", "host", "raspberry-pi-5", "rk3588"]


def test_a_wrong_op_class_and_a_type_without_an_entry() -> None:
    host = load_target("host")
    with pytest.raises(TargetError, match="unknown operator class 'convolution'"):
        host.multiple("convolution", "fp32")
    assert host.multiple("conv", "a type without an entry") == host.multiple("conv", "fp32")
