"""Starts a user's own target profile as a copy of another."""

from __future__ import annotations

from pathlib import Path

from mm_edge.bench.target import list_targets, parse_target, profile_path, user_folder
from mm_edge.errors import TargetError
from mm_edge.store import write_atomically


def write_profile(name: str, like: str) -> Path:
    """Write the profile `name` into the user's folder, a copy of the profile `like`, and return its file.

    Raises:
        TargetError: the name cannot be one or exists already, or there is no profile `like`.
        JobError: the file cannot be written.
    """
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise TargetError(f"target name '{name}' may hold letters, digits, '-', '_' and '.' only")
    if name in list_targets():
        raise TargetError(f"target '{name}' exists already: see 'mm-edge targets show {name}'")
    source = profile_path(like)
    source_name = parse_target(source).name
    text = source.read_text(encoding="utf-8").replace(f'name = "{source_name}"', f'name = "{name}"', 1)
    path = user_folder() / f"{name}.toml"
    write_atomically(path, text.encode())
    return path
