"""`mm-edge targets` lists, shows, checks and starts device profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mm_edge.bench import target as target_module
from mm_edge.cli.targets import targets
from mm_edge.errors import BenchError, TargetError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    monkeypatch.setattr(target_module, "user_folder", lambda: folder)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(targets, arguments)


def test_list_and_show() -> None:
    listed = json.loads(run("list", "--json").stdout)
    assert next(p for p in listed if p["name"] == "host")["this_machine"] is True
    assert "your own profiles: " in run("list").stdout
    shown = run("show", "rk3588")
    assert "on cores (4, 5, 6, 7)" in shown.stdout
    assert json.loads(run("show", "rk3588", "--json").stdout)["threads"] == 4


def test_check() -> None:
    assert json.loads(run("check", "host", "--json").stdout)["problems"] == []
    assert "onnxruntime: " in run("check", "host").stdout
    failed = run("check", "android-arm64")
    assert isinstance(failed.exception, (BenchError, TargetError))


def test_new_makes_a_profile_that_loads(own_folder: Path) -> None:
    assert run("new", "my-board", "--like", "raspberry-pi-5").exit_code == 0
    assert [path.name for path in own_folder.iterdir()] == ["my-board.toml"]
    assert target_module.load_target("my-board").threads == 4
    again = run("new", "my-board")
    assert "exists already" in str(again.exception)
    assert "may hold letters" in str(run("new", "../evil").exception)
    assert "unknown target 'nope'" in str(run("new", "other", "--like", "nope").exception)


@pytest.mark.parametrize("command", ["bench", "targets"])
def test_importing_a_command_costs_click_alone(command: str) -> None:
    """What `import mm_edge` itself brings in is not counted."""
    code = (
        "import json, sys, mm_edge; before = set(sys.modules); "
        f"import mm_edge.cli.{command}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = set(json.loads(done.stdout))
    allowed = {"mm_edge.bench", "mm_edge.cli", f"mm_edge.cli.{command}", "mm_edge.errors"}
    assert {name for name in new if name.startswith("mm_edge")} <= allowed
    packages = {name.split(".")[0] for name in new}
    assert packages - set(sys.stdlib_module_names) <= {"click", "mm_edge"}
