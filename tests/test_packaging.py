"""What is shipped is complete, small and what its records say; the two commands of the README are sound."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from mm_edge.demo import IMAGES, MODEL

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = sorted(path.stem for path in (ROOT / "targets").glob("*.toml"))
RECORD = json.loads((ROOT / "benchmarks" / "results" / "demo_model.json").read_text())
CONFIG = json.loads((MODEL / "config.json").read_text())


def read_pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_every_dependency_has_a_tested_version_that_satisfies_it() -> None:
    pins = read_pins()
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["test"] + extras["dev"] + PROJECT["build-system"]["requires"]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name.lower()] in requirement.specifier, requirement


def test_torchvision_is_the_release_built_for_torch() -> None:
    pins = read_pins()
    assert (pins["torch"], pins["torchvision"]) == (Version("2.13.0"), Version("0.28.0"))


def test_every_data_file_is_packaged() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["mm_edge"]
    package = ROOT / "mm_edge"
    files = [p.relative_to(package) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    data = [file for file in files if file.suffix != ".py"]
    assert Path("demo/model/model.safetensors") in data
    for file in data:
        # A star in package-data does not cross folders, in fnmatch it does.
        assert any(fnmatch.fnmatch(str(file), p) and len(file.parts) == len(Path(p).parts) for p in patterns), file


def test_every_folder_of_modules_is_packaged() -> None:
    """Setuptools is given the list, and a folder that is not in it is left out of the wheel without a word."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "mm_edge").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert sorted(packages | {"mm_edge.targets"}) == PROJECT["tool"]["setuptools"]["packages"]


def list_targets(package_folder: Path, empty: Path) -> list[str]:
    """Return what a fresh Python that finds mm_edge in `package_folder` alone lists; `empty` holds no profiles."""
    code = "import json; from mm_edge.bench import target; print(json.dumps([target.__file__, target.list_targets()]))"
    environment = {**os.environ, "PYTHONPATH": str(package_folder), "XDG_CONFIG_HOME": str(empty)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=empty, env=environment, capture_output=True, text=True, check=True)
    file, names = json.loads(done.stdout)
    assert Path(file).is_relative_to(package_folder)
    return list(names)


@pytest.mark.slow
def test_a_bare_checkout_lists_every_target(tmp_path: Path) -> None:
    assert len(TARGETS) == 14
    assert list_targets(ROOT, tmp_path) == TARGETS


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_target(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("mm_edge", "targets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*argv, "--wheel-dir", tmp_path, source], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    assert sorted(path.stem for path in (unpacked / "mm_edge" / "targets").glob("*.toml")) == TARGETS
    modules = {path.relative_to(ROOT) for path in (ROOT / "mm_edge").rglob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == modules
    assert list_targets(unpacked, empty) == TARGETS


def test_the_demo_files_are_under_five_megabytes_together() -> None:
    sizes = [path.stat().st_size for path in IMAGES.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < 5_000_000


def test_the_demo_images_are_what_the_record_and_the_model_say() -> None:
    with tarfile.open(IMAGES) as tar:
        members = tar.getmembers()
    assert len({member.name for member in members}) == len(members) == RECORD["shipped_images"]
    counts = Counter(Path(member.name).parent.name for member in members)
    assert sorted(counts) == [f"{label}_{name}" for label, name in enumerate(CONFIG["label_names"])]
    assert set(counts.values()) == {RECORD["shipped_images"] // len(counts)}


@pytest.mark.slow
def test_the_demo_network_reads_the_demo_images() -> None:
    import timm

    model = timm.create_model(f"local-dir:{MODEL}", pretrained=True).eval()
    assert sum(p.numel() for p in model.parameters()) == RECORD["params"]
    config = CONFIG["pretrained_cfg"]
    size = tuple(config["input_size"][1:])
    inputs, labels = [], []
    with tarfile.open(IMAGES) as tar:
        for member in tar.getmembers()[::10]:
            file = tar.extractfile(member)
            assert file is not None
            with Image.open(file) as image:
                pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
            inputs.append((pixels - config["mean"][0]) / config["std"][0])
            labels.append(int(member.name[0]))
    with torch.no_grad():
        predicted = model(torch.from_numpy(np.stack(inputs)).unsqueeze(1)).argmax(1).numpy()
    accuracy = float((predicted == labels).mean())
    # Within four standard errors of the accuracy recorded on all shipped images.
    recorded = RECORD["accuracy_top1_shipped"]
    assert abs(accuracy - recorded) < 4 * (recorded * (1 - recorded) / len(labels)) ** 0.5


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ours = ("MAKE", "MFLAGS", "TEST_EXTRAS", "TESTERS")  # what this test run was itself started with
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_an_unfit_python_is_refused_in_one_line(checkout: Path) -> None:
    done = run_make(checkout, "test", "PYTHON=false")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "mm-edge needs Python 3.11 or newer; 'false' is older or absent: make PYTHON=/path/to/python3.11"
    )
    assert not (checkout / ".venv").exists()


def test_only_the_first_call_installs(checkout: Path) -> None:
    assert "pip install" in run_make(checkout, "-n", "test").stdout
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").touch()
    (checkout / ".venv" / ".installed").touch()
    run_tests = ".venv/bin/python -m pytest -n auto --dist loadfile"
    assert run_make(checkout, "-n", "test").stdout.splitlines() == [run_tests]
    assert run_make(checkout, "-n", "demo").stdout.splitlines() == [".venv/bin/mm-edge demo --out build/demo"]
    os.utime(checkout / ".venv" / ".installed", (0, 0))
    assert "pip install" in run_make(checkout, "-n", "test").stdout


def test_torch_comes_from_the_index_asked_for(checkout: Path) -> None:
    lines = run_make(checkout, "-n", "test", "TORCH_INDEX=https://index.example/cpu").stdout.splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert installs[0].endswith("-c constraints.txt torch==2.13.0 --index-url https://index.example/cpu")
    assert installs[1].endswith("-e '.[test]'")
