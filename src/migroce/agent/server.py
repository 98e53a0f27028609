# SPDX-License-Identifier: BSD-3-Clause
"""The agent of one node: its containers, its default listening socket, its life."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

from migroce import __version__
from migroce.agent import netns
from migroce.agent.admin import AdminServer
from migroce.agent.container import Container, State
from migroce.agent.errors import AgentError
from migroce.agent.link import Link, Listener
from migroce.agent.owners import Owners
from migroce.agent.ports import Ports
from migroce.agent.statefile import StateFile
from migroce.control import NO_GID, ControlError, Hello, Message

log = logging.getLogger("migroce.agent")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Agent:
    """See the module. `idle_exit`: seconds without anything to do after which it ends; 0: never."""

    def __init__(self, run_dir: Path, *, node: str = "", idle_exit: float = 0.0) -> None:
        self.run_dir = run_dir
        self.node = node or socket.gethostname()
        self.ports = Ports()
        self.containers: dict[str, Container] = {}
        self.owners = Owners(self.save, self.idle_changed)
        self.done = asyncio.Event()
        self._admin = AdminServer(self)
        self._homes: dict[Link, Container] = {}
        self._listener: Listener | None = None
        self._lock_fd = -1
        self._state = StateFile(run_dir / "state.json")
        self._idle_exit = idle_exit
        self._idle_timer: asyncio.TimerHandle | None = None
        self._started = 0.0

    # ---- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the run directory, take up what a killed agent left, listen. AgentError."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._lock_fd = os.open(self.run_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentError(f"another agent has {self.run_dir}", "EADDRINUSE") from None
        except OSError as e:
            raise AgentError(f"cannot use {self.run_dir}: {e.strerror}", "EACCES") from None
        self._started = asyncio.get_running_loop().time()
        self._restore(self._state.load())
        try:
            self._listener = Listener(self.run_dir / "agent.sock", self)
            await self._admin.start(self.run_dir / "admin.sock")
        except OSError as e:
            raise AgentError(f"cannot listen in {self.run_dir}: {e.strerror}") from None
        self.save()
        self.idle_changed()

    async def run(self) -> None:
        """Serve until `shutdown`, SIGTERM or SIGINT; then leave nothing behind but what others need."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.done.set)
        try:
            await self.done.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """End. Processes go on without an agent; the state file stays as long as there are any."""
        await self._admin.close()
        await self.owners.close()
        self.save()
        keep = bool(self.containers) or bool(len(self.owners))
        if self._listener is not None:
            links = list(self._listener.links)
            self._listener.close()
            for link in links:
                link.owner = None
                link.close("the agent ends")
        for container in self.containers.values():
            container.close("the agent ends")
        self.ports.close()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if not keep:
            self._state.remove()
            for path in (self.run_dir / "stopped", self.run_dir / "c"):
                with contextlib.suppress(OSError):
                    path.rmdir()
            with contextlib.suppress(OSError):
                (self.run_dir / "agent.lock").unlink()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def idle_changed(self) -> None:
        """Something came or went: see whether the agent has nothing left to do."""
        if not self._idle_exit or self.done.is_set():
            return
        busy = bool(self.containers) or bool(len(self.owners)) or self._admin.busy
        if busy and self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        elif not busy and self._idle_timer is None:
            self._idle_timer = asyncio.get_running_loop().call_later(self._idle_exit, self.done.set)

    def save(self) -> None:
        """Write the state file."""
        self._drop_empty()
        self._state.save(
            {
                "containers": [c.to_state() for c in self.containers.values()],
                "ports": self.ports.to_state(),
                "migrations": self.owners.to_json(),
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.ports.from_state(state.get("ports", {}))
            for item in state.get("containers", []):
                container = self._make(item["id"], item["netns"], NO_GID, implicit=item["implicit"])
                self.containers[container.id] = container
                container.from_state(item)
            self.owners.from_state(state.get("migrations", []))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            log.error("the state file is damaged (%r): the rest of it is ignored", e)
        self._drop_empty()

    def _drop_empty(self) -> None:
        for container in [c for c in self.containers.values() if c.implicit and not c.contexts]:
            del self.containers[container.id]

    # ---- containers -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything at a glance."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "node": self.node,
            "run_dir": str(self.run_dir),
            "uptime_s": round(asyncio.get_running_loop().time() - self._started, 3),
            "containers": [c.to_json() for c in self.containers.values()],
            "migrations": self.owners.to_json(),
        }

    def container(self, ident: str) -> Container:
        """A container by id. AgentError ENOENT."""
        try:
            return self.containers[ident]
        except KeyError:
            raise AgentError(f"no container {ident!r} is known to this agent", "ENOENT") from None

    def add(self, ident: str, path: str | None, gid: bytes, *, listen: bool) -> Container:
        """A container, made if it is new. AgentError."""
        old = self.containers.get(ident)
        if old is not None:
            if old.implicit:
                raise AgentError(f"{ident} is a name of the agent's own", "EINVAL")
            if listen and old.state is State.RUNNING:
                old.netns, old.gid = path, gid
                old.listen()
                self.save()
            return old
        if not _ID.fullmatch(ident):
            raise AgentError(f"{ident!r} is no container id: letters, digits, _ . - (at most 128)", "EINVAL")
        container = self._make(ident, path, gid, implicit=False)
        if listen:
            container.listen()
        self.containers[ident] = container
        self.save()
        self.idle_changed()
        return container

    def remove(self, ident: str) -> bool:
        """Forget a container; False when it was not known."""
        container = self.containers.pop(ident, None)
        if container is None:
            return False
        container.remove()
        self.save()
        self.idle_changed()
        return True

    def _make(self, ident: str, path: str | None, gid: bytes, *, implicit: bool) -> Container:
        return Container(self, ident, self.run_dir / "c" / ident, path=path, gid=gid, implicit=implicit)

    # ---- the default socket: processes outside containers, by their network namespace ---------------

    def on_message(self, link: Link, request_id: int, msg: Message, fds: list[int]) -> None:
        """A message through the run directory's own agent.sock."""
        home = self._homes.get(link)
        if home is None:
            if not isinstance(msg, Hello):
                raise ControlError("the first message is no HELLO")
            try:
                home = self._home_of(link)
            except AgentError as e:
                raise ControlError(str(e)) from None
            self._homes[link] = home
        home.on_message(link, request_id, msg, fds)

    def on_closed(self, link: Link, reason: str) -> None:
        """A connection through it is gone."""
        home = self._homes.pop(link, None)
        if home is not None:
            home.on_closed(link, reason)
        self.save()
        self.idle_changed()

    def _home_of(self, link: Link) -> Container:
        fd = netns.open_pid(link.pid)
        key = netns.key_of(fd)
        os.close(fd)
        ident = "host" if key == netns.own_key() else f"netns-{key[1]}"
        home = self.containers.get(ident)
        if home is not None and not home.implicit:  # somebody has a container of that name
            ident = f"host-{hashlib.sha256(ident.encode()).hexdigest()[:8]}"
            home = self.containers.get(ident)
        if home is None:
            home = self.containers[ident] = self._make(ident, None, NO_GID, implicit=True)
        return home
