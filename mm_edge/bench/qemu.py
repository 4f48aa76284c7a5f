"""An emulated arm64 device: aarch64 CPython and onnxruntime under QEMU's user-mode emulation.

`setup` builds a folder in the user's cache, without root and without touching the system's package state:

    root/          arm64 Debian packages, unpacked: the C library, libstdc++, CPython
    site/          the aarch64 wheels of numpy and onnxruntime, the same versions as here
    cpu/NAME/      one sysroot for each core: links to root/, and the core's own proc/cpuinfo and sys/ files
    python-NAME    a script that runs Python on that core

qemu reads a file from the sysroot where the sysroot has it, and from this machine otherwise. ONNX Runtime detects the
CPU from /proc/cpuinfo and /sys/devices/system/cpu: it fails on this machine's files, and with the core's files it picks
that core's kernels. A cpuinfo with features that `-cpu` lacks would lead to an illegal instruction, so each core has a
sysroot of its own.

Outputs under emulation are those of a device; time and memory are not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mm_edge.bench.target import Target
from mm_edge.bench.transport import LocalTransport, printable
from mm_edge.errors import BenchError, TargetError, unknown_name

QEMU = "qemu-aarch64-static"
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "zlib1g")
WHEELS = ("numpy", "onnxruntime")
WHEEL_PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
SETUP_TIMEOUT_S = 900


@dataclass(frozen=True)
class Core:
    """A core that qemu emulates: its ARM part number and the features Linux lists for it."""

    name: str
    part: str
    features: str


_V8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CORES = {
    core.name: core
    for core in (
        Core("cortex-a53", "0xd03", _V8),
        Core("cortex-a72", "0xd08", _V8),
        Core("cortex-a76", "0xd0b", _V8_2),
        Core("neoverse-n1", "0xd0c", _V8_2),
    )
}
DEFAULT_CORE = "cortex-a76"


class QemuTransport(LocalTransport):
    """Runs the worker on an emulated core. Its times mean nothing, so its source is "emulated"."""

    source = "emulated"

    def __init__(self, core: str = DEFAULT_CORE) -> None:
        """Use the sysroot that `setup` built.

        Raises:
            TargetError: no such core.
            BenchError: `setup` has not been run.
        """
        if core not in CORES:
            raise TargetError(unknown_name("core", core, CORES))
        python = python_path(core)
        if not python.is_file():
            raise BenchError("there is no arm64 emulator yet: run 'mm-edge targets setup arm64-qemu' once")
        super().__init__([str(python)])
        self.name = f"emulated {core}"


def core_of(target: Target) -> str:
    """Return the core to emulate for `target`: the one its profile names, or the default for a generic profile.

    Raises:
        TargetError: the target is not an ARM CPU, or qemu does not emulate its core.
    """
    if target.isa != "aarch64":
        raise TargetError(f"{target.name} is {target.isa}; only aarch64 targets are emulated")
    if not target.cpu_parts:
        return DEFAULT_CORE
    for core in CORES.values():
        if f"0x41/{core.part}" in target.cpu_parts:
            return core.name
    raise TargetError(
        f"the core of {target.name} is not emulated; use arm64, or one of raspberry-pi-4, raspberry-pi-5, rk3588"
    )


def cache_folder() -> Path:
    """Return the folder `setup` builds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mm-edge" / "arm64-qemu"


def python_path(core: str) -> Path:
    """Return the script that runs Python on `core`."""
    return cache_folder() / f"python-{core}"


