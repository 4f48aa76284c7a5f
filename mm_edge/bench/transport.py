"""How a request reaches a worker and how its answer comes back.

A transport puts files on the device, runs the worker there with one JSON request and returns the answer. What a device
sends is not trusted: its size is limited, it must be one marked line of JSON, and session.py checks every field before
it is used.
"""

from __future__ import annotations

import contextlib
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
from mm_edge.errors import BenchError, visible
from mm_edge.records import parse_json
from mm_edge.store import hash_file

MAX_ANSWER_BYTES = 64 << 20
MAX_STDERR_BYTES = 1 << 20
DEFAULT_TIMEOUT_S = 600.0

WORKER_FILE = Path(worker.__file__)


class Transport(Protocol):
    """Reaches one device. Enter it with `with` before asking; transports.py lists the kinds."""

    @property
    def name(self) -> str:
        """What messages call the device, such as "this machine" or "ssh pi@board"."""
        ...

    @property
    def source(self) -> str:
        """What its latencies are labelled with: "host", "device" or "emulated" (times mean nothing)."""
        ...

    def ask(
        self,
        command: str,
        files: Mapping[str, Path],
        options: Mapping[str, Any],
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Run one worker command and return its result.

        Each of `files` is put on the device, and the option of the same name is its path there.

        Raises:
            BenchError: the device cannot be reached, the worker failed or died, or its answer is malformed.
        """
        ...

    def __enter__(self) -> Self:
        """Connect."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; every file that was put on the device is removed."""
        ...


class LocalTransport:
    """Runs the worker on this machine, in a process of its own.

    Args:
        python: the command that starts Python, where it is not the running interpreter.
        environment: variables added to this process's own.
    """

    name = "this machine"
    source = "host"

    def __init__(self, python: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Use `python` (default: the running interpreter) with `environment` added."""
        # -P keeps the worker's folder off the module path, so that "import stats" does not find this package's file.
        self._python = list(python) or [sys.executable, "-P"]
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
    return json.dumps(
        {"schema_version": worker.PROTOCOL_VERSION, "command": command, "options": dict(options)}
    ).encode()


class Finished:
    """What a process that run_bounded ran has left.

    Attributes:
        returncode: its exit status; None if it was stopped.
        stdout: its output.
        stderr: the end of its error output.
        stopped: why it was stopped, "timeout" or "output"; None if it ended by itself.
        limit_s: the seconds it was given.
    """

    def __init__(
        self,
        returncode: int | None,
        stdout: bytes,
        stderr: bytes,
        stopped: str | None,
        limit_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Keep the five values."""
        self.limit_s = limit_s
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
    """Return `text`, which a device sent, visible and cut to `limit` characters."""
    clean = visible(text[: limit + 1].strip())
    return clean if len(clean) <= limit else clean[:limit] + "..."


def run_bounded(
    argv: Sequence[str], stdin: bytes, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run `argv`; stop it when it takes longer than `timeout_s` or prints more than MAX_ANSWER_BYTES.

    Raises:
        BenchError: the program does not exist or may not be run.
    """
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
    except OSError as error:
        raise BenchError(f"cannot run {argv[0]}: {error.strerror}") from error
    deadline = time.monotonic() + timeout_s
    with process:
        try:
            stopped, out, err = _pump(process, stdin, deadline)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        if not stopped:
            # A process that closed its pipes may still run: the limit holds until it has ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            stopped = "timeout" if process.poll() is None else None
        if stopped:
            process.kill()
        code = process.wait()
    return Finished(None if stopped else code, out, err, stopped, timeout_s)


def _pump(process: subprocess.Popen[bytes], stdin: bytes, deadline: float) -> tuple[str | None, bytes, bytes]:
    """Write `stdin` and read until the process closes its pipes.

    Returns:
        Why it must be stopped ("timeout", "output" or None), its output, and the end of its error output.
    """
    assert process.stdin and process.stdout and process.stderr
    collected = {process.stdout: bytearray(), process.stderr: bytearray()}
    try:
        process.stdin.write(stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # the process ended without reading; the caller reports its exit status
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
    """Return the worker's result, read from what its process printed.

    Raises:
        BenchError: the process was stopped, died or printed no answer, or the answer is an error.
    """
    if finished.stopped == "timeout":
        raise BenchError(
            f"the worker on {device} did not answer within {finished.limit_s:.0f} s and was stopped; see that "
            "the device is up and idle, and run the same again"
        )
    if finished.stopped == "output":
        raise BenchError(f"the worker on {device} sent more than {MAX_ANSWER_BYTES >> 20} MB; the answer was refused")
    reply = _find_reply(finished.stdout)
    if reply is None:
        raise _no_answer(finished, device)
    if reply.get("schema_version") != worker.PROTOCOL_VERSION:
        raise BenchError(
            f"the worker on {device} speaks schema {reply.get('schema_version')!r}; this is {worker.PROTOCOL_VERSION}"
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
        reply = parse_json(lines[-1][len(mark) :])
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
