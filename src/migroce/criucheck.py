# SPDX-License-Identifier: BSD-3-Clause
"""Prove that a CRIU works on this kernel. Standard library only: `scripts/setup` runs it too.

A version number says little: CRIU must fit the kernel. So `verify` dumps and restores a real
process with inet sockets, and checks that it goes on from where it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from migroce.criu import find

MINIMUM = (4, 2)
"""Kernels from 6.16 on need at least this."""

_DEADLINE = 10.0  # seconds for each step of the check

# Keeps what it was last told in its memory; a TCP listener is there because CRIU 4.1 fails on it.
_PROBE = """
import os, socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen()
with open(sys.argv[1] + "~", "w") as f: f.write(str(udp.getsockname()[1]))
os.rename(sys.argv[1] + "~", sys.argv[1])
kept = b""
while True:
    said, peer = udp.recvfrom(64)
    kept = said or kept
    udp.sendto(kept, peer)
"""


class CriuError(RuntimeError):
    """CRIU is missing, too old or does not work here; the text is one sentence with the reason."""


def version(criu: Path) -> tuple[int, ...]:
    """CRIU's version as numbers, `(4, 2, 1)`. Raises CriuError when it cannot be run."""
    try:
        out = subprocess.run([criu, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CriuError(f"{criu} cannot be run: {exc}") from exc
    match = re.search(r"Version:\s*([0-9]+(?:\.[0-9]+)*)", out)
    if match is None:
        raise CriuError(f"{criu} --version says nothing that looks like a version")
    return tuple(int(part) for part in match[1].split("."))


def verify(criu: Path) -> float:
    """Dump and restore a process with `criu`; seconds it took. Needs root. Raises CriuError."""
    if os.geteuid() != 0:
        raise CriuError("the check needs root")
    have = version(criu)
    if have < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise CriuError(f"{criu} is version {'.'.join(map(str, have))}; at least {wanted} is needed")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="migroce-criu-") as tmp:
        _dump_and_restore(criu, Path(tmp))
    return time.monotonic() - started


def _dump_and_restore(criu: Path, tmp: Path) -> None:
    images = tmp / "images"
    images.mkdir()
    port_file = tmp / "port"
    probe = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, str(port_file)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd="/", env={}, start_new_session=True,
    )  # fmt: skip
    restored: subprocess.Popen[bytes] | None = None
    try:
        end = time.monotonic() + _DEADLINE
        while not port_file.exists():
            if time.monotonic() > end or probe.poll() is not None:
                raise CriuError("the process to be dumped did not start")
            time.sleep(0.005)
        port = int(port_file.read_text())
        secret = os.urandom(8).hex().encode()
        if _ask(port, secret) != secret:
            raise CriuError("the process to be dumped does not answer on the loopback interface")
        common = ["-D", str(images), "-v4"]
        dump = [str(criu), "dump", "-t", str(probe.pid), "-o", "dump.log", *common]
        _run(dump, images / "dump.log", "dump")
        probe.wait(_DEADLINE)
        restored = subprocess.Popen(
            [str(criu), "restore", "-o", "restore.log", *common],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        answer = _ask(port, b"", restored)
        if answer is None:
            raise CriuError("restore failed: " + _reason(images / "restore.log"))
        if answer != secret:
            raise CriuError("the restored process has lost its memory")
    finally:
        for _ in range(2):  # the probe or its restored self; CRIU ends with it
            with contextlib.suppress(ProcessLookupError):
                if probe.returncode is None or (restored is not None and restored.poll() is None):
                    os.kill(probe.pid, signal.SIGKILL)
            if restored is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    restored.wait(2)
        if probe.returncode is None:
            probe.wait()


def _ask(port: int, tell: bytes, alive: subprocess.Popen[bytes] | None = None) -> bytes | None:
    """What the probe keeps, after telling it `tell`; None when it does not answer in time or `alive` ends."""
    end = time.monotonic() + _DEADLINE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(0.05)
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                udp.sendto(tell, ("127.0.0.1", port))
                return udp.recv(64)
            if alive is not None and alive.poll() is not None:
                return None
    return None


def _run(argv: list[str], log: Path, step: str) -> None:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CriuError(f"{step} failed: {exc}") from exc
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        raise CriuError(f"{step} failed: {_reason(log)}" if log.exists() else f"{step} failed: {text[-1:]}")


def _reason(log: Path) -> str:
    """The first error of a CRIU log."""
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            if "Error" in line:
                return re.sub(r"^\(\S+\)\s*(\d+:)?\s*", "", line.strip())
    return "CRIU's log gives no reason"


def main() -> int:
    """`python -m migroce.criucheck [PATH]`: check and print the verdict; exit status 0 when it works."""
    criu = Path(sys.argv[1]) if len(sys.argv) > 1 else find()
    if criu is None:
        print("no criu found")
        return 1
    try:
        took = verify(criu)
    except CriuError as exc:
        print(exc)
        return 1
    print(f"criu {'.'.join(map(str, version(criu)))}: dump and restore verified in {took:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