def setup(tell: Callable[[str], None] = lambda line: None) -> Path:
    """Build the emulator's folder, in place of an older one, and return it; `tell` is given a line for each step.

    Raises:
        BenchError: a program is missing or a download failed; the message says which and what to do.
    """
    for program, package in ((QEMU, "qemu-user-static"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(program) is None:
            raise BenchError(f"{program} is missing: on Debian or Ubuntu 'sudo apt-get install {package}'")
    final = cache_folder()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="arm64-qemu-", dir=final.parent) as temporary:
        work = Path(temporary)
        built = work / "built"
        tell("downloading arm64 packages")
        _unpack_packages(_download_packages(work / "apt"), built / "root")
        tell("downloading aarch64 wheels of numpy and onnxruntime")
        python = _find_python(built / "root")
        _unpack_wheels(work / "wheels", built / "site", python.name.removeprefix("python"))
        for core in CORES.values():
            _make_core(built, core, final, python.name)
        if final.exists():
            shutil.rmtree(final)
        built.replace(final)
    tell("trying it")
    with QemuTransport() as emulated:
        told = emulated.ask("info", {}, {})
    if told.get("onnxruntime") is None:
        raise BenchError(f"onnxruntime does not start under emulation: {printable(str(told.get('onnxruntime_error')))}")
    return final


def _download_packages(work: Path) -> list[Path]:
    """Download PACKAGES and their dependencies for arm64, with apt's state under `work`; return the files."""
    options = [
        f"-o=Dir::State={work}/state",
        f"-o=Dir::State::status={work}/state/status",
        f"-o=Dir::Cache={work}/cache",
    ]
    options += ["-o=APT::Architecture=arm64", "-o=APT::Architectures=arm64", "-o=APT::Sandbox::User="]
    for folder in ("state/lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    (work / "state/status").touch()
    _call(["apt-get", *options, "-qq", "update"], work)
    listing = ["apt-get", *options, "install", "--print-uris", "-qq", "--no-install-recommends", *PACKAGES]
    names = [line.split()[1].split("_")[0] for line in _call(listing, work).splitlines() if line.startswith("'")]
    if not names:
        raise BenchError("apt-get knows no arm64 packages: its sources must serve arm64 (Ubuntu: ports.ubuntu.com)")
    _call(["apt-get", *options, "-qq", "download", *names], work / "debs")
    return sorted((work / "debs").glob("*.deb"))


def _unpack_packages(packages: Sequence[Path], root: Path) -> None:
    root.mkdir(parents=True)
    for package in packages:
        _call(["dpkg-deb", "-x", str(package), str(root)], root)


def _find_python(root: Path) -> Path:
    found = sorted(path for path in (root / "usr/bin").glob("python3.*") if path.name[9:].isdigit())
    if not found:
        raise BenchError("the arm64 packages hold no python3")
    return found[-1]


def _unpack_wheels(work: Path, site: Path, python_version: str) -> None:
    work.mkdir()
    pins = [f"{name}=={version(name)}" for name in WHEELS]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    argv += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python_version}", f"--dest={work}"]
    argv += [f"--platform={platform}" for platform in WHEEL_PLATFORMS]
    _call([*argv, *pins], work)
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _make_core(built: Path, core: Core, final: Path, python: str) -> None:
    """Write the sysroot and the start script of one core; `built` will be moved to `final`."""
    sysroot = built / "cpu" / core.name
    topology = sysroot / "sys/devices/system/cpu/cpu0/topology"
    topology.mkdir(parents=True)
    for entry in sorted((built / "root").iterdir()):
        (sysroot / entry.name).symlink_to(Path("../../root") / entry.name)
    cpu = sysroot / "sys/devices/system/cpu"
    for name in ("possible", "present", "online"):
        (cpu / name).write_text("0\n")
    for name, value in {"core_id": 0, "physical_package_id": 0, "cluster_id": 0, "thread_siblings_list": 0}.items():
        (topology / name).write_text(f"{value}\n")
    for name in ("core_siblings_list", "cluster_cpus_list", "package_cpus_list", "core_cpus_list"):
        (topology / name).write_text("0\n")
    (sysroot / "proc").mkdir()
    (sysroot / "proc/cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {core.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {core.part}\nCPU revision\t: 1\n\n"
    )
    here = final / "cpu" / core.name
    script = built / f"python-{core.name}"
    variables = {"MM_EDGE_EMULATED": "1", "PYTHONPATH": str(final / "site")}
    settings = " ".join(f"-E '{key}={value}'" for key, value in variables.items())
    script.write_text(
        f"#!/bin/sh\nexec {QEMU} -cpu {core.name} -L '{here}' {settings} '{here}/usr/bin/{python}' \"$@\"\n"
    )
    script.chmod(0o755)


def _call(argv: Sequence[str], folder: Path) -> str:
    """Run one step of the setup in `folder` and return what it printed; BenchError with its last line if it fails."""
    try:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=SETUP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(
            f"'{argv[0]}' took longer than {SETUP_TIMEOUT_S} s; check the network and try again"
        ) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        step = "pip download" if "pip" in argv else f"{argv[0]} {argv[-1] if argv[0] == 'dpkg-deb' else ''}".strip()
        raise BenchError(f"setting up the emulator: {step} failed: {printable(lines[-1])}")
    return done.stdout
