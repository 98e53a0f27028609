# SPDX-License-Identifier: BSD-3-Clause
"""A simulated process: an engine, the ends of the program in it, and whether it is frozen."""

from __future__ import annotations

from collections.abc import Callable

from migroce import dump as dumps

from .memory import Arena
from .program import End, InvariantError
from .schedule import Host
from .world import Cq, Engine


class Process:
    """An engine with its program's ends, and whether it is frozen."""

    def __init__(self, host: Host):
        self.host = host
        self.arena = Arena()
        self.ends: list[End] = []
        self.engine: Engine
        self.cqs: list[Cq] = []
        self.pd = -1
        self.frozen = False
        self.moving = False
        self.waiting: list[Callable[[], None]] = []
        self.clock = host.clock

    def qpn_range(self) -> tuple[int, int]:
        count = (1 << 24) // self.host.slots
        return self.host.slot * count, count

    def dump(self, *, stopped: bool) -> dumps.Dump:
        """The engine's dump, read and compared with what we know."""
        try:
            dump = dumps.parse(self.engine.dump())
        except dumps.DumpError as e:
            raise InvariantError("dump", f"{self.host.address}: {e}") from e
        if dump.stopped != stopped or len(dump.qps) != len(self.ends) or dump.context.gid != self.engine.gid:
            raise InvariantError("dump", f"{self.host.address}: {dump.context}, stopped {dump.stopped}")
        return dump
