"""timm imports beside CPU-only torch, silently, and torchvision's own operators are left alone where they load."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mm_edge import compat


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_importing_mm_edge_makes_timm_importable_without_a_word():
    result = run("import mm_edge, timm; print(timm.create_model('test_resnet', num_classes=3).num_classes)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n", "")


def test_importing_mm_edge_alone_does_not_import_torchvision_or_timm():
    result = run("import sys, mm_edge; print('torchvision' in sys.modules, 'timm' in sys.modules)")
    assert result.stdout == "False False\n"


def test_pytorch_threads_sleep_while_they_wait_unless_the_user_says_otherwise():
    code = "import os; {}import mm_edge; print(os.environ['OMP_WAIT_POLICY'])"
    assert run(code.format("os.environ.pop('OMP_WAIT_POLICY', None); ")).stdout == "passive\n"
    assert run(code.format("os.environ['OMP_WAIT_POLICY'] = 'active'; ")).stdout == "active\n"


def test_a_second_call_changes_nothing():
    before = compat._declared
    compat.make_timm_importable()
    assert compat._declared is before
    assert hasattr(torch.ops.torchvision, "nms")


def test_nothing_is_declared_where_the_compiled_operators_load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "_NMS_SCHEMAS", {"absent": "absent(Tensor x) -> Tensor"})
    monkeypatch.setattr(compat, "_load_compiled_operators", lambda: True)
    compat.make_timm_importable()
    assert not hasattr(torch.ops.torchvision, "absent")


def test_a_missing_operator_is_declared_where_they_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "_NMS_SCHEMAS", {"declared": "declared(Tensor x) -> Tensor"})
    monkeypatch.setattr(compat, "_load_compiled_operators", lambda: False)
    monkeypatch.setattr(compat, "_declared", torch.library.Library("torchvision", "FRAGMENT"))
    compat.make_timm_importable()
    assert hasattr(torch.ops.torchvision, "declared")
