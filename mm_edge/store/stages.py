"""The run directory, which stores what each stage made, so that a second run repeats only what changed.

A stage is stored under a name, with the hash of everything it depends on (its key) and a digest of its content:

    DIR/.mm-edge/NAME.json          {"key", "digest", "files": {path: digest}, "value"}
    DIR/.mm-edge/NAME.safetensors   arrays, with "key" and "digest" in the header's metadata

One file per name: a stage whose key changed replaces its predecessor. A file that is absent, cut short, altered or of
another key counts as absent, and the stage is done again. Writes go to a temporary name first and are moved into
place when complete, so that a killed run leaves whole files only. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from mm_edge.arrays import Array, Arrays
from mm_edge.errors import JobError, UsageError
from mm_edge.records import from_json, parse_json, to_json
from mm_edge.store.ownership import (
    LOCK,
    MARKER,
    OWNED,
    RESERVED,
    STAGES,
    TEMPORARY_PREFIX,
    check_fixed,
    check_folder,
    foreign_file,
    is_marked,
    marker_document,
    owned_document,
    read_owned,
    refuse_link,
    remove_leftovers,
)

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_@+=,-][A-Za-z0-9_@+=,.-]*(/[A-Za-z0-9_@+=,-][A-Za-z0-9_@+=,.-]*)*")
_CHUNK = 1 << 20


def hash_key(key: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of `key` as canonical JSON; equal content gives equal hashes in every process.

    Records, tuples and nested mappings are allowed; the order of entries does not matter, that of lists does.

    Raises:
        TypeError: a value has no JSON form.
    """
    return _sha256(_canonical(key))


