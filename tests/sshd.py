"""A real sshd on loopback with keys of its own, for the tests of measuring through ssh."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


def why_not() -> str | None:
    """Return why a test with sshd must be skipped, or None."""
    if SSHD is None:
        return "sshd is not installed (Debian: sudo apt-get install openssh-server)"
    if not all(shutil.which(name) for name in ("ssh", "scp", "ssh-keygen")):
        return "the OpenSSH client is not installed"
    return None


class LoopbackServer:
    """Starts, kills and restarts sshd on a high port of 127.0.0.1; `config` makes `ssh board` reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remote_tmp = folder / "remote-tmp"
        self.remote_tmp.mkdir()
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        host_key = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        self._server_config = folder / "sshd_config"
        self._server_config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nSubsystem sftp internal-sftp\nSetEnv TMPDIR={self.remote_tmp} "
            f"HOME={folder} PATH={Path(sys.executable).parent}:{os.environ['PATH']}\n"
        )
        self.config = folder / "ssh_config"
        self.config.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
            "Host *\n  StrictHostKeyChecking yes\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's own folder when it is root
        log = self.folder / "sshd.log"
        assert SSHD is not None
        self._process = subprocess.Popen(
            [SSHD, "-D", "-f", self._server_config, "-E", log], start_new_session=True, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError(f"sshd did not start: {log.read_text()}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """End sshd and the processes that serve its connections, as a power cut would."""
        if self._process is None:
            return
        for pid in [*_children(self._process.pid), self._process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        self._process = None

    def left_behind(self) -> list[str]:
        return [path.name for path in self.remote_tmp.iterdir()]


def _children(pid: int) -> list[int]:
    """Return the sshd processes below `pid`, parents first; a command they run is left alone."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        name, _, rest = stat.rpartition(")")
        if int(rest.split()[1]) == pid and "(sshd" in name:
            found += [int(entry.name), *_children(int(entry.name))]
    return found
