# SPDX-License-Identifier: BSD-3-Clause
"""Listening sockets for the library and the connections they accept: framing, limits, credentials.

A peer is a process of a container and may be hostile: messages and descriptors have limits, a
connection must introduce itself within a time, and whatever it does wrong ends it and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import struct
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from migroce.agent import netns
from migroce.agent.unix import bind_unix
from migroce.control import MAX_FDS, MAX_MESSAGE, ControlError, Message, decode, encode

log = logging.getLogger("migroce.agent")

HELLO_SECONDS = 5.0
MAX_LINKS = 256
"""Connections per listening socket: 64 slots, the rest for those that come and go."""
_BATCH = 16
_HUNG_UP = (errno.EPIPE, errno.ECONNRESET)


class Handler(Protocol):
    """Who owns the connections of a listening socket."""

    def on_message(self, link: Link, request_id: int, msg: Message, fds: list[int]) -> None:
        """A message. Descriptors left in `fds` are closed afterwards. ControlError ends the link."""

    def on_closed(self, link: Link, reason: str) -> None:
        """The connection is gone; `reason` is "" when the process closed it."""


class Link:
    """One connection of one process."""

    __slots__ = ("_handler", "_loop", "_on_gone", "_sock", "_timer", "closed", "owner", "pid", "pidfd", "uid")

    def __init__(self, sock: socket.socket, handler: Handler, on_gone: Callable[[Link], None]) -> None:
        self._sock = sock
        self._handler = handler
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self.owner: object = None
        self.closed = False
        cred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.uid, _gid = struct.unpack("iII", cred)
        self.pidfd = netns.open_pidfd(self.pid)
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(
            HELLO_SECONDS, self.close, f"did not introduce itself within {HELLO_SECONDS:g} s"
        )
        self._loop.add_reader(sock.fileno(), self._readable)

    def introduced(self, owner: object) -> None:
        """It has said HELLO and belongs to `owner` now."""
        self.owner = owner
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def process_gone(self) -> bool:
        """Whether the process at the other end has died."""
        return self.pidfd is not None and is_dead(self.pidfd)

    def send(self, msg: Message, fds: Sequence[int] = (), request_id: int = 0) -> bool:
        """Send a message; False when that cannot be done at once, and the link is closed.

        Not when the other end has hung up: what it said before (STOPPED, say) is still to be read, and
        its end after that.
        """
        if self.closed:
            return False
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            self._sock.sendmsg([encode(msg, request_id)], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError as e:
            if e.errno not in _HUNG_UP:
                self.close(f"cannot be written to: {e.strerror}")
            return False
        return True

    def close(self, reason: str = "") -> None:
        """End the connection and tell the handler. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._on_gone(self)
        self._handler.on_closed(self, reason)
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def _readable(self) -> None:
        for _ in range(_BATCH):
            if self.closed or not self._read_one():
                return

    def _read_one(self) -> bool:
        fds: list[int] = []
        try:
            data, flags = _receive(self._sock, fds)
            if not data:
                self.close()
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ControlError("a message is too long or carries too many descriptors")
            request_id, msg = decode(data)
            if msg is not None:
                self._handler.on_message(self, request_id, msg, fds)
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno == errno.ECONNRESET:  # it left something of ours unread; what it sent is behind this
                return True
            self.close(f"failed: {e.strerror}")
            return False
        except ControlError as e:
            self.close(str(e))
            return False
        except Exception:
            log.exception("a message of pid %d", self.pid)
            self.close("led to an internal error")
            return False
        finally:
            for fd in fds:
                os.close(fd)
        return True


def is_dead(pidfd: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _receive(sock: socket.socket, fds: list[int]) -> tuple[bytes, int]:
    """One message and its flags; descriptors are appended to `fds`. (socket.recv_fds ignores flags.)"""
    data, controls, flags, _ = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, value in controls:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array("i", value[: len(value) & ~3])
    return data, flags


class Listener:
    """A listening SEQPACKET socket and all connections made through it."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self.links: set[Link] = set()
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._sock = bind_unix(path, socket.SOCK_SEQPACKET, 0o666)
        self._paused: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors: others need theirs; look again a little later
                self._loop.remove_reader(self._sock.fileno())
                self._paused = self._loop.call_later(0.1, self._unpause)
                return
            if len(self.links) >= MAX_LINKS:
                sock.close()
                continue
            try:
                sock.setblocking(False)
                self.links.add(Link(sock, self._handler, self.links.discard))
            except OSError:
                sock.close()

    def _unpause(self) -> None:
        self._paused = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Remove the socket, its file and the connections that have not introduced themselves."""
        if self._sock.fileno() < 0:
            return
        if self._paused is not None:
            self._paused.cancel()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for link in [link for link in self.links if link.owner is None]:
            link.close("the container is being stopped")

    def close_links(self, reason: str) -> None:
        """End all connections."""
        for link in list(self.links):
            link.close(reason)
