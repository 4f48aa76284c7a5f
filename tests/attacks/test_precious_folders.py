"""Folders in which something of the user's lies: it is there afterwards, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mm_edge.bench import session
from mm_edge.cli.main import main
from mm_edge.errors import MMEdgeError, UsageError
from mm_edge.formats.device_files import write_model
from mm_edge.store import PLACES, RunStore, write_atomically

KEY = {"seed": 0}
FAST = ("--recover", "none", "--no-bench", "--strategies", "balanced", "--kinds", "structured")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    return {name: f"precious {name}".encode() for name in names}


def refuse(folder: Path) -> str:
    with pytest.raises(UsageError) as caught, RunStore(folder).lock():
        pass
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def start(folder: Path) -> RunStore:
    store = RunStore(folder)
    with store.lock():
        pass
    return store


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "report.md",
        "report.json",
        "dense.onnx",
        "samples/a.json",
        ".mine.tmp",
        "candidates/a.onnx",
        ".git/x",
    ],
)
def test_a_folder_of_somebody_else_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    mine = put(tmp_path, name)
    assert refuse(tmp_path) == (
        f"'{tmp_path}' is not empty and no run folder of mm-edge; nothing in it was touched: "
        "give a new or an empty folder with --out"
    )
    assert content(tmp_path) == mine
    assert not (tmp_path / ".mm-edge").exists()


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_the_command_line_refuses_it_with_exit_code_2(files: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    mine = put(tmp_path, "samples/mine.wav", "report.md", ".a.tmp", ".b.1.tmp")
    done = CliRunner().invoke(main, ["prune-export", str(files / "net.pt"), *FAST, "--out", str(tmp_path), *more])
    assert done.exit_code == 2, done.output
    assert "no run folder of mm-edge" in done.output
    assert content(tmp_path) == mine


@pytest.mark.slow
def test_a_run_keeps_fresh_or_not_what_the_user_put_in_its_folder(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["prune-export", str(files / "net.pt"), *FAST, "--out", str(out)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    mine = put(out, "samples/mine.wav", "samples/notes.json", "notes/.draft.1.tmp", ".vimrc.tmp", "candidates/.x.2.tmp")
    stages = {path: path.stat().st_mtime_ns for path in (out / ".mm-edge" / "candidates").rglob("*.json")}
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert stages and all(path.stat().st_mtime_ns == time for path, time in stages.items())
    assert CliRunner().invoke(main, [*arguments, "--fresh"]).exit_code == 0
    assert content(out).items() >= mine.items()
    assert {"dense.onnx", "report.json", "report.md"} <= RunStore(out).owned


def test_a_run_made_by_an_earlier_version_resumes_and_gets_the_marker(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["prune-export", str(files / "net.pt"), *FAST, "--out", str(out)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    for name in ("run.json", "owned.json"):
        (out / ".mm-edge" / name).unlink()
    # Earlier versions wrote neither a page nor, without being asked, a bundle.
    (out / "report.html").unlink()
    shutil.rmtree(out / "bundle", ignore_errors=True)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".json")}
    made = {path: time for path, time in made.items() if path.name not in ("report.json",)}
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [path for path, time in made.items() if path.stat().st_mtime_ns != time] == []
    assert json.loads((out / ".mm-edge" / "run.json").read_text()) == {"tool": "mm-edge", "layout": 1}
    assert {"dense.onnx", "report.json", "report.md"} <= RunStore(out).owned


@pytest.mark.parametrize("name", ["report.md", "report.json", "dense.onnx", "dense.onnx.data"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_file_of_the_users_in_a_run_folder_is_not_overwritten(tmp_path: Path, name: str, marked: bool) -> None:
    folder = tmp_path / "run"
    store = start(folder)
    if not marked:
        for own in ("run.json", "owned.json"):
            (folder / ".mm-edge" / own).unlink()
    mine = put(folder, name)
    assert refuse(folder) == (
        f"'{folder / name}' was not written by mm-edge and would be overwritten; move it, or give another --out"
    )
    with pytest.raises(UsageError):
        store.claim(name)
    assert content(folder).items() >= mine.items()


def test_a_new_an_empty_and_a_linked_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("new", "empty", "link"):
        store = start(tmp_path / name)
        store.save_json("stage", KEY, 1)
        assert start(tmp_path / name).load_json("stage", KEY) == 1


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / ".mm-edge" / "run.json").write_text('{"tool": "mm-edge", "layout": 2}')
    (tmp_path / "run" / "x").touch()
    assert "made by a newer mm-edge (layout 2, this one knows 1); update mm-edge" in refuse(tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    [
        '{"tool": "other"}',
        "[]",
        "{",
        "[" * 100_000,
        '{"layout": 1}',
        '{"tool": "mm-edge", "layout": 0}',
        '{"tool": "mm-edge"}',
    ],
)
def test_a_marker_of_something_else_makes_no_run_folder(tmp_path: Path, text: str) -> None:
    put(tmp_path, "x", ".mm-edge/settings")
    (tmp_path / ".mm-edge" / "run.json").write_text(text)
    assert "no run folder of mm-edge" in refuse(tmp_path)


def test_fresh_removes_listed_samples_only(tmp_path: Path) -> None:
    store = start(tmp_path / "run")
    store.claim("samples/a.json")
    write_atomically(store.folder / "samples/a.json", b"{}")
    mine = put(store.folder, "samples/b.json", "samples/deep/a.json")
    store.remove_owned("samples")
    assert not (store.folder / "samples/a.json").exists()
    assert content(store.folder).items() >= mine.items()


@pytest.mark.parametrize("names", [["../x"], ["/x"], ["samples/../../x"], [1, None], "samples", {"a": 1}])
def test_a_list_that_was_tampered_with_names_nothing_outside(tmp_path: Path, names: Any) -> None:
    store = start(tmp_path / "run")
    mine = put(tmp_path, "x")
    names = [str(tmp_path / "x") if name == "/x" else name for name in names] if isinstance(names, list) else names
    (store.folder / ".mm-edge" / "owned.json").write_text(json.dumps({"files": names}))
    for place in (*PLACES, "..", "../run"):
        store.remove_owned(place)
    assert content(tmp_path).items() >= mine.items()


# ---- links


@pytest.mark.parametrize("place", ["lock", "run.json", "owned.json", "stage.json"])
def test_a_link_in_the_store_is_refused_and_its_target_whole(tmp_path: Path, place: str) -> None:
    store = start(tmp_path / "run")
    store.save_json("stage", KEY, 1)
    put(store.folder, "x")
    mine = put(tmp_path, "precious")
    path = store.folder / ".mm-edge" / place
    path.unlink()
    path.symlink_to(tmp_path / "precious")
    assert "is a symbolic link" in refuse(store.folder)
    assert content(tmp_path).items() >= mine.items()


def test_a_linked_lock_in_an_otherwise_empty_folder_is_refused(tmp_path: Path) -> None:
    mine = put(tmp_path, "precious")
    (tmp_path / "run" / ".mm-edge").mkdir(parents=True)
    (tmp_path / "run" / ".mm-edge" / "lock").symlink_to(tmp_path / "precious")
    assert "is a symbolic link" in refuse(tmp_path / "run")
    assert content(tmp_path).items() >= mine.items()


@pytest.mark.parametrize("kind", ["hard link", "pipe"])
def test_a_lock_that_is_no_file_of_its_own_is_refused(tmp_path: Path, kind: str) -> None:
    mine = put(tmp_path, "precious")
    (tmp_path / "run" / ".mm-edge").mkdir(parents=True)
    lock = tmp_path / "run" / ".mm-edge" / "lock"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        os.link(tmp_path / "precious", lock)
    assert "is not a file of its own" in refuse(tmp_path / "run")
    assert (tmp_path / "precious").read_bytes() == mine["precious"]


@pytest.mark.parametrize("name", [".mm-edge", "candidates", "samples", "bundle", "dense.onnx", "report.md"])
def test_a_link_where_a_run_writes_is_refused(tmp_path: Path, name: str) -> None:
    store = start(tmp_path / "run")
    put(store.folder, "x")
    mine = put(tmp_path, "elsewhere/a.onnx", "elsewhere/.mm-edge.a.1.tmp")
    if name == ".mm-edge":
        for path in (store.folder / name).iterdir():
            path.unlink()
        (store.folder / name).rmdir()
    (store.folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refuse(store.folder)
    assert content(tmp_path).items() >= mine.items()


def test_no_writer_follows_or_replaces_a_link(tmp_path: Path) -> None:
    import onnx

    mine = put(tmp_path, "precious")
    (tmp_path / "a.onnx").symlink_to("precious")
    graph = onnx.helper.make_graph([], "g", [], [])
    for write in (
        lambda: write_atomically(tmp_path / "a.onnx", b"new"),
        lambda: write_model(onnx.helper.make_model(graph), tmp_path / "a.onnx", external_over=0),
    ):
        with pytest.raises(MMEdgeError, match="is a symbolic link"):
            write()
    assert (tmp_path / "a.onnx").is_symlink() and content(tmp_path).items() >= mine.items()


def test_a_temporary_put_there_as_a_link_is_not_followed(tmp_path: Path) -> None:
    mine = put(tmp_path, "precious")
    for name in (f".a.{os.getpid()}.tmp", f".mm-edge.a.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to("precious")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_bytes() == mine["precious"] and (tmp_path / "a").read_bytes() == b"new"


def test_only_temporaries_of_our_own_are_removed_and_only_where_we_write(tmp_path: Path) -> None:
    store = start(tmp_path / "run")
    own = [".mm-edge.net.onnx.17.tmp", "candidates/.mm-edge.a.onnx.3.tmp", "bundle/.mm-edge-writing-x/a.ort"]
    put(store.folder, *own)
    mine = put(store.folder, ".net.onnx.17.tmp", "candidates/.a.tmp", "photos/.mm-edge.a.1.tmp", ".mm-edge.notes.tmp")
    start(store.folder)
    assert not any((store.folder / name).exists() for name in own)
    assert content(store.folder).items() >= mine.items()


# ---- samples


@pytest.mark.parametrize("linked", [True, False])
def test_samples_replace_no_file_of_the_users(tmp_path: Path, linked: bool) -> None:
    mine = put(tmp_path, "model.json", "dense.onnx", "a.onnx")
    raw = tmp_path / "model.json"
    if linked:
        raw = tmp_path / "link.json"
        raw.symlink_to("model.json")
    transport: Any = SimpleNamespace(source="host", name="the board")
    from mm_edge.bench.target import load_target, resolve_host

    with pytest.raises(UsageError) as caught:
        session.measure_pair(
            tmp_path / "dense.onnx",
            tmp_path / "a.onnx",
            resolve_host(load_target("host")),
            transport=transport,
            raw_samples=raw,
        )
    assert str(raw) in str(caught.value) and "\n" not in str(caught.value)
    assert content(tmp_path).items() >= mine.items()
