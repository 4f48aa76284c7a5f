"""The harness stands alone: what each file of mm_edge.bench imports, read from its source.

The imports inside functions count too. What `import mm_edge` itself brings in is not the harness's doing.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import mm_edge.bench

FOLDER = Path(mm_edge.bench.__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("*.py"))
ALLOWED_MODULES = {f"mm_edge.{name}" for name in ("arrays", "bench", "deferred", "errors", "records", "store")}
PACKAGES: dict[str, set[str]] = {
    "audit.py": {"onnx"},
    "comparison.py": {"numpy"},
    "host.py": {"numpy", "onnxruntime"},
    "pattern.py": {"numpy"},
    "session.py": {"numpy"},
    "stats.py": {"numpy"},
    "tables.py": {"rich"},
    "target.py": {"click"},
    "worker.py": {"numpy", "onnxruntime", "torch"},  # on the device, and torch only for the products of GPUs
}
# What each module of mm_edge outside bench that the harness uses may import of mm_edge.
GROUND: dict[str, set[str]] = {
    "arrays.py": set(),
    "deferred.py": {"errors"},
    "errors.py": set(),
    "records.py": set(),
    "store/__init__.py": {"store.ownership", "store.stages"},
    "store/ownership.py": {"errors", "records"},
    "store/stages.py": {"arrays", "errors", "records", "store.ownership"},
}


def imported(path: Path) -> set[str]:
    """Return the dotted names of the modules that `path` imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path.name}: relative import"
            if node.module == "mm_edge":  # "from mm_edge import bench" imports mm_edge.bench
                names.update(f"mm_edge.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
    return names


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_harness_imports_only_the_ground_and_the_harness(name: str) -> None:
    ours = {module for module in imported(FOLDER / name) if module.split(".")[0] == "mm_edge"}
    assert {".".join(module.split(".")[:2]) for module in ours} <= ALLOWED_MODULES


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_harness_needs_only_its_packages(name: str) -> None:
    packages = {module.split(".")[0] for module in imported(FOLDER / name)}
    assert packages - set(sys.stdlib_module_names) - {"mm_edge"} == PACKAGES.get(name, set())


@pytest.mark.parametrize("name", GROUND)
def test_what_the_harness_stands_on_imports_nothing_above_it(name: str) -> None:
    ours = {module for module in imported(FOLDER.parent / name) if module.split(".")[0] == "mm_edge"}
    assert ours == {f"mm_edge.{module}" for module in GROUND[name]}


def test_the_worker_imports_nothing_of_this_package() -> None:
    assert not any(module.startswith("mm_edge") for module in imported(FOLDER / "worker.py"))
