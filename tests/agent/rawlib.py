# SPDX-License-Identifier: BSD-3-Clause
"""A library connection in the test's own process, for tests that need many or strange ones."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from migroce import control as c


class RawLib:
    """Connects; `hello` returns the WELCOME and keeps the sockets."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(path))  # waits while the backlog is full: with a timeout it would be EAGAIN
        self.sock.settimeout(60)
        self.fds: list[int] = []
        self.instance = os.urandom(16)

    def hello(self, state: int = 0, slot: int = c.NO_SLOT, base: int = 0, count: int = 0,
              fds: tuple[int, ...] = (), instance: bytes | None = None, flags: int = 0) -> c.Welcome:
        msg = c.Hello(instance or self.instance, os.getpid(), state, slot, base, count, "raw", flags=flags)
        answer = self._ask(msg, list(fds))
        assert isinstance(answer, c.Welcome)
        return answer

    def addresses(self, *have: bytes) -> list[socket.socket]:
        """The sockets that ADDRESSES with these GIDs is answered with."""
        before = len(self.fds)
        answer = self._ask(c.Addresses(have))
        assert isinstance(answer, c.Sockets)
        assert answer.status == 0
        return [socket.socket(fileno=os.dup(fd)) for fd in self.fds[before:]]

    def _ask(self, msg: c.Message, fds: list[int] | None = None) -> c.Welcome | c.Sockets:
        socket.send_fds(self.sock, [c.encode(msg, 9)], fds or [])
        data, got, _, _ = socket.recv_fds(self.sock, 4096, c.MAX_FDS)
        assert data, "the agent ended the connection"
        self.fds += got
        request, answer = c.decode(data)
        assert isinstance(answer, c.Welcome | c.Sockets)
        assert request == 9
        assert answer.n_sockets == len(got)
        return answer

    def ended(self) -> bool:
        """Whether the agent ends the connection."""
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
