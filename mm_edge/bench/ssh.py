"""A device reached through the system's OpenSSH, so that the user's configuration, keys and jump hosts work.

All commands share one connection. scp copies files into a scratch folder that mktemp makes on the device; a file is
named by its hash, and only the FILES_KEPT most recently used ones are kept. The folder is removed at the end. When the
connection drops, a worker that still runs on the device is stopped, the connection is made again and the request is
repeated. Every text from the user or the device is quoted before a shell sees it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm_edge.bench.transport import (
    DEFAULT_TIMEOUT_S,
    WORKER_FILE,
    Finished,
    decode_answer,
    encode_request,
    hash_sent_file,
    printable,
    run_bounded,
)
from mm_edge.errors import BenchError, UsageError

CONFIG_VARIABLE = "MM_EDGE_SSH_CONFIG"  # a file to use in place of ~/.ssh/config
CONNECT_TIMEOUT_S = 10
RECONNECT_S = 120.0
FILES_KEPT = 4  # dense, candidate, images and one to spare
SSH_FAILED = 255  # ssh's own status when it, and not the command, failed
NOT_FOUND = 127
MAX_REPEATS = 3  # of one request, each after a lost connection

_HOST = re.compile(r"(?:(?P<user>[\w.-]+)@)?(?P<name>[\w][\w.-]*|\[[0-9A-Fa-f:]+\])(?::(?P<port>\d{1,5}))?")
_SCRATCH = re.compile(r"/[\w./+-]*/mm-edge-\w+")


class _LostError(BenchError):
    """The connection dropped; the request may be repeated."""


def parse_host(text: str) -> tuple[str, int | None]:
    """Return (USER@HOST, port) of USER@HOST[:PORT] or of an alias of the user's ssh configuration.

    Raises:
        UsageError: the text is neither.
    """
    match = _HOST.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if match is None or (port is not None and not 1 <= port <= 65535):
        raise UsageError(f"--host '{printable(text)}' is not USER@HOST[:PORT] or an ssh alias")
    name = match["name"].strip("[]")
    return (f"{match['user']}@{name}" if match["user"] else name), port


class SshTransport:
    """Runs the worker on a device through ssh.

    Args:
        host: USER@HOST[:PORT] or an alias.
        python: the command that starts Python on the device.
        reconnect_s: for how many seconds to try again after the connection dropped.
        tell: is called with one line when the connection is lost and when it is back.
    """

    def __init__(
        self,
        host: str,
        python: Sequence[str] = ("python3",),
        reconnect_s: float = RECONNECT_S,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Keep the settings; the device is contacted when the transport is entered."""
        self._host, self._port = parse_host(host)
        self._python = list(python)
        self._reconnect_s = reconnect_s
        self._tell = tell
        self._scratch: str | None = None
        self._staged: dict[str, None] = {}  # file names on the device, the least recently used first
        self._folder: str | None = None
        self._emulated = False
        self.name = f"ssh {host}"

    @property
    def source(self) -> str:
        """ "device", or "emulated" when the Python there reports an emulated processor."""
        return "emulated" if self._emulated else "device"

    def __enter__(self) -> Self:
        """Connect, make the scratch folder and send the worker.

        Raises:
            BenchError: ssh is missing here, the device cannot be reached, or it has no scratch folder or no Python.
        """
        for program in ("ssh", "scp"):
            if shutil.which(program) is None:
                raise BenchError(
                    f"--host needs {program}: install OpenSSH (Debian: sudo apt-get install openssh-client)"
                )
        self._folder = tempfile.mkdtemp(prefix="mm-edge-ssh-")
        try:
            self._prepare()
            self._emulated = self.ask("info", {}, {}).get("emulated") is True
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the scratch folder and close the connection."""
        self._leave()

    def ask(
        self,
        command: str,
        files: Mapping[str, Path],
        options: Mapping[str, Any],
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Run one worker command on the device, repeating it when the connection drops; see Transport.ask."""
        for _ in range(MAX_REPEATS):
            try:
                return self._ask_once(command, files, options, timeout_s)
            except _LostError as lost:
                self._reconnect(lost)
        raise BenchError(
            f"{self.name}: the connection dropped {MAX_REPEATS} times during one '{command}'; the device may lack "
            "memory or power. What was measured is kept: run the same command again to go on"
        )

    def _ask_once(
        self, command: str, files: Mapping[str, Path], options: Mapping[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        paths = {key: self._stage(path) for key, path in files.items()}
        request = encode_request(command, {**options, **paths})
        # The shell that starts the worker writes its process number to a file, so that it can be stopped later.
        script = (
            f"cd {shlex.quote(self._require_scratch())} && export TMPDIR=$PWD && exec 3<&0 && "
            f"{{ {shlex.join([*self._python, WORKER_FILE.name])} <&3 & echo $! > pid; wait $!; }}"
        )
        finished = self._ssh(script, request, timeout_s)
        if finished.stopped:
            self._stop_worker()
        if finished.returncode == SSH_FAILED:
            raise _LostError(finished.last_words or "connection closed")
        if finished.returncode == NOT_FOUND:
            raise BenchError(
                f"{self.name} has no '{shlex.join(self._python)}': install Python 3.8 or later there "
                "(Debian: sudo apt-get install python3), or name it as 'python' in the target's profile"
            )
        return decode_answer(finished, self.name)

    # --- connection ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the scratch folder and send the worker; after a lost connection, use the old folder if it is there."""
        if self._scratch is not None:
            if self._run(f"test -d {shlex.quote(self._scratch)}").returncode == 0:
                self._stop_worker()
                return
            self._scratch, self._staged = None, {}
        made = self._run('mktemp -d "${TMPDIR:-/tmp}/mm-edge-XXXXXXXX"')
        lines = [line for line in made.stdout.decode("utf-8", "replace").splitlines() if _SCRATCH.fullmatch(line)]
        if made.returncode != 0 or not lines:
            raise BenchError(f"{self.name}: cannot make a scratch folder: {made.last_words or 'mktemp gave no path'}")
        self._scratch = lines[-1]
        self._send(WORKER_FILE, WORKER_FILE.name)

    def _reconnect(self, lost: BenchError) -> None:
        self._tell(f"{self.name}: connection lost ({lost}); trying again for {self._reconnect_s:.0f} s")
        deadline = time.monotonic() + self._reconnect_s
        pause = 1.0
        while True:
            try:
                self._prepare()
            except _LostError as error:
                if time.monotonic() + pause > deadline:
                    raise BenchError(
                        f"{self.name}: connection lost and not back within {self._reconnect_s:.0f} s ({error}). "
                        "What was measured is kept: run the same command again to go on"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 8.0)
            else:
                self._tell(f"{self.name}: connected again")
                return

    def _leave(self) -> None:
        try:
            if self._scratch is not None:
                self._stop_worker()
                self._ssh(f"rm -rf {shlex.quote(self._scratch)}", b"", CONNECT_TIMEOUT_S * 2)
            if self._folder is not None:
                run_bounded(["ssh", *self._options("-p"), "-O", "exit", "--", self._host], b"", CONNECT_TIMEOUT_S)
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._scratch, self._folder, self._staged = None, None, {}

    def _stop_worker(self) -> None:
        scratch = shlex.quote(self._require_scratch())
        self._ssh(f'cd {scratch} && test -s pid && kill -9 "$(cat pid)"; rm -f pid', b"", CONNECT_TIMEOUT_S * 2)

    def _options(self, port_flag: str) -> list[str]:
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "ControlMaster": "auto",
            "ControlPath": f"{self._folder}/%C",
            "ControlPersist": "60",
            "LogLevel": "ERROR",
        }
        options = [piece for key, value in settings.items() for piece in ("-o", f"{key}={value}")]
        if os.environ.get(CONFIG_VARIABLE):
            options = ["-F", os.environ[CONFIG_VARIABLE], *options]
        return [*options, port_flag, str(self._port)] if self._port else options

    def _ssh(self, script: str, stdin: bytes, timeout_s: float) -> Finished:
        remote = shlex.join(["sh", "-c", script])  # the login shell may be any; sh is everywhere
        return run_bounded(["ssh", *self._options("-p"), "--", self._host, remote], stdin, timeout_s)

    def _run(self, script: str) -> Finished:
        """Run a short command; _LostError if the connection was open and dropped, BenchError if it never was."""
        finished = self._ssh(script, b"", CONNECT_TIMEOUT_S * 3)
        if finished.returncode == SSH_FAILED or finished.stopped:
            raise self._connection_error(finished)
        return finished

    def _connection_error(self, finished: Finished) -> BenchError:
        words = finished.last_words or "no answer"
        if "Permission denied" in words:
            return BenchError(
                f"{self.name}: {words}; mm-edge types no passwords: set up a key with 'ssh-copy-id {self._host}'"
            )
        if "Host key verification failed" in finished.stderr.decode("utf-8", "replace"):
            return BenchError(
                f"{self.name}: the host key is not known or has changed; connect once by hand with 'ssh {self._host}'"
            )
        if self._staged or self._scratch:
            return _LostError(words)
        return BenchError(f"{self.name}: cannot connect: {words}; check that 'ssh {self._host} true' works")

    # --- files --------------------------------------------------------------------------------------------------

    def _stage(self, path: Path) -> str:
        """Return the path on the device of the file `path`, which is sent unless it is there."""
        name = f"{hash_sent_file(path)[:24]}{path.suffix if path.suffix.isascii() else ''}"
        if name in self._staged:
            del self._staged[name]
        else:
            self._send(path, name)
        self._staged[name] = None
        while len(self._staged) > FILES_KEPT:
            oldest = next(iter(self._staged))
            del self._staged[oldest]
            self._run(f"rm -f {shlex.quote(f'{self._require_scratch()}/{oldest}')}")
        return f"{self._require_scratch()}/{name}"

    def _send(self, path: Path, name: str) -> None:
        destination = f"{self._require_scratch()}/{name}"
        source = str(path.resolve())  # absolute, so that a colon in it is not read as a host
        address = f"[{self._host}]" if ":" in self._host else self._host
        argv = ["scp", "-q", *self._options("-P"), "--", source, f"{address}:{destination}.part"]
        sent = run_bounded(argv, b"", DEFAULT_TIMEOUT_S)
        if sent.returncode == 0:
            moved = self._run(f"mv {shlex.quote(destination + '.part')} {shlex.quote(destination)}")
            if moved.returncode == 0:
                return
            sent = moved
        alive = self._run("true")  # raises _LostError if the copy failed because the connection dropped
        assert alive.returncode is not None
        raise self._send_error(path, sent)

    def _send_error(self, path: Path, sent: Finished) -> BenchError:
        scratch = self._require_scratch()
        free = self._free_bytes()
        self._run(f"rm -f {shlex.quote(scratch)}/*.part")
        size = path.stat().st_size
        if free is not None and free < size:
            return BenchError(
                f"{self.name}: the disk is full: {path.name} needs {size / 1e6:.1f} MB and {scratch} has "
                f"{free / 1e6:.1f} MB; free some there, or point TMPDIR at a larger disk"
            )
        return BenchError(f"{self.name}: cannot copy {path.name}: {sent.last_words or sent.stopped or 'scp failed'}")

    def _free_bytes(self) -> int | None:
        told = (
            self._run(f"df -Pk {shlex.quote(self._require_scratch())}").stdout.decode("utf-8", "replace").splitlines()
        )
        fields = told[-1].split() if told else []
        return int(fields[3]) * 1024 if len(fields) > 3 and fields[3].isdigit() else None

    def _require_scratch(self) -> str:
        if self._scratch is None:
            raise BenchError(f"{self.name} is not open")
        return self._scratch
