"""How a request reaches a worker and its answer comes back.

A transport stages files on the device, runs the worker there with one JSON request and returns the validated answer.
What a device sends is not trusted: it is size-limited, must be the worker's own line of JSON, and every field a caller
uses is checked where it is used (session.py).
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mm_edge.bench import worker
from mm_edge.errors import BenchError
from mm_edge.store import hash_file

MAX_ANSWER_BYTES = 64 << 20
MAX_STDERR_BYTES = 1 << 20
DEFAULT_TIMEOUT_S = 600.0

WORKER_FILE = Path(worker.__file__)


class Transport(Protocol):
    """A way to a device. `source` labels its latencies: "host", "device", or "emulated" (times mean nothing)."""

    @property
    def name(self) -> str:
        """What messages call the device, such as "this machine" or "ssh pi@board"."""
        ...

    @property
    def source(self) -> str:
        """ "host", "device" or "emulated"."""
        ...

    def ask(
        self,
        command: str,
        files: Mapping[str, Path],
        options: Mapping[str, Any],
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Run one worker command; `files` become options of the same names that hold paths on the device.

        Raises:
            BenchError: the device cannot be reached, the worker failed or died, or its answer is not one.
        """
        ...

    def __enter__(self) -> Self:
        """Open the way there."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing behind on the device."""
        ...


class LocalTransport:
    """Runs the worker on this machine, in a process of its own.

    Args:
        python: the interpreter and what goes before it, when it is not this one.
        environment: variables added to this process's own.
    """

    name = "this machine"
    source = "host"

    def __init__(self, python: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Use `python` (default: the running interpreter) with `environment` added."""
        self._python = list(python) or [
            sys.executable,
            "-P",
        ]  # -P: this folder's modules are not to be imported by name
        self._environment = dict(environment or {})

    def ask(
        self,
        command: str,
        files: Mapping[str, Path],
        options: Mapping[str, Any],
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Run one worker command here; see Transport.ask."""
        paths = {key: str(path.resolve()) for key, path in files.items()}
        request = encode_request(command, {**options, **paths})
        argv = [*self._python, str(WORKER_FILE)]
        finished = run_bounded(argv, request, timeout_s, {**os.environ, **self._environment})
        return decode_answer(finished, self.name)

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to leave behind."""


def encode_request(command: str, options: Mapping[str, Any]) -> bytes:
    """Return the request as the worker reads it."""
    return json.dumps({"schema_version": worker.SCHEMA_VERSION, "command": command, "options": dict(options)}).encode()


class Finished:
    """What a bounded process left: exit status (None if it was stopped), output, error output, why it was stopped."""

    def __init__(self, returncode: int | None, stdout: bytes, stderr: bytes, stopped: str | None) -> None:
        """Hold the four."""
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        self.stopped = stopped

    @property
    def last_words(self) -> str:
        """The last line of error output, printable and short."""
        lines = [line for line in self.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        return printable(lines[-1]) if lines else ""


def hash_sent_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file that a device is to be sent; BenchError if it cannot be read."""
    try:
        return hash_file(path)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error


def printable(text: str, limit: int = 200) -> str:
    """Return `text` from a device made safe for a terminal: no control characters, at most `limit` long."""
    clean = "".join(c if c.isprintable() else " " for c in text).strip()
    return clean if len(clean) <= limit else clean[:limit] + "..."


def run_bounded(
    argv: Sequence[str], stdin: bytes, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run `argv`, stopping it when it takes longer than `timeout_s` or prints more than an answer can be.

    Raises:
        BenchError: the program does not exist or may not be run.
    """
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
    except OSError as error:
        raise BenchError(f"cannot run {argv[0]}: {error.strerror}") from error
    with process:
        try:
            stopped, out, err = _pump(process, stdin, time.monotonic() + timeout_s)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        if stopped:
            process.kill()
        code = process.wait()
    return Finished(None if stopped else code, out, err, stopped)


def _pump(process: subprocess.Popen[bytes], stdin: bytes, deadline: float) -> tuple[str | None, bytes, bytes]:
    """Feed and drain the process; return why it must be stopped (or None), its output and its error output."""
    assert process.stdin and process.stdout and process.stderr
    collected = {process.stdout: bytearray(), process.stderr: bytearray()}
    try:
        process.stdin.write(stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before reading; its exit status says more
    stopped = None
    with selectors.DefaultSelector() as selector:
        for pipe in collected:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            left = deadline - time.monotonic()
            if left <= 0:
                stopped = "timeout"
                break
            for key, _ in selector.select(left):
                stream: Any = key.fileobj
                chunk = os.read(stream.fileno(), 1 << 16)
                if not chunk:
                    selector.unregister(stream)
                elif len(collected[stream]) + len(chunk) <= MAX_ANSWER_BYTES:
                    collected[stream] += chunk
                else:
                    stopped = "output"
    return stopped, bytes(collected[process.stdout]), bytes(collected[process.stderr][-MAX_STDERR_BYTES:])


def decode_answer(finished: Finished, device: str) -> dict[str, Any]:
    """Return the worker's result from what its process printed.

    Raises:
        BenchError: it was stopped, died, printed no answer, or its answer is an error.
    """
    if finished.stopped == "timeout":
        raise BenchError(f"the worker on {device} did not answer in time and was stopped")
    if finished.stopped == "output":
        raise BenchError(f"the worker on {device} sent more than {MAX_ANSWER_BYTES >> 20} MB; the answer was refused")
    reply = _find_reply(finished.stdout)
    if reply is None:
        raise _no_answer(finished, device)
    if reply.get("schema_version") != worker.SCHEMA_VERSION:
        raise BenchError(
            f"the worker on {device} speaks schema {reply.get('schema_version')!r}; this is {worker.SCHEMA_VERSION}"
        )
    error = reply.get("error")
    if error is not None:
        message = error.get("message") if isinstance(error, dict) else error
        raise BenchError(f"{device}: {printable(str(message), 600)}")
    result = reply.get("result")
    if not isinstance(result, dict):
        raise BenchError(f"the worker on {device} sent an answer without a result")
    return result


def _find_reply(stdout: bytes) -> dict[str, Any] | None:
    mark = worker.RESULT_MARK.encode()
    lines = [line for line in stdout.splitlines() if line.startswith(mark)]
    if not lines:
        return None
    try:
        reply = json.loads(lines[-1][len(mark) :])
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def _no_answer(finished: Finished, device: str) -> BenchError:
    if finished.returncode in (-9, 137):
        return BenchError(
            f"the worker on {device} was killed, most likely for want of memory; give a smaller model or free memory"
        )
    if finished.returncode != 0:
        words = finished.last_words or "it printed nothing"
        return BenchError(f"the worker on {device} ended with status {finished.returncode}: {words}")
    seen = printable(finished.stdout[:200].decode("utf-8", "replace")) or "nothing"
    return BenchError(f"the worker on {device} did not answer in JSON; it printed: {seen}")
