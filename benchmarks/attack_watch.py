"""Watches one process for what a hostile file must never bring about: programs started, addresses used, files written.

Python's audit events tell; they cannot be switched off by what runs later. Addresses and programs are refused as well.
This module stands alone: processes of the benchmark load it by its path before anything else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_PROGRAMS = frozenset(
    ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
)
_ADDRESSES = frozenset(
    ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
)
_CHANGES = frozenset(("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
                      "os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "os.utime"))  # fmt: skip
_HARMLESS = ("/dev/null", "/dev/tty", "/proc/self/", "/dev/shm/", "/dev/pts/")


def watch(events: int, allowed: str, program: str) -> None:
    """Write a line to the descriptor `events` for each event.

    Args:
        events: the descriptor.
        allowed: the folder in which files may be made and changed.
        program: a program whose arguments hold this text may be started.
    """

    def tell(kind: str, what: str) -> None:
        os.write(events, f"{kind} {what[:300]!r}\n".encode("utf-8", "backslashreplace"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _PROGRAMS:
            if not program or program not in repr(arguments):
                tell("executed", f"{event} {arguments!r}")
                raise PermissionError("the benchmark refuses programs")
        elif event in _ADDRESSES:
            tell("network", f"{event} {arguments[1:]!r}")
            raise PermissionError("the benchmark refuses addresses")
        elif event == "open":
            if _writes(arguments):
                _check(arguments[0])
        elif event in _CHANGES:
            _check(arguments[0])

    def _check(path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        whole = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (links are not followed)
        if not whole.startswith(allowed) and not whole.startswith(_HARMLESS):
            tell("touched", whole)

    def _writes(arguments: tuple[Any, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        if isinstance(mode, str):
            return any(letter in mode for letter in "wax+")
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))

    sys.addaudithook(hook)


def watch_from_environment() -> None:
    """Watch as the variables ATTACK_EVENTS, ATTACK_ALLOWED and ATTACK_PROGRAM say."""
    path = Path(os.environ["ATTACK_EVENTS"])
    events = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    watch(events, os.environ["ATTACK_ALLOWED"], os.environ["ATTACK_PROGRAM"])
