"""Which folders are run folders, and which files in them are ours.

A run folder says so itself: DIR/.mm-edge/run.json holds {"tool": "mm-edge", "layout": 1}. Folders of earlier versions
have no such file; their lock or their stage files tell. Any other folder that is not empty is somebody else's.

DIR/.mm-edge/owned.json lists the files outside .mm-edge that runs wrote or are about to write. A name is listed before
the file is written, so that a killed run leaves no file of ours unlisted. Nothing else outside .mm-edge is removed.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm_edge.errors import UsageError
from mm_edge.records import parse_json

TOOL = "mm-edge"
LAYOUT = 1
STAGES = ".mm-edge"
MARKER = "run.json"
OWNED = "owned.json"
LOCK = "lock"
RESERVED = (MARKER, OWNED)
TEMPORARY_PREFIX = ".mm-edge."
WRITING_PREFIX = ".mm-edge-writing-"
# Files of a fixed name that every run writes: what a file of ours contains, or the file it is written after.
FIXED = {"dense.onnx": b"mm_edge.", "report.json": b'"schema_version"'}
COMPANIONS = {"dense.onnx.data": "dense.onnx", "report.md": "report.json"}
# Folders a run writes in.
PLACES = ("", "candidates", "candidates/stored", "samples", "bundle")
SAMPLES_START = b'{"samples_version"'

_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r".+\.\d+\.tmp")
_EARLIER_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def check_folder(folder: Path) -> None:
    """Refuse a folder that a run must not write in; nothing is touched.

    Raises:
        UsageError: it is not empty and not a run folder, or a link lies where a run writes.
    """
    if not folder.is_dir():
        return  # it is made, or the system says why not
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return  # the first write says why
    if names <= {STAGES} and not (folder / STAGES).is_symlink():
        return
    if STAGES not in names or not _is_run(folder):
        raise UsageError(
            f"'{folder}' is not empty and no run folder of mm-edge; nothing in it was touched: "
            "give a new or an empty folder with --out"
        )
    _check_links(folder)


def check_fixed(folder: Path, owned: frozenset[str]) -> None:
    """Refuse a run folder in which a file that is not ours has a name every run writes.

    Raises:
        UsageError: there is one.
    """
    for name in (*FIXED, *COMPANIONS):
        if name not in owned and (folder / name).exists():
            raise foreign_file(folder / name)


def foreign_file(path: Path) -> UsageError:
    """Return the error for a file of the user's where a run writes."""
    return UsageError(f"'{path}' was not written by mm-edge and would be overwritten; move it, or give another --out")


def refuse_link(path: Path) -> None:
    """Refuse to write where a symbolic link lies.

    Raises:
        UsageError: `path` is a link.
    """
    if path.is_symlink():
        raise UsageError(
            f"'{path}' is a symbolic link and mm-edge writes through none; remove it, or give another --out"
        )


def read_owned(folder: Path) -> frozenset[str]:
    """Return the files listed as ours; in a folder of an earlier version, those that show they are."""
    try:
        names = parse_json((folder / STAGES / OWNED).read_bytes())["files"]
        return frozenset(name for name in names if isinstance(name, str) and _is_inside(name))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset(_recognise(folder))


def owned_document(names: Iterable[str]) -> bytes:
    """Return the content of owned.json."""
    return json.dumps({"files": sorted(names)}, indent=1).encode()


def marker_document() -> bytes:
    """Return the content of run.json."""
    return json.dumps({"tool": TOOL, "layout": LAYOUT}).encode()


def is_marked(folder: Path) -> bool:
    """Return whether the folder says that it is a run folder.

    Raises:
        UsageError: a newer mm-edge made it.
    """
    entry = _read_json(folder / STAGES / MARKER)
    if not isinstance(entry, dict) or entry.get("tool") != TOOL:
        return False
    layout = entry.get("layout")
    if type(layout) is not int or layout < 1:
        return False
    if layout > LAYOUT:
        raise UsageError(
            f"'{folder}' was made by a newer mm-edge (layout {layout}, this one knows {LAYOUT}); update mm-edge, "
            "or give another --out"
        )
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing: never read, it would only take room."""
    for place in PLACES:
        for path in _entries(folder / place):
            if _TEMPORARY.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
            elif path.name.startswith(WRITING_PREFIX) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
    for path in (folder / STAGES).rglob(".*.tmp"):
        if _EARLIER_TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    refuse_link(folder / STAGES)
    if is_marked(folder):
        return True
    lock = folder / STAGES / LOCK
    return (lock.is_file() and not lock.is_symlink()) or any(_stage_files(folder))


def _stage_files(folder: Path) -> Iterator[Path]:
    for path in (folder / STAGES).rglob("*.json"):
        entry = _read_json(path)
        if isinstance(entry, dict) and entry.keys() >= {"key", "digest"}:
            yield path


def _check_links(folder: Path) -> None:
    for name in (*filter(None, PLACES), *FIXED, *COMPANIONS):
        refuse_link(folder / name)
    for path in (folder / STAGES).rglob("*"):
        refuse_link(path)


def _recognise(folder: Path) -> Iterator[str]:
    found = [name for name, mark in FIXED.items() if _holds(folder / name, mark)]
    yield from found
    yield from (name for name, first in COMPANIONS.items() if first in found and _is_plain_file(folder / name))
    for path in _entries(folder / "samples"):
        if path.suffix == ".json" and starts_with(path, SAMPLES_START):
            yield f"samples/{path.name}"


def _holds(path: Path, mark: bytes) -> bool:
    return _is_plain_file(path) and mark in path.read_bytes()


def starts_with(path: Path, start: bytes) -> bool:
    """Return whether `path` is a file, and no link, that starts so."""
    if not _is_plain_file(path):
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return list(folder.iterdir())


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts and path.parts[0] != STAGES


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes()) if _is_plain_file(path) else None
    except (OSError, ValueError, RecursionError):
        return None
