# SPDX-License-Identifier: BSD-3-Clause
"""Letting a process in: which slot and sockets it gets, or takes up again."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from migroce.agent import netns, slots
from migroce.agent.context import Context, Phase
from migroce.agent.errors import AgentError
from migroce.agent.link import Link
from migroce.agent.sockets import Port, check_adopted, inode_of
from migroce.control import HELLO_FURTHER, NO_SLOT, Hello, HelloState

if TYPE_CHECKING:
    from migroce.agent.container import Container


class Admission:
    """What a HELLO leads to in one container. All methods raise AgentError and then leave no trace."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._reserved: list[int] = []
        """The slot that the HELLO being looked at has newly taken."""

    def admit(self, link: Link, hello: Hello, fds: list[int]) -> tuple[Context, list[socket.socket]]:
        """The process's context and the sockets to send it (none when it brings its own)."""
        c = self._container
        if c.state.value not in ("running", "resuming"):
            raise AgentError(f"container {c.id} is {c.state.value}", "EAGAIN")
        port = self._port_of(link)
        self._reserved.clear()
        try:
            if hello.state == HelloState.RUNNING:
                ctx, socks = self._running(port, hello, fds)
            else:
                stopped = hello.state == HelloState.STOPPED
                ctx = self._claimed(port, hello) if stopped else self._fresh(port, hello)
                fixed = any(c.gid)
                socks = port.open(ctx.slot, c.gid if fixed else hello.gid, fixed=fixed)
                if hello.flags & HELLO_FURTHER:
                    socks = socks + c.node.ports.follow(port, ctx.slot, ())
                ctx.phase = Phase.RESUMING if stopped else Phase.RUNNING
        except AgentError:
            for slot in self._reserved:
                c.node.ports.release(port, slot)
            c.node.ports.trim(port)
            raise
        c.port = port
        c.contexts[ctx.slot] = ctx
        c.unhold(ctx)
        ctx.instance, ctx.comm, ctx.gid = hello.instance, hello.comm, hello.gid
        ctx.came = True
        ctx.pid, ctx.start, ctx.link = link.pid, netns.start_time(link.pid), link
        return ctx, socks

    def _port_of(self, link: Link) -> Port:
        c = self._container
        fd = netns.open_path(c.netns) if c.netns is not None else netns.open_pid(link.pid)
        port = c.node.ports.get(fd)
        if c.port is not port:
            self._move_port(port)
        return port

    def _move_port(self, port: Port) -> None:
        """The container was restored into another namespace: nobody may be left in the old one."""
        c = self._container
        here = any(ctx.link is not None or ctx.phase is not Phase.STOPPED for ctx in c.contexts.values())
        if c.port is not None and here:
            c.node.ports.trim(port)
            raise AgentError(f"the process is in another network namespace than container {c.id}", "EXDEV")
        old, c.port = c.port, port
        for ctx in c.contexts.values():
            if old is not None:
                c.node.ports.release(old, ctx.slot)
            port.slots.reserve(ctx.slot, ctx, whole=ctx.whole)

    def _by_instance(self, instance: bytes) -> Context | None:
        contexts = self._container.contexts
        for ctx in contexts.values():
            if ctx.instance == instance:
                if ctx.link is None:
                    return ctx
                if not ctx.link.process_gone():
                    raise AgentError(f"{ctx.name} is connected already", "EBUSY")
                ctx.link.close()
                return ctx if contexts.get(ctx.slot) is ctx else None
        return None

    def _fresh(self, port: Port, hello: Hello) -> Context:
        old = self._by_instance(hello.instance)
        if old is not None:
            return old  # closed its device and opens it again
        ctx = Context(0, 0)
        ctx.slot = port.slots.allocate(ctx)
        self._reserved.append(ctx.slot)
        ctx.qpn_base = slots.qpn_base(ctx.slot)
        return ctx

    def _known(self, hello: Hello) -> Context | None:
        """The context that a process which was here before means."""
        ctx = self._by_instance(hello.instance) or self._container.contexts.get(hello.slot)
        if ctx is None:
            return None
        if ctx.instance not in (b"", hello.instance) or ctx.link is not None:
            raise AgentError(f"slot {hello.slot} belongs to {ctx.name}", "EBUSY")
        if (ctx.qpn_base, ctx.qpn_count) != (hello.qpn_base, hello.qpn_count):
            raise AgentError(
                f"the process claims QPNs {hello.qpn_base:#x}+{hello.qpn_count:#x}, "
                f"it has {ctx.qpn_base:#x}+{ctx.qpn_count:#x}",
                "EINVAL",
            )
        return ctx

    def _claimed(self, port: Port, hello: Hello) -> Context:
        """As `_known`, or a new context with the ids the process says it has."""
        ctx = self._known(hello)
        if ctx is None:
            slot = 0 if hello.slot == NO_SLOT else hello.slot
            ctx = Context(slot, hello.qpn_base, hello.qpn_count)
            self.check_range(ctx)
        if port.slots.owner(ctx.slot) is not ctx:
            port.slots.reserve(ctx.slot, ctx, whole=ctx.whole)
            if self._container.contexts.get(ctx.slot) is not ctx:
                self._reserved.append(ctx.slot)
        return ctx

    def _running(self, port: Port, hello: Hello, fds: list[int]) -> tuple[Context, list[socket.socket]]:
        socks = check_adopted(fds) if fds else []
        try:
            ctx = self._claimed(port, hello)
            have = {inode_of(s) for s in port.sockets(ctx.slot)}
            if have and not {inode_of(s) for s in socks} <= have:
                raise AgentError(f"{ctx.name} brings other sockets than it was given", "EBUSY")
            if not have:
                if not socks:
                    raise AgentError("a running process must bring its sockets", "EINVAL")
                port.adopt(ctx.slot, socks)
                socks = []
        finally:
            for sock in socks:
                sock.close()
        ctx.phase = Phase.RUNNING
        return ctx, []

    @staticmethod
    def check_range(ctx: Context) -> None:
        """AgentError EINVAL when the QPNs are not a slot's."""
        if not slots.check_range(ctx.slot, ctx.qpn_base, ctx.qpn_count):
            raise AgentError(
                f"QPNs {ctx.qpn_base:#x}+{ctx.qpn_count:#x} are not those of slot {ctx.slot}", "EINVAL"
            )

    # ---- after the agent was restarted --------------------------------------------------------

    def readopt(self, contexts: list[Context], seconds: float) -> None:
        """Expect the contexts of the state file; those whose process is gone are dropped."""
        c = self._container
        stopped = c.state.value == "stopped"
        for ctx in contexts:
            if ctx.phase is Phase.RUNNING and not ctx.is_alive():
                continue
            c.contexts[ctx.slot] = ctx
        for ctx in c.contexts.values():
            if c.port is None:
                c.port = self._port_after_restart(ctx)
            if c.port is not None:
                c.port.slots.reserve(ctx.slot, ctx, whole=ctx.whole)
                if stopped:
                    c.port.open(ctx.slot, c.gid if any(c.gid) else ctx.gid, fixed=any(c.gid))
            if ctx.phase is Phase.RUNNING:
                pidfd = netns.open_pidfd(ctx.pid)
                c.hold(ctx, seconds, pidfd)
                if pidfd is not None:
                    os.close(pidfd)

    def _port_after_restart(self, ctx: Context) -> Port | None:
        c = self._container
        if c.netns is not None:
            return c.node.ports.get(netns.open_path(c.netns))
        if ctx.is_alive():
            return c.node.ports.get(netns.open_pid(ctx.pid))
        return None  # its namespace ended with it
