# SPDX-License-Identifier: BSD-3-Clause
"""Unmodified programs of perftest and libibverbs-utils in two containers, sized to the speed of the day."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time

import pytest
from tests.e2e.stage import Box, Stage, wait_for
from tests.native.procfs import listens, waits_for_events

PORTS = (18515, 18517)
"""TCP ports of perftest and of the pingpongs."""
TARGET = 4.0
"""Seconds that a run which is to be moved should take."""
PROGRAMS: dict[str, tuple[str, ...]] = {
    "ib_send_bw": ("-b",),
    "ib_write_bw": (),
    "ib_read_bw": (),
    "ib_atomic_bw": (),
    "ib_send_lat": (),
    "ib_write_lat": (),
    "ib_read_lat": (),
    "ib_atomic_lat": (),
    "ibv_rc_pingpong": (),
    "ib_send_bw, shared queue": ("--use-srq", "-q", "4", "-b"),
    "ib_send_bw, events": ("-b", "-e"),
    "ib_send_bw, XRC": ("-c", "XRC", "-q", "4", "-b"),
    "ib_send_bw, rdma_cm": ("-R", "-b"),
    "ib_write_bw, XRC": ("-c", "XRC"),
    "ib_read_bw, XRC": ("-c", "XRC"),
    "ib_write_bw, UC": ("-c", "UC"),
    "ib_write_bw, UC for a while": ("-c", "UC", "-D", "12"),
    "ibv_srq_pingpong": (),
    "ibv_xsrq_pingpong": (),
}
"""Options by a program's name, perhaps with a word on what is particular about them."""


@dataclasses.dataclass(slots=True)
class Run:
    """One run of a program: a server and a client."""

    program: str
    iterations: int
    server: Box
    client: Box
    started: float

    def finish(self, seconds: float = 240) -> float:
        """See both end well; seconds since the client's start."""
        statuses = (self.client.wait(seconds), self.server.wait(30))
        took = time.monotonic() - self.started
        assert statuses == (0, 0), f"{self.client.log()}\n{self.server.log()}"
        return took

    def shapes(self) -> tuple[list[str], list[str]]:
        """Both outputs with all numbers and rules made the same: what moved and unmoved runs share."""
        return shape(self.server.log()), shape(self.client.log())


def shape(output: str) -> list[str]:
    """The lines of a program's output with numbers (also hexadecimal, GIDs) replaced."""
    lines = []
    for line in output.strip().splitlines():
        plain = re.sub(r"(0x[0-9a-f]+|\b[0-9a-f]{6}\b|::[0-9a-f:.]+|\b\d+(:\d+)+|\d+(\.\d+)?)", "#", line)
        lines.append(" ".join(plain.split()))
    return lines


def start(stage: Stage, program: str, iterations: int, server_on: str = "a", client_on: str = "b") -> Run:
    """Start a program; returns when its client's QPs carry traffic, or it has ended.

    `iterations` 0: for as long as its options say.
    """
    name = program.split(",")[0]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    common = ["-d", "rxe0", *PROGRAMS[program]]
    if iterations:
        common += ["-n", str(iterations)]
    if name.endswith("_pingpong"):
        common += ["-g", "1"]
    elif name.endswith("_lat"):
        common += ["-s", "64"]
    server = stage.box("server", server_on, [name, *common])
    wait_for(f"{program} to listen", lambda: _listens(server))
    started = time.monotonic()
    client = stage.box("client", client_on, [name, *common, server.ip])
    run = Run(program, iterations, server, client, started)
    wait_for("traffic", lambda: client.info()["status"] == "exited" or client.packets() > 20)
    return run


def _listens(box: Box) -> bool:
    """Whether the program listens: at perftest's or pingpong's TCP port, or waits for rdma_cm's events."""
    pid = box.info()["pid"]
    assert pid is not None, box.log()
    return waits_for_events(pid) or listens(*PORTS, of=pid)


class Sizes:
    """How many iterations of a program fill TARGET seconds here, learned from runs that do not move."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, tuple[list[str], list[str]]]] = {}

    def of(self, stage: Stage, program: str) -> tuple[int, tuple[list[str], list[str]]]:
        """(iterations, shapes of an unmigrated run's outputs)."""
        if program not in self._known:
            iterations = 1000
            while True:
                run = start(stage, program, iterations)
                took = max(0.02, run.finish() - 0.5)
                if took > TARGET / 8 or iterations > 500_000:
                    break
                iterations *= 8
            self._known[program] = (max(1000, int(iterations * TARGET / took)), run.shapes())
        return self._known[program]

    def grow(self, program: str) -> None:
        """A run was over before it could be moved: the machine has become faster."""
        iterations, shapes = self._known[program]
        self._known[program] = (iterations * 4, shapes)
