# SPDX-License-Identifier: BSD-3-Clause
"""A container: its state, its processes' contexts and their connections (`Handler`), its stand-in.

running -> stopping -> stopped -> resuming -> running; at a destination prepared -> resuming -> running.
These transitions are in transitions.py, letting a process in is in admit.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from migroce.agent.admit import Admission
from migroce.agent.context import MAX_DUMP, MAX_SNAPSHOT, Context, Phase, read_memfd
from migroce.agent.errors import AgentError
from migroce.agent.link import Link, Listener
from migroce.agent.ports import Ports
from migroce.agent.sockets import Port
from migroce.agent.standin import StandIn
from migroce.agent.standin_io import StandInIO
from migroce.control import (
    NO_GID,
    Addresses,
    ControlError,
    DumpReply,
    DumpReq,
    Hello,
    Listens,
    Message,
    Resumed,
    Sockets,
    Stopped,
    Welcome,
)
from migroce.dump import Dump, DumpError, gid_bytes, gid_text, read

log = logging.getLogger("migroce.agent")

HOLD_SECONDS = 2.0
"""How long a slot is kept for a living process that has lost its connection (it comes back each second)."""
ADOPT_SECONDS = 10.0
"""The same after the agent was restarted."""


class State(enum.Enum):
    """What a container is doing."""

    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PREPARED = "prepared"
    RESUMING = "resuming"


class Node(Protocol):
    """What a container needs of the agent."""

    ports: Ports
    run_dir: Path

    def save(self) -> None:
        """Write the state file."""

    def idle_changed(self) -> None:
        """A process has come or gone."""


class Container:
    """See the module. `directory` is what the container sees at /run/migroce."""

    def __init__(
        self,
        node: Node,
        ident: str,
        directory: Path,
        *,
        path: str | None = None,
        gid: bytes = NO_GID,
        implicit: bool = False,
    ) -> None:
        self.node = node
        self.id = ident
        self.directory = directory
        self.netns = path
        self.gid = gid
        self.implicit = implicit
        self.state = State.RUNNING
        self.contexts: dict[int, Context] = {}
        self.port: Port | None = None
        self.standin: StandInIO | None = None
        self.moved_to = NO_GID
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()
        self.listener: Listener | None = None
        self.prepared: list[Context] = []
        self.admission = Admission(self)
        self._request_id = 0

    # ---- connections --------------------------------------------------------------------------

    def listen(self) -> None:
        """Make the agent.sock. AgentError when that fails."""
        if self.implicit or self.listener is not None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            self.listener = Listener(self.directory / "agent.sock", self)
        except OSError as e:
            raise AgentError(f"cannot listen in {self.directory}: {e.strerror}") from None

    def unlisten(self) -> None:
        """Remove the agent.sock; connections of contexts stay."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def on_message(self, link: Link, request_id: int, msg: Message, fds: list[int]) -> None:
        """A message of one of our processes."""
        ctx = link.owner
        if isinstance(msg, Hello):
            if ctx is not None:
                raise ControlError("a second HELLO on one connection")
            self._on_hello(link, request_id, msg, fds)
        elif not isinstance(ctx, Context):
            raise ControlError("the first message is no HELLO")
        elif isinstance(msg, Stopped):
            self._on_stopped(ctx, msg, fds)
        elif isinstance(msg, Resumed):
            self._on_resumed(ctx, msg)
        elif isinstance(msg, DumpReply):
            self._on_dump(ctx, request_id, msg, fds)
        elif isinstance(msg, Listens):
            if self.port is not None:
                self.port.listens(ctx.slot, msg.services)
        elif isinstance(msg, Addresses):
            self._on_addresses(link, ctx, request_id, msg)
        else:
            raise ControlError(f"a process may not send {type(msg).__name__}")

    def _on_hello(self, link: Link, request_id: int, hello: Hello, fds: list[int]) -> None:
        try:
            ctx, socks = self.admission.admit(link, hello, fds)
        except AgentError as e:
            log.warning("%s: %s (pid %d) is not admitted: %s", self.id, hello.comm, link.pid, e)
            link.send(Welcome(e.code), request_id=request_id)
            link.close()
            return
        link.introduced(ctx)
        self.node.save()
        self.node.idle_changed()
        link.send(
            Welcome(0, ctx.slot, ctx.qpn_base, ctx.qpn_count, len(socks), 0, self.gid),
            [s.fileno() for s in socks],
            request_id,
        )
        self.changed.set()

    def _on_stopped(self, ctx: Context, msg: Stopped, fds: list[int]) -> None:
        if ctx.phase is not Phase.STOPPING:  # never asked for, or too late: it comes back by itself
            return
        try:
            if msg.status:
                ctx.phase = Phase.RUNNING
                raise AgentError(f"{ctx.name} could not stop: {os.strerror(msg.status & 0xFFFF)}")
            ctx.phase = Phase.STOPPED
            ctx.n_qp = msg.n_qp
            if len(fds) != 1 or not msg.dump_len:
                raise AgentError(f"{ctx.name} sent {len(fds)} descriptors for its dump", "EBADMSG")
            if ctx.stopping is not None:
                ctx.dump = read_memfd(fds[0], msg.dump_len, MAX_DUMP)
        except AgentError as e:
            waiter, ctx.stopping = ctx.stopping, None
            if waiter is not None and not waiter.done():
                waiter.set_exception(e)

    def _on_resumed(self, ctx: Context, msg: Resumed) -> None:
        if ctx.phase is not Phase.RESUMING:
            return
        if msg.status:
            ctx.phase = Phase.STOPPED  # it tries again by itself, every few ms: the address may be coming up
            ctx.error = os.strerror(msg.status & 0xFFFF)
        else:
            ctx.phase, ctx.error = Phase.RUNNING, ""
            ctx.n_qp = msg.n_qp
        if self.state is State.RESUMING and not self.lock.locked() and not self.missing():
            self.state = State.RUNNING  # a latecomer, after a resume that timed out
        self.node.save()
        self.changed.set()

    def _on_addresses(self, link: Link, ctx: Context, request_id: int, msg: Addresses) -> None:
        if self.port is None or ctx.phase is not Phase.RUNNING:
            return
        try:
            socks = self.node.ports.follow(self.port, ctx.slot, msg.gids)
        except AgentError as e:
            log.warning("%s: %s: %s", self.id, ctx.name, e)
            link.send(Sockets(e.code), request_id=request_id)
            return
        self.node.save()
        link.send(Sockets(0, len(socks)), [s.fileno() for s in socks], request_id)

    def _on_dump(self, ctx: Context, request_id: int, msg: DumpReply, fds: list[int]) -> None:
        waiter = ctx.dumping.pop(request_id, None)
        if waiter is None or waiter.done():
            return
        try:
            if msg.status or len(fds) != 1:
                raise AgentError(f"{ctx.name} gave no snapshot: {os.strerror(msg.status & 0xFFFF)}")
            waiter.set_result(read_memfd(fds[0], msg.dump_len, MAX_SNAPSHOT))
        except AgentError as e:
            waiter.set_exception(e)

    def on_closed(self, link: Link, reason: str) -> None:
        """A connection is gone."""
        ctx = link.owner
        if reason:
            log.warning("%s: connection of pid %d ended: %s", self.id, link.pid, reason)
        if not isinstance(ctx, Context) or ctx.link is not link:
            return
        ctx.link = None
        for dumping in ctx.dumping.values():
            if not dumping.done():
                dumping.set_exception(AgentError(f"{ctx.name} has gone", "ESRCH"))
        ctx.dumping.clear()
        waiter, ctx.stopping = ctx.stopping, None
        data, ctx.dump = ctx.dump, b""
        if waiter is not None and not waiter.done():
            if data:
                waiter.set_result(data)
            elif reason and not link.process_gone():
                waiter.set_exception(AgentError(f"{ctx.name} could not be stopped: its connection {reason}"))
            else:
                waiter.set_result(None)
        if ctx.phase is Phase.RESUMING:
            ctx.phase = Phase.STOPPED
        if ctx.phase is not Phase.STOPPED:
            ctx.phase = Phase.RUNNING
            if link.process_gone():
                self.release(ctx)
            else:
                self.hold(ctx, HOLD_SECONDS, link.pidfd)
        self.changed.set()

    # ---- contexts -----------------------------------------------------------------------------

    def hold(self, ctx: Context, seconds: float, pidfd: int | None) -> None:
        """Keep the slot of a process without connection for a while, or until it ends."""
        self.unhold(ctx)
        loop = asyncio.get_running_loop()
        ctx.hold = loop.call_later(seconds, self.release, ctx)
        if pidfd is not None:
            ctx.pidfd = os.dup(pidfd)
            loop.add_reader(ctx.pidfd, self.release, ctx)

    def unhold(self, ctx: Context) -> None:
        """It is back, or gone for good."""
        if ctx.hold is not None:
            ctx.hold.cancel()
            ctx.hold = None
        if ctx.pidfd is not None:
            asyncio.get_running_loop().remove_reader(ctx.pidfd)
            os.close(ctx.pidfd)
            ctx.pidfd = None

    def release(self, ctx: Context) -> None:
        """Forget a context and free its slot."""
        self.unhold(ctx)
        if self.contexts.get(ctx.slot) is ctx:
            del self.contexts[ctx.slot]
        if self.port is not None and self.port.slots.owner(ctx.slot) is ctx:
            self.node.ports.release(self.port, ctx.slot)
        if not self.contexts:
            self.port = None
        self.node.save()
        self.node.idle_changed()
        self.changed.set()

    def next_request(self) -> int:
        """An id for a request to a process."""
        self._request_id = (self._request_id + 1) & 0xFFFFFFFF
        return self._request_id

    def missing(self) -> list[Context]:
        """Contexts that have not come back yet."""
        return [ctx for ctx in self.contexts.values() if ctx.phase is not Phase.RUNNING or ctx.link is None]

    # ---- standing in --------------------------------------------------------------------------

    def kept_dir(self) -> Path:
        """Where the agent keeps copies of the dumps, for itself after a crash."""
        return self.node.run_dir / "stopped" / self.id

    def stand_in(self, dumps: list[Dump]) -> None:
        """Answer for stopped contexts from their dumps."""
        if self.port is None or not dumps:
            return
        contexts = [c for c in self.contexts.values() if c.phase is Phase.STOPPED]
        socks = [s for ctx in contexts for s in self.port.sockets(ctx.slot)]
        slots = [slot for ctx in contexts for slot in ctx.slots]
        self.standin = StandInIO(StandIn(dumps), self.port.netns_fd, slots, socks)
        if any(self.moved_to):
            self.standin.standin.moved(self.moved_to)

    def stand_in_again(self) -> None:
        """As `stand_in`, from the copies kept. AgentError when they cannot be read."""
        try:
            self.stand_in([read(path) for path in sorted(self.kept_dir().glob("*.dump"))])
        except DumpError as e:
            raise AgentError(str(e), "EBADMSG") from None

    def moved(self, gid: bytes) -> None:
        """The container runs elsewhere under another address: point its peers there. AgentError."""
        if self.state is not State.STOPPED:
            raise AgentError(f"container {self.id} is {self.state.value}, not stopped", "EINVAL")
        self.moved_to = gid
        if self.standin is not None:
            self.standin.standin.moved(gid)
        self.node.save()

    def end_standin(self) -> None:
        """No more answers, no more copies of dumps."""
        if self.standin is not None:
            self.standin.close()
            self.standin = None
        with contextlib.suppress(OSError):
            for path in self.kept_dir().iterdir():
                path.unlink()
            self.kept_dir().rmdir()

    # ---- ending -------------------------------------------------------------------------------

    def remove(self) -> None:
        """Forget everything about it; its directory goes too."""
        self.close("the container was removed")
        self.end_standin()
        self.prepared = []
        for ctx in list(self.contexts.values()):
            self.release(ctx)
        if not self.implicit:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def close(self, reason: str) -> None:
        """End all sockets and connections, keeping what the state file tells."""
        links = list(self.listener.links) if self.listener is not None else []
        self.unlisten()
        links += [ctx.link for ctx in self.contexts.values() if ctx.link is not None]
        for link in links:
            link.owner = None
            link.close(reason)
        for ctx in self.contexts.values():
            ctx.link = None
            self.unhold(ctx)
        if self.standin is not None:
            self.standin.close()
            self.standin = None

    # ---- looking ------------------------------------------------------------------------------

    async def snapshot(self, ctx: Context, seconds: float) -> Dump:
        """A live dump of a running context. AgentError."""
        if ctx.link is None:
            raise AgentError(f"{ctx.name} has no connection to the agent", "ENOTCONN")
        request_id = self.next_request()
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        ctx.dumping[request_id] = waiter
        ctx.link.send(DumpReq(), request_id=request_id)
        try:
            return ctx.check_dump(await asyncio.wait_for(waiter, seconds))
        except TimeoutError:
            raise AgentError(f"{ctx.name} gave no snapshot within {seconds:g} s", "ETIMEDOUT") from None
        finally:
            ctx.dumping.pop(request_id, None)

    def to_json(self) -> dict[str, Any]:
        """For `status`."""
        out: dict[str, Any] = {
            "id": self.id,
            "state": self.state.value,
            "implicit": self.implicit,
            "netns": self.netns,
            "gid": gid_text(self.gid) or None,
            "dir": None if self.implicit else str(self.directory),
            "moved_to": gid_text(self.moved_to) or None,
            "contexts": [c.to_json() for _, c in sorted(self.contexts.items())],
        }
        if self.standin is not None:
            out["standin"] = {
                "qps": len(self.standin.standin),
                "sent": self.standin.sent,
                "send_errors": self.standin.send_errors,
                "packets": dict(self.standin.standin.counts),
                "sees_locked_network": self.standin.sees_locked_network,
            }
        return out

    def to_state(self) -> dict[str, Any]:
        """For the state file."""
        return {
            "id": self.id,
            "state": self.state.value,
            "implicit": self.implicit,
            "netns": self.netns,
            "gid": gid_text(self.gid),
            "moved_to": gid_text(self.moved_to),
            "contexts": [c.to_state() for c in self.contexts.values()],
            "prepared": [c.to_state() for c in self.prepared],
        }

    def from_state(self, state: dict[str, Any]) -> None:
        """Take up where a killed agent was. KeyError, TypeError, ValueError: bad state file."""
        self.gid, self.moved_to = gid_bytes(state["gid"]), gid_bytes(state["moved_to"])
        self.prepared = [Context.from_state(c) for c in state["prepared"]]
        contexts = [Context.from_state(c) for c in state["contexts"]]
        old = State(state["state"])
        self.state = State.RUNNING if old is State.STOPPING else old
        try:
            self.admission.readopt(contexts, ADOPT_SECONDS)
            if self.state is State.STOPPED:
                self.stand_in_again()
            elif self.state is not State.PREPARED:
                self.listen()
        except AgentError as e:
            log.error("%s: could not be taken up again completely: %s", self.id, e)
