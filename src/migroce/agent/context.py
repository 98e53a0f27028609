# SPDX-License-Identifier: BSD-3-Clause
"""One process's device context as the agent knows it, and reading the dump it hands over."""

from __future__ import annotations

import asyncio
import enum
import fcntl
import os
import stat
from dataclasses import dataclass, field
from typing import Any

from migroce import dump as dump_format
from migroce.agent import netns
from migroce.agent.errors import AgentError, errno_name
from migroce.agent.link import Link
from migroce.control import N_SLOTS, NO_GID, SLOT_QPNS

MAX_DUMP = 32 << 20
"""Longest dump taken from a process that stops, bytes: some hundred thousand records."""
MAX_SNAPSHOT = 8 << 20
"""The same for a live snapshot: `ps` asks all processes at once, and some may be hostile."""

_F_GET_SEALS = 1034


class Phase(enum.Enum):
    """What a context is doing."""

    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    RESUMING = "resuming"


@dataclass(slots=True, eq=False)
class Context:
    """A process's context. Without `link` while RUNNING, it has lost its connection (or is ending)."""

    slot: int
    qpn_base: int
    qpn_count: int = SLOT_QPNS
    instance: bytes = b""
    """The library's random id; empty at a destination until the process has come."""
    pid: int = 0
    start: int = 0
    comm: str = ""
    gid: bytes = NO_GID
    phase: Phase = Phase.RUNNING
    link: Link | None = None
    came: bool = False
    """Whether its process has connected since the container began to resume."""
    n_qp: int = 0
    stopping: asyncio.Future[bytes | None] | None = None
    """Gets the dump, or None when the process has ended or closed its device."""
    dump: bytes = b""
    """Taken with STOPPED; passed on when the connection has ended: then nothing is open there any more."""
    error: str = ""
    """Why its last attempt to resume failed."""
    dumping: dict[int, asyncio.Future[bytes]] = field(default_factory=dict)
    hold: asyncio.TimerHandle | None = None
    pidfd: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it has all QPNs: it once ran without an agent."""
        return self.qpn_count > SLOT_QPNS

    @property
    def slots(self) -> range:
        """The slots its packets may be for."""
        return range(N_SLOTS) if self.whole else range(self.slot, self.slot + 1)

    @property
    def name(self) -> str:
        """For messages to users."""
        if not self.pid:
            return f"slot {self.slot}"
        return f"{self.comm or 'process'} (pid {self.pid})"

    def is_alive(self) -> bool:
        """Whether the process last seen is still there."""
        return netns.is_alive(self.pid, self.start)

    def to_state(self) -> dict[str, Any]:
        """For the state file: of what is under way, where it would begin again."""
        phase = {Phase.STOPPING: Phase.RUNNING, Phase.RESUMING: Phase.STOPPED}.get(self.phase, self.phase)
        return {
            "slot": self.slot,
            "qpn_base": self.qpn_base,
            "qpn_count": self.qpn_count,
            "instance": self.instance.hex(),
            "pid": self.pid,
            "start": self.start,
            "comm": self.comm,
            "gid": self.gid.hex(),
            "phase": phase.value,
            "n_qp": self.n_qp,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Context:
        """The inverse; raises KeyError, TypeError or ValueError."""
        return cls(
            int(state["slot"]),
            int(state["qpn_base"]),
            int(state["qpn_count"]),
            instance=bytes.fromhex(state["instance"]),
            pid=int(state["pid"]),
            start=int(state["start"]),
            comm=str(state["comm"]),
            gid=bytes.fromhex(state["gid"]),
            phase=Phase(state["phase"]),
            n_qp=int(state["n_qp"]),
        )

    def to_json(self) -> dict[str, Any]:
        """For `status`."""
        return {
            "slot": self.slot,
            "qpn_base": self.qpn_base,
            "qpn_count": self.qpn_count,
            "pid": self.pid,
            "comm": self.comm,
            "state": self.phase.value,
            "connected": self.link is not None,
            "qps": self.n_qp,
        }

    def check_dump(self, data: bytes) -> dump_format.Dump:
        """The dump, if it is this context's. AgentError EBADMSG."""
        try:
            dump = dump_format.parse(data)
        except dump_format.DumpError as e:
            raise AgentError(f"{self.name}: {e}", "EBADMSG") from None
        ctx = dump.context
        if ctx.qpn_base != self.qpn_base or ctx.qpn_count != self.qpn_count:
            raise AgentError(
                f"{self.name}: its dump is for QPNs {ctx.qpn_base:#x}+{ctx.qpn_count:#x}, "
                f"it was given {self.qpn_base:#x}+{self.qpn_count:#x}",
                "EBADMSG",
            )
        return dump


def read_memfd(fd: int, length: int, limit: int) -> bytes:
    """The first `length` bytes of a memfd a process sent; nothing it does with it can block or hurt.

    AgentError EBADMSG when it is not a memfd or shorter than that.
    """
    try:
        fcntl.fcntl(fd, _F_GET_SEALS)  # only memory files have seals: no pipe, device or FUSE file
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise AgentError("the process sent no memory file", "EBADMSG")
        if length > limit or info.st_size < length:
            raise AgentError(
                f"the process sent {info.st_size} bytes for a dump of {length} (at most {limit})", "EBADMSG"
            )
        data = os.pread(fd, length, 0)
    except OSError as e:
        raise AgentError(
            f"the process's dump cannot be read: {e.strerror} ({errno_name(e.errno)})", "EBADMSG"
        ) from None
    if len(data) != length:
        raise AgentError("the process's dump became shorter while it was read", "EBADMSG")
    return data
