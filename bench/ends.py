# SPDX-License-Identifier: BSD-3-Clause
"""Two ends to measure between: network namespaces joined by veth (MTU 9000), a container each.

"Container" here means namespaces of its own (mount, PID, IPC, UTS) and nothing of an engine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MTU = 9000
_LISTEN = "0A"  # a listening socket's state in /proc/net/tcp


class BenchError(Exception):
    """A measurement could not be made; the text names the program and what it said."""


@dataclass(frozen=True, slots=True)
class End:
    """One of the two: `name` of its network namespace, its IPv4 `address`."""

    name: str
    address: str

    def command(self, argv: Sequence[str], *, container: bool = True) -> list[str]:
        """The command line that runs `argv` at this end."""
        inside = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
        return ["nsenter", f"--net=/run/netns/{self.name}", *(inside if container else []), *argv]

    def start(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, container: bool = True
    ) -> subprocess.Popen[str]:
        """Start `argv` with `env` added to the environment; output and errors are piped."""
        return subprocess.Popen(
            self.command(argv, container=container), env={**os.environ, **(env or {})}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, timeout: float = 60) -> str:
        """Run `argv` to its end and return its output. Raises BenchError when it fails."""
        with running(self.start(argv, env)) as process:
            return finish(process, argv, timeout=timeout)


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends `process` when the block is left, however that happens."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def finish(process: subprocess.Popen[str], argv: Sequence[str], *, timeout: float = 60) -> str:
    """Wait for the end of a process and return its output. Raises BenchError when it failed or hangs."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(argv)}: not finished after {timeout:.0f} s") from None
    if process.returncode != 0:
        said = (err.strip() or out.strip()).splitlines()
        why = said[-1] if said else "no message"
        raise BenchError(f"{' '.join(argv)}: exit status {process.returncode}: {why}")
    return out


def wait_listening(process: subprocess.Popen[str], port: int, timeout: float = 10) -> None:
    """Until something listens on TCP `port` in the network namespace of `process`."""
    wanted = f":{port:04X}"
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[1].endswith(wanted) and fields[3] == _LISTEN:
                        return
        if process.poll() is not None:
            out, err = process.communicate()
            raise BenchError(f"the server ended before it listened: {(err or out).strip()[-200:]}")
        time.sleep(0.005)
    raise BenchError(f"nothing listens on port {port} after {timeout:.0f} s")


def wait_line(process: subprocess.Popen[str], line: str) -> None:
    """Until `process` prints `line` (its first one)."""
    assert process.stdout is not None
    got = process.stdout.readline().strip()
    if got != line:
        _, err = process.communicate()
        raise BenchError(f"expected {line!r}, got {got!r}: {err.strip()[-200:]}")


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BenchError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


@contextlib.contextmanager
def two_ends(prefix: str = "10.213.7") -> Iterator[tuple[End, End]]:
    """Two fresh ends, gone when the block is left. Needs root."""
    if os.geteuid() != 0:
        raise BenchError("network namespaces need root")
    ends = [End(f"mgbench-{os.getpid()}-{side}", f"{prefix}.{i}") for i, side in ((1, "a"), (2, "b"))]
    made: list[str] = []
    try:
        for end in ends:
            _ip("netns", "add", end.name)
            made.append(end.name)
        a, b = (end.name for end in ends)
        _ip("link", "add", "eth0", "mtu", str(MTU), "netns", a, "type", "veth",
            "peer", "name", "eth0", "mtu", str(MTU), "netns", b)  # fmt: skip
        for end in ends:
            _ip("-n", end.name, "addr", "add", f"{end.address}/24", "dev", "eth0")
            _ip("-n", end.name, "link", "set", "lo", "up")
            _ip("-n", end.name, "link", "set", "eth0", "up")
        yield ends[0], ends[1]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