def hash_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that is raised while `path` is written into a JobError of one line.

    Raises:
        JobError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JobError(f"the disk is full: '{path}' was not written; free space and run the same again") from error
        raise JobError(f"cannot write '{path}': {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one; makes the folder.

    Raises:
        JobError: the disk is full, or the path cannot be written.
        UsageError: a symbolic link lies there.
    """
    refuse_link(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # x follows no link that somebody put there
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class RunStore:
    """The stages stored in one run directory."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, making it if needed.

        Raises:
            UsageError: it cannot be made or written, or it holds files and is no run folder.
        """
        check_folder(folder)
        self.folder = folder
        self._stages = folder / STAGES
        self._was_there = folder.is_dir()
        self._is_new = not self._was_there or next(folder.iterdir(), None) is None
        try:
            self._stages.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"x")
        except OSError as error:
            raise UsageError(
                f"cannot write to '{folder}': {error.strerror or error}; give a folder you can write to with --out"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory for this run; the system releases the lock even when the process is killed.

        Raises:
            UsageError: another run holds it, or a file of the user's lies where a run writes.
        """
        with self._open_lock() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(20).strip() or "unknown"
                raise UsageError(
                    f"another run (process {holder}) is writing to '{self.folder}'; wait for it, or give another --out"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            check_fixed(self.folder, self.owned)
            self._mark()
            remove_leftovers(self.folder)
            yield

    def _open_lock(self) -> TextIO:
        """Open the lock, a file of its own: a link could name a file of the user's, which taking the lock empties."""
        path = self._stages / LOCK
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                refuse_link(path)
            raise UsageError(f"cannot open '{path}': {error.strerror}; give another --out") from error
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
            os.close(number)
            raise UsageError(f"'{path}' is not a file of its own (a hard link or a device); give another --out")
        return os.fdopen(number, "a+")

    def _mark(self) -> None:
        """Write what makes this a run folder, and the list of files, where an earlier version wrote neither."""
        if not (self._stages / OWNED).is_file():
            write_atomically(self._stages / OWNED, owned_document(self.owned))
        if not is_marked(self.folder):
            write_atomically(self._stages / MARKER, marker_document())

    @property
    def owned(self) -> frozenset[str]:
        """The files outside .mm-edge that runs wrote, relative to the folder."""
        return read_owned(self.folder)

    def claim(self, *names: str) -> None:
        """List files as ours before they are written.

        Raises:
            UsageError: a file that is not ours has such a name.
            JobError: the list cannot be written.
        """
        owned = self.owned
        for name in names:
            refuse_link(self.folder / name)
            if name not in owned and (self.folder / name).exists():
                raise foreign_file(self.folder / name)
        if not owned.issuperset(names):
            write_atomically(self._stages / OWNED, owned_document(owned.union(names)))

    def remove_owned(self, place: str) -> None:
        """Remove the files in the subfolder `place` that are listed as ours; what else lies there stays."""
        if (self.folder / place).is_symlink():
            return
        for name in self.owned:
            if Path(name).parent == Path(place):
                (self.folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every stored stage; the artifacts in the directory stay."""
        for path in self._stages.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK, *RESERVED):
                path.unlink()

    def discard(self) -> None:
        """Remove what a refused run left in a folder that was empty or not there before, while it holds the lock.

        A folder with candidates stays: they were made before the refusal and took their time.
        """
        if not self._is_new or (self.folder / "candidates").exists():
            return
        for name in self.owned:
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self._stages)
        if not self._was_there and next(self.folder.iterdir(), None) is None:
            self.folder.rmdir()

    def save_json(self, name: str, key: Mapping[str, Any], value: Any, files: Iterable[Path] = ()) -> None:
        """Store `value` (records allowed), and the digests of `files` in the directory that belong to it.

        Raises:
            JobError: the disk is full, or the path cannot be written.
        """
        plain = to_json(value)
        entry = {
            "key": hash_key(key),
            "digest": _sha256(_canonical(plain)),
            "files": {path.resolve().relative_to(self.folder.resolve()).as_posix(): hash_file(path) for path in files},
            "value": plain,
        }
        write_atomically(self._path(name, ".json"), json.dumps(entry, indent=1).encode())

    def load_json(self, name: str, key: Mapping[str, Any]) -> Any | None:
        """Return what was stored under `name` for this `key`; None if it or one of its files is missing or changed."""
        try:
            entry = parse_json(self._path(name, ".json").read_bytes())
            if entry["key"] != hash_key(key) or entry["digest"] != _sha256(_canonical(entry["value"])):
                return None
            if any(hash_file(self.folder / path) != digest for path, digest in entry["files"].items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return entry["value"]

    def load_record(self, name: str, key: Mapping[str, Any], kind: type[T]) -> T | None:
        """Return the record of type `kind` stored under `name` for this `key`, or None."""
        value = self.load_json(name, key)
        if value is None:
            return None
        try:
            return from_json(kind, value)
        except ValueError:
            return None

    def save_arrays(self, name: str, key: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Store `arrays`.

        Raises:
            JobError: the disk is full, or the path cannot be written.
        """
        # Not ascontiguousarray, which gives an array without axes one axis.
        tidy = {array_name: np.asarray(array, order="C") for array_name, array in arrays.items()}
        metadata = {"key": hash_key(key), "digest": _hash_arrays(tidy)}
        write_atomically(self._path(name, ".safetensors"), safetensors.numpy.save(tidy, metadata=metadata))

    def load_arrays(self, name: str, key: Mapping[str, Any]) -> Arrays | None:
        """Return the arrays stored under `name` for this `key`; None if they are missing or have changed."""
        path = self._path(name, ".safetensors")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != hash_key(key):
                    return None
                arrays: Arrays = {array_name: file.get_tensor(array_name) for array_name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, safetensors.SafetensorError):
            return None
        return arrays if metadata.get("digest") == _hash_arrays(arrays) else None

    def remove_arrays(self, name: str) -> None:
        """Remove the arrays stored under `name`, if there are any."""
        self._path(name, ".safetensors").unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        if not _NAME.fullmatch(name) or f"{name}{suffix}" in RESERVED:
            raise ValueError(f"not a stage name: {name!r}")
        return self._stages / f"{name}{suffix}"


def _canonical(value: Any) -> bytes:
    return json.dumps(to_json(value), sort_keys=True, separators=(",", ":")).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_arrays(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
