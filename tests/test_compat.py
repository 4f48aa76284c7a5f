"""timm imports beside CPU-only torch, silently, and torchvision's own operators are left alone where they load."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mm_edge import compat


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_importing_mm_edge_makes_timm_importable_without_a_word() -> None:
    result = run("import mm_edge, timm; print(timm.create_model('test_resnet', num_classes=3).num_classes)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import mm_edge; import torch; import timm",
        "import torch; import mm_edge; import timm",
        "import mm_edge; import torchvision; import timm",
        "import mm_edge; from timm.models import create_model",
        "import mm_edge; import mm_edge.load.models",
        "import mm_edge; import importlib.util; importlib.util.find_spec('timm'); import timm",
        "import torch, mm_edge, threading\n"
        "threads = [threading.Thread(target=__import__, args=(name,)) for name in ('timm', 'torchvision')]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
    ],
)
def test_timm_is_importable_in_any_order_after_mm_edge(imports: str) -> None:
    left = "import sys; from mm_edge.compat import _Watcher; print(any(isinstance(f, _Watcher) for f in sys.meta_path))"
    result = run(f"{imports}\nimport timm, torchvision; torchvision.ops.nms\n{left}")
    assert (result.returncode, result.stdout, result.stderr) == (0, "False\n", "")


def test_importing_mm_edge_alone_imports_nothing_heavy() -> None:
    heavy = ("torch", "torchvision", "timm", "onnxruntime", "onnx", "numpy")
    result = run(f"import sys, mm_edge; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout == "[]\n"


@pytest.mark.slow
def test_imports_are_watched_once_and_not_where_torchvision_is_imported_already() -> None:
    count = "print(sum(isinstance(finder, compat._Watcher) for finder in sys.meta_path))"
    watch = f"import sys; from mm_edge import compat; compat.watch_imports(); {count}"
    assert run(watch).stdout == "1\n"
    assert run(f"import mm_edge, timm; {watch}").stdout == "0\n"


def test_pytorch_threads_sleep_while_they_wait_unless_the_user_says_otherwise() -> None:
    code = "import os; {}import mm_edge; print(os.environ['OMP_WAIT_POLICY'])"
    assert run(code.format("os.environ.pop('OMP_WAIT_POLICY', None); ")).stdout == "passive\n"
    assert run(code.format("os.environ['OMP_WAIT_POLICY'] = 'active'; ")).stdout == "active\n"


def test_a_second_call_changes_nothing() -> None:
    compat.make_timm_importable()
    before = compat._declared
    compat.make_timm_importable()
    assert compat._declared is before
    assert hasattr(torch.ops.torchvision, "nms")


def test_nothing_is_declared_where_the_compiled_operators_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_NMS_SCHEMAS", {"absent": "absent(Tensor x) -> Tensor"})
    monkeypatch.setattr(compat, "_load_compiled_operators", lambda: True)
    compat.make_timm_importable()
    assert not hasattr(torch.ops.torchvision, "absent")


def test_a_missing_operator_is_declared_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_NMS_SCHEMAS", {"declared": "declared(Tensor x) -> Tensor"})
    monkeypatch.setattr(compat, "_load_compiled_operators", lambda: False)
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    monkeypatch.setattr(compat, "_declared", library)
    compat.make_timm_importable()
    assert hasattr(torch.ops.torchvision, "declared")
