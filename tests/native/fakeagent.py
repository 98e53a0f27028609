# SPDX-License-Identifier: BSD-3-Clause
"""An agent that does exactly what a test says: the other end of the library's control connection.

Blocking, one thread; every wait ends after `WAIT` seconds with an exception.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from migroce import control
from migroce import dump as dump_format
from migroce.agent.sockets import attach_bpf, make_udp, steering
from migroce.control import (
    MAX_FDS,
    MAX_MESSAGE,
    SLOT_QPNS,
    SLOT_SHIFT,
    DumpReply,
    DumpReq,
    Hello,
    HelloState,
    Message,
    Resumed,
    Stop,
    Stopped,
    Welcome,
)

from .netns import Node

WAIT = 60.0
_SO_ATTACH_REUSEPORT_CBPF = 51
_ANY6 = bytes(16)

M = TypeVar("M", bound=Message)


def udp_sockets(node: Node, *, ipv6: bool = True, wild: bool = False) -> list[socket.socket]:
    """What the agent makes for a process: bound to port 4791, v4 first."""
    v4 = bytes(4) if wild else node.gid[12:]
    made = [node.call(lambda: make_udp(socket.AF_INET, v4, freebind=False))]
    if ipv6:
        made.append(node.call(lambda: make_udp(socket.AF_INET6, _ANY6, freebind=False)))
    return made


def steer(socks: list[socket.socket]) -> None:
    """Slot n's packets to the n-th socket of one family (they are bound in that order)."""
    attach_bpf(socks[0], _SO_ATTACH_REUSEPORT_CBPF, steering({n: n for n in range(len(socks))}))


@dataclass(slots=True)
class Link:
    """One connection of a library."""

    sock: socket.socket
    fds: list[int] = field(default_factory=list)
    """Descriptors that came with the last message."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()
        self._drop_fds()

    def _drop_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def send(self, message: Message, request: int = 7, fds: list[int] | None = None) -> None:
        """One message with descriptors (still the caller's)."""
        socket.send_fds(self.sock, [control.encode(message, request)], fds or [])

    def receive(self, kind: type[M]) -> M:
        """The next message, which must be of that kind; its descriptors are in `fds`."""
        self._drop_fds()
        data, self.fds, flags, _ = socket.recv_fds(self.sock, MAX_MESSAGE, MAX_FDS)
        assert data, f"the library hung up instead of sending {kind.__name__}"
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        message = control.decode(data)[1]
        assert isinstance(message, kind), message
        return message

    def wait_end(self) -> None:
        """The library hangs up and says nothing before."""
        assert self.sock.recv(MAX_MESSAGE) == b""

    def dump(self, length: int) -> bytes:
        """The contents of the memory file that came along."""
        (fd,) = self.fds
        return os.pread(fd, length, 0)

    def welcome(self, hello: Hello, node: Node, socks: list[socket.socket], slot: int = 0) -> None:
        """Give the process its slot, or what it says it has when it had one."""
        base, count = slot << SLOT_SHIFT, SLOT_QPNS
        if hello.state != HelloState.FRESH:
            base, count = hello.qpn_base, hello.qpn_count
        self.send(Welcome(0, slot, base, count, len(socks), 0, node.gid), fds=[s.fileno() for s in socks])

    def stop(self, timeout_ms: int = 1000) -> dump_format.Dump:
        """Stop the process and wait until it has closed everything: its dump."""
        self.send(Stop(0, timeout_ms))
        stopped = self.receive(Stopped)
        assert stopped.status == 0
        dump = dump_format.parse(self.dump(stopped.dump_len))
        assert len(dump.qps) == stopped.n_qp
        self.wait_end()
        return dump

    def live_dump(self) -> dump_format.Dump:
        """What DUMP_REQ is answered with."""
        self.send(DumpReq())
        reply = self.receive(DumpReply)
        assert reply.status == 0
        return dump_format.parse(self.dump(reply.dump_len))

    def resumed(self) -> Resumed:
        """Wait for RESUMED."""
        return self.receive(Resumed)


class FakeAgent:
    """A listening agent.sock in a directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "agent.sock"
        self._listener: socket.socket | None = None
        self.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.vanish()

    def listen(self) -> None:
        """Be there (again)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind(str(self.path))
        sock.listen(16)
        sock.settimeout(WAIT)
        self._listener = sock

    def vanish(self) -> None:
        """Take the listening socket away; connections stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink()

    def accept(self, state: HelloState) -> tuple[Link, Hello]:
        """The next connection and its HELLO, which must be of that state."""
        assert self._listener is not None
        sock, _ = self._listener.accept()
        sock.settimeout(WAIT)
        link = Link(sock)
        hello = link.receive(Hello)
        assert hello.state == state
        return link, hello


@contextlib.contextmanager
def sockets_for(node: Node) -> Iterator[list[socket.socket]]:
    """The agent's duplicates, closed at the end."""
    socks = udp_sockets(node)
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def until(condition: str, check: object) -> None:
    """Poll a callable until it is true; AssertionError names the condition after `WAIT` seconds."""
    assert callable(check)
    end = time.monotonic() + WAIT
    while not check():
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.001)
