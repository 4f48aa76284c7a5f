"""Every command in the README and in docs/: parsed with all its options, and those of two pages run for real."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from tasks import TASKS
from tiny_job import save_checkpoint, write_images

from mm_edge.cli import demo, prune_export
from mm_edge.cli.main import SUBCOMMANDS, main
from mm_edge.cli.reference import METADATA, write_reference
from mm_edge.run.request import make_request

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULE = """
from torch import nn

def make_net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                         nn.ConvTranspose2d(32, 2, 2, 2))
"""
# These need a board, or depend on times: tests/report/test_compare.py and tests/plan/test_budgets.py have their tests.
NOT_RUN = ("--host", "--speedup", "--latency", "--size", "--fail-if-slower")


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page, each as its words."""
    lines = re.findall(r"^ {4}((?:mm-edge|python) [^…\n]+)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if "[OPTIONS]" not in line and "COMMAND" not in line]


ALL = [(page.name, words) for page in PAGES for words in commands(page) if words[0] == "mm-edge"]


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in ALL])
def test_a_documented_command_has_valid_options(page: str, words: list[str]) -> None:
    context = main.context_class(main, info_name="mm-edge", **main.context_settings)
    name, *rest = words[1:]
    command = main.get_command(context, name)
    assert command is not None, f"{page} names an unknown command"
    if isinstance(command, click.Group):
        nested = command.get_command(context, rest[0])
        assert nested is not None
        command, rest = nested, rest[1:]
    given = command.make_context(name, list(rest), parent=context).params
    if name == "prune-export":
        given = {key: value for key, value in given.items() if key not in ("model", "dynamic_batch")}
        make_request(**{**given, "out": given["out"] or Path("run")})


def test_pages_have_commands() -> None:
    assert {"README.md", "tutorial.md", "how-to.md", "data.md", "report.md"} <= {page for page, _ in ALL}


def test_the_reference_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert (ROOT / "docs" / "reference.md").read_text() == write_reference(), "run make docs"
    assert all(f"### mm-edge {name}\n" in write_reference() for name in SUBCOMMANDS)


def run(words: list[str]) -> None:
    """Run one command in the current folder; it has to end with 0."""
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    words = [found for word in words for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{' '.join(words)}: {result.output[-2000:]}"


def write_files() -> None:
    """Write the files that the recipes name into the current folder."""
    save_checkpoint(Path("model.pt"))
    write_images(Path("images"))
    photos = Path("photos")
    photos.mkdir()
    for index, path in enumerate(sorted(Path("images").rglob("*.png"))):
        shutil.copy(path, photos / f"{index}.png")
    Path("model.py").write_text(MODULE)
    torch.save(runpy.run_path("model.py")["make_net"]().state_dict(), "net.pt")
    task = TASKS["yolo"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # people export with this exporter still
        torch.onnx.export(task.module(), task.examples(), "detector.onnx", input_names=["images"], dynamo=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let every job make one candidate, whatever else its command asks for; return the options that it gets."""
    few: dict[str, Any] = {"signals": "magnitude", "strategies": "balanced", "recover": "bn", "input_sizes": "none"}

    def make(**given: Any) -> Any:
        if given.get("max_drop") is not None:
            given["max_drop"] = 100.0  # the network was never trained
        return make_request(**{**given, **few})

    for module in (demo, prune_export):
        monkeypatch.setattr(module, "make_request", make)
    return few


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(ROOT / "docs" / "tutorial.md"):
        run(words)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    quick["bench"] = False
    write_files()
    for words in commands(ROOT / "docs" / "how-to.md"):
        if not any(word in NOT_RUN for word in words):
            run(words)


def test_the_metadata_keys_of_the_reference_are_those_of_artifacts() -> None:
    source = "".join(path.read_text() for path in (ROOT / "mm_edge" / "formats").glob("*.py"))
    source += (ROOT / "mm_edge" / "load" / "onnx_file.py").read_text()
    assert all(key.removeprefix("mm_edge.") in source for key in METADATA)
