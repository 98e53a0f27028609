# SPDX-License-Identifier: BSD-3-Clause
"""What the agent's tests stand on: network namespaces, agents, fake processes, packets. All real."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from migroce.agent import netns
from migroce.agent.client import AgentClient
from migroce.dump import gid_bytes
from migroce.wire import Aeth, Flow, Op, Packet, build

T = TypeVar("T")
HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
WAIT = 60.0
"""Longest wait for anything, seconds: a test that gets there fails."""


def sh(*argv: str, check: bool = True) -> str:
    """Run a command; its output."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


class Wires:
    """Two namespaces joined by a veth pair: `a` (10.7.0.1) is the container's, `b` (10.7.0.2) its peer's."""

    A, B = "10.7.0.1", "10.7.0.2"

    def __init__(self, tag: str) -> None:
        self.a, self.b = f"mga-{tag}", f"mgb-{tag}"
        for name in (self.a, self.b):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "link", "add", "eth0", "netns", self.a, "mtu", "9000", "type", "veth",
           "peer", "name", "eth0", "netns", self.b)
        for name, address in ((self.a, self.A), (self.b, self.B)):
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            sh("ip", "-n", name, "addr", "add", f"fd07::{address[-1]}/64", "dev", "eth0", "nodad")
            sh("ip", "-n", name, "link", "set", "eth0", "mtu", "9000", "up")

    def path(self, name: str) -> str:
        return f"/run/netns/{name}"

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Call something inside a namespace."""
        fd = netns.open_path(self.path(name))
        try:
            return netns.run_in(fd, work)
        finally:
            os.close(fd)

    def close(self) -> None:
        for name in (self.a, self.b):
            sh("ip", "netns", "del", name, check=False)


class Peer:
    """A RoCE peer in namespace b: sends packets to a, receives answers."""

    def __init__(self, wires: Wires, address: str = Wires.B, target: str = Wires.A, port: int = 4791) -> None:
        self.address, self.target, self.port = address, target, port
        self.sock = wires.run(wires.b, self._make)

    def _make(self) -> socket.socket:
        v6 = ":" in self.address
        sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, 23, 2)
        else:
            sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # DF and IP id 0
        sock.bind((self.address, self.port))
        sock.settimeout(WAIT)
        return sock

    @property
    def flow(self) -> Flow:
        return Flow(gid_bytes(self.address), gid_bytes(self.target), self.port)

    def packet(self, opcode: int, qpn: int, psn: int, *, payload: bytes = b"", capable: bool = True,
               **more: Any) -> bytes:
        pad = -len(payload) & 3
        return build(Packet(opcode, qpn, psn, payload=payload, pad=pad, capable=capable, **more), self.flow)

    def send(self, *packets: bytes) -> None:
        for packet in packets:
            self.sock.sendto(packet, (self.target, 4791))

    def send_train(self, packets: list[bytes]) -> None:
        """All in one GSO call."""
        size = struct.pack("H", len(packets[0]))
        self.sock.sendmsg([b"".join(packets)], [(socket.IPPROTO_UDP, 103, size)], 0, (self.target, 4791))

    def receive(self) -> bytes:
        return self.sock.recv(65536)

    def nothing(self) -> None:
        """Nothing has come up to now (a marker round has passed through the same path)."""
        ready, _, _ = select.select([self.sock], [], [], 0.0)
        assert not ready, f"unexpected packet {self.sock.recv(65536).hex()}"

    def close(self) -> None:
        self.sock.close()


def ack_of(peer: Peer, qpn: int) -> bytes:
    """A response: never answered by a stand-in."""
    return peer.packet(Op.ACK, qpn, 0, aeth=Aeth(0x1F, 0))


def command_prefix(wires: Wires | None, user: int) -> list[str]:
    """What puts a command into namespace a and makes it an unprivileged user's."""
    inside = [] if wires is None else ["nsenter", f"--net={wires.path(wires.a)}"]
    return [*inside, *(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else [])]


class Agent:
    """An agent process."""

    def __init__(self, run_dir: Path, *args: str, wires: Wires | None = None, user: int = 0) -> None:
        self.run_dir = run_dir
        self.args = args
        self.inside = command_prefix(wires, user)
        self.log = run_dir.with_suffix(".log")
        self.start()

    def start(self) -> None:
        ready, told = os.pipe()
        argv = [*self.inside, sys.executable, "-m", "migroce.agent", "--run-dir", str(self.run_dir), "-v",
                "--ready-fd", str(told), *self.args]
        with self.log.open("ab") as log:
            env = os.environ | {"PYTHONPATH": str(SRC)}
            self.process = subprocess.Popen(argv, pass_fds=[told], stderr=log, env=env)
        os.close(told)
        listens = os.read(ready, 16)
        os.close(ready)
        if not listens:
            self.process.wait(WAIT)
            raise AssertionError(self.log.read_text())
        self.client = AgentClient(self.run_dir / "admin.sock")

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def close(self) -> None:
        if self.process.poll() is None:
            self.end()
        log = self.log.read_text()
        assert "Traceback" not in log, log
        assert "never" not in log, log  # "... was never retrieved", "... was never awaited"


class Fake:
    """A process with fakelib.py."""

    def __init__(self, sock: Path | str, *args: str, wires: Wires | None = None, user: int = 0) -> None:
        inside = command_prefix(wires, user)
        self.process = subprocess.Popen(
            [*inside, sys.executable, str(HERE / "fakelib.py"), str(sock), *args], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(SRC)})
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self._events.put(json.loads(line))
        self._events.put({"event": "end"})

    def expect(self, event: str) -> dict[str, Any]:
        """The next event, which must be this one."""
        got = self._events.get(timeout=WAIT)
        assert got["event"] == event, got
        return got

    def until(self, event: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            got = self._events.get(timeout=WAIT)
            if got["event"] == event:
                return got
            assert got["event"] != "end", "it has ended"

    def quiet(self) -> bool:
        return self._events.empty()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def eventually(check: Callable[[], T]) -> T:
    """Call until it returns something true."""
    deadline = time.monotonic() + WAIT
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Pids of a process's children."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def unix_sockets(under: Path) -> Iterator[Path]:
    """Socket files below a directory."""
    return (p for p in under.rglob("*") if p.is_socket())
