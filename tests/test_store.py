"""The run directory: what was kept comes back exactly, what was damaged or changed does not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.errors import JobError, UsageError
from mm_edge.records import Candidate, InputSpec, Latency
from mm_edge.store import RunStore, disk_errors, hash_key, write_atomically

KEY = {"model": "abc", "seed": 0}
CANDIDATE = Candidate(
    id="product/balanced/structured/fp32",
    signal="product",
    strategy="balanced",
    kind="structured",
    precision="fp32",
    sparsity=0.5,
    params=10,
    macs=100,
    input_shape=(1, 3, 8, 8),
    latency_ms=Latency(p50=0.1, p90=0.2, p99=0.3, samples=200, threads=2, source="host"),
    speedup_ci=(1.1, 1.2),
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


def stage_file(store: RunStore, name: str) -> Path:
    return store.folder / ".mm-edge" / name


def test_json_comes_back_for_its_key_only(store: RunStore) -> None:
    store.save_json("ranges", KEY, {"conv.weight": [0.1, 0.9], "none": None})
    assert store.load_json("ranges", KEY) == {"conv.weight": [0.1, 0.9], "none": None}
    assert store.load_json("ranges", {**KEY, "seed": 1}) is None
    assert store.load_json("scores", KEY) is None


def test_a_record_comes_back_equal_under_a_nested_name(store: RunStore) -> None:
    name = f"candidates/{CANDIDATE.id}@192"
    store.save_json(name, KEY, CANDIDATE)
    assert store.load_record(name, KEY, Candidate) == CANDIDATE
    assert store.load_record(name, KEY, InputSpec) is None


def test_arrays_come_back_with_type_and_shape(store: RunStore) -> None:
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "mask": np.array([True, False]),
        "s": np.array(3),
    }
    store.save_arrays("scores", KEY, arrays)
    loaded = store.load_arrays("scores", KEY)
    assert loaded is not None
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert store.load_arrays("scores", {**KEY, "seed": 1}) is None


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_cut_short_anywhere_or_altered_is_not_trusted(store: RunStore, suffix: str) -> None:
    store.save_json("stage", KEY, {"value": 1.5})
    store.save_arrays("stage", KEY, {"x": np.ones(3, np.float32)})
    load = store.load_json if suffix == ".json" else store.load_arrays
    path = stage_file(store, f"stage{suffix}")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load("stage", KEY) is None, length
    path.write_bytes(whole.replace(b"1.5", b"1.6") if suffix == ".json" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert load("stage", KEY) is None
    path.write_bytes(whole)
    assert load("stage", KEY) is not None


@pytest.mark.parametrize("content", [b"[]", b"null", b'"x"', b'{"key": 1}', b"\xff\xfe"])
def test_other_json_in_its_place_is_not_trusted(store: RunStore, content: bytes) -> None:
    stage_file(store, "stage.json").write_bytes(content)
    assert store.load_json("stage", KEY) is None


def test_a_stage_is_redone_when_a_file_it_speaks_of_changed_or_went(store: RunStore) -> None:
    artifact = store.folder / "models" / "a.onnx"
    write_atomically(artifact, b"graph")
    store.save_json("candidate", KEY, {"artifact": "models/a.onnx"}, files=[artifact])
    assert store.load_json("candidate", KEY) is not None
    artifact.write_bytes(b"grapX")
    assert store.load_json("candidate", KEY) is None
    artifact.unlink()
    assert store.load_json("candidate", KEY) is None


def test_saving_again_replaces_and_leaves_nothing_beside(store: RunStore) -> None:
    store.save_json("stage", KEY, 1)
    store.save_json("stage", {"seed": 2}, 2)
    assert store.load_json("stage", KEY) is None
    assert store.load_json("stage", {"seed": 2}) == 2
    assert [path.name for path in (store.folder / ".mm-edge").iterdir()] == ["stage.json"]


def test_clear_forgets_stages_and_keeps_artifacts(store: RunStore) -> None:
    store.save_json("candidates/a", KEY, 1)
    store.save_json("scores", KEY, 1)
    write_atomically(store.folder / "a.onnx", b"x")
    store.clear()
    assert store.load_json("candidates/a", KEY) is None
    assert store.load_json("scores", KEY) is None
    assert (store.folder / "a.onnx").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["../up", "/abs", "a/../b", "", "a//b", "a b", ".hidden"])
def test_a_name_cannot_leave_the_directory(store: RunStore, name: str) -> None:
    with pytest.raises(ValueError, match="not a stage name"):
        store.save_json(name, KEY, 1)


@pytest.mark.slow
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none() | st.floats(allow_nan=False)))
def test_the_hash_ignores_the_order_of_entries_and_sees_every_value(key: dict[str, object]) -> None:
    assert hash_key(key) == hash_key(dict(reversed(key.items())))
    assert hash_key(key) != hash_key({**key, "one more": 1})


def test_the_hash_is_the_same_in_every_process() -> None:
    assert hash_key({"b": (1, 2), "a": None}) == hash_key({"a": None, "b": [1, 2]})
    assert hash_key({"seed": 0}) == "bd0488843468e63c62bb6d1df790f0a83de90616c0906e9dbd3275d3b4100d97"


def test_a_second_run_in_the_same_directory_is_refused(store: RunStore) -> None:
    with store.lock():
        script = (
            "import sys; from pathlib import Path\n"
            "from mm_edge.errors import UsageError; from mm_edge.store import RunStore\n"
            "try:\n    RunStore(Path(sys.argv[1])).lock().__enter__()\nexcept UsageError as error:\n    print(error)"
        )
        root = str(Path(__file__).resolve().parent.parent)
        done = subprocess.run(
            [sys.executable, "-c", script, str(store.folder)], capture_output=True, text=True, check=True, cwd=root
        )
    assert done.stdout.strip() == (
        f"another run (process {os.getpid()}) is writing to '{store.folder}'; wait for it, or give another --out"
    )
    with store.lock():
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError) as caught:
        RunStore(tmp_path / "file")
    assert str(caught.value) == (
        f"cannot write to '{tmp_path / 'file'}': Not a directory; give a folder you can write to with --out"
    )
    assert caught.value.exit_code == 2


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, b"old")

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(JobError) as caught:
        write_atomically(path, b"new")
    assert str(caught.value) == f"the disk is full: '{path}' was not written; free space and run the same again"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_refusals_of_the_disk_name_the_place() -> None:
    with pytest.raises(JobError, match=r"^cannot write 'x\.onnx': Read-only file system$"), disk_errors(Path("x.onnx")):
        raise OSError(errno.EROFS, "Read-only file system")


def test_what_is_kept_is_plain_json(store: RunStore) -> None:
    store.save_json("stage", KEY, CANDIDATE)
    entry = json.loads(stage_file(store, "stage.json").read_text())
    assert entry["value"]["latency_ms"]["p50"] == 0.1


def test_what_a_killed_run_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    left = [
        tmp_path / "run" / name for name in (".mm-edge.net.onnx.17.tmp", ".mm-edge/finetuned/.a.safetensors.17.tmp")
    ]
    kept = tmp_path / "run" / "candidates" / "notes.tmp"
    for path in (*left, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with store.lock():
        assert [path.exists() for path in (*left, kept)] == [False, False, True]


def test_arrays_without_axes_come_back_without_axes(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.save_arrays("a", {"k": 1}, {"count": np.array(3), "row": np.zeros((1, 2))})
    found = store.load_arrays("a", {"k": 1})
    assert found is not None and found["count"].shape == () and found["row"].shape == (1, 2)
    store.remove_arrays("a")
    store.remove_arrays("a")
    assert store.load_arrays("a", {"k": 1}) is None


@pytest.mark.parametrize("was_there", [True, False])
def test_a_refused_run_leaves_nothing_but_a_folder_that_was_there(tmp_path: Path, was_there: bool) -> None:
    folder = tmp_path / "run"
    if was_there:
        folder.mkdir()
    store = RunStore(folder)
    with store.lock():
        store.claim("dense.onnx")
        (folder / "dense.onnx").write_bytes(b"model")
        store.save_json("stage", {}, 1)
        store.discard()
    assert list(tmp_path.rglob("*")) == ([folder] if was_there else [])


def test_a_refused_run_keeps_candidates_and_what_an_earlier_run_made(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    with store.lock():
        store.claim("candidates/a.onnx")
        (store.folder / "candidates").mkdir()
        (store.folder / "candidates" / "a.onnx").write_bytes(b"model")
        store.discard()
    assert (store.folder / "candidates" / "a.onnx").exists()
    (store.folder / "candidates" / "a.onnx").unlink()
    (store.folder / "candidates").rmdir()
    again = RunStore(store.folder)
    with again.lock():
        again.save_json("stage", {}, 1)
        again.discard()
    assert again.load_json("stage", {}) == 1
