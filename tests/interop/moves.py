# SPDX-License-Identifier: BSD-3-Clause
"""A program between a container of ours, which moves, and the emulated machine.

emulated machine            node-a                    node-b
  rxe0 10.0.1.254 --- tap --- br0 === VXLAN === br0
                            container -- moves --> container
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.stage import Box, Stage, built, wait_for
from tests.interop import net
from tests.interop.ends import NO_CLOCK, V4, V6, Kernels
from tests.interop.guest import Ended, Guest, Running
from tests.native.procfs import listens

from migroce.lab.api import Lab
from migroce.migration.api import checkpoint, restore

PORT = 18515
AWAY = 10.0
"""Seconds of a long stop: many times the peer's retry timeout (7 times 67 ms)."""
MGCHECK = "/usr/local/bin/mgcheck"
UDCHECK = "/usr/local/bin/udcheck"
UDCHECK_PORT = 7472
BOX_V6 = "fd01::7"
OWN_GID = {V4: "1", V6: "2"}
"""Index of the container's GID: after the link-local one, IPv4 first."""
FURTHER_GID = "2"
"""That of a further IPv4 address, where there is no IPv6."""
PATIENT = "17"
"""Our end's local ACK timeout, as an exponent: 0.5 s, not perftest's 67 ms, after which it gives up in 2.1 s.
The only QP of an emulated machine at a load above 20 was silent for longer. rdma_rxe never gives up."""
COUNTERS = {"rcvd_rnr_err": "RNR NAKs", "completer_retry_err": "went back"}
"""What rdma_rxe counts (rxe_hw_counters.c) -> as the summary calls it."""


class Both(Stage):
    """A stage with the emulated machine's programs, which end with the test, too."""

    def __init__(self, lab: Lab, kernels: Kernels) -> None:
        super().__init__(lab)
        self.kernels = kernels
        self.peers: list[Running] = []
        self.blackouts: list[float] = []
        """Milliseconds of each move of the test."""
        self._before = self._counted()

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
        self.peers.clear()
        super().close()

    def begin_again(self) -> None:
        """As if nothing had run."""
        self.close()
        self.blackouts.clear()
        self._before = self._counted()

    def start(self, argv: list[str]) -> Running:
        """Start a program in the emulated machine."""
        peer = self.kernels.start(argv)
        self.peers.append(peer)
        return peer

    def _counted(self) -> Counter[str]:
        paths = [f"/sys/class/infiniband/rxe0/ports/1/hw_counters/{name}" for name in COUNTERS]
        lines = self.kernels.guest.run(["cat", *paths]).output.split()
        return Counter(dict(zip(COUNTERS.values(), map(int, lines), strict=True)))

    def summary(self) -> str:
        """How long the container was away, and what its peer had to repeat for it."""
        after = self._counted()
        counted = ", ".join(f"{name} {after[name] - self._before[name]}" for name in after)
        away = ", ".join(f"{blackout:.0f}" for blackout in self.blackouts)
        return f"blackout {away} ms; rdma_rxe: {counted}"


class NoClockError(AssertionError):
    """Nothing failed but perftest's measuring of the clock, which its report needs (NO_CLOCK)."""


def until_the_clock_is_measured(test: Callable[..., None]) -> Callable[..., None]:
    """A test that is run again, up to four times, if it ends by NoClockError (as the matrix does)."""

    @functools.wraps(test)
    def tries(*, stage: Both, **arguments: Any) -> None:
        for _ in range(4):
            try:
                return test(stage=stage, **arguments)
            except NoClockError:
                stage.begin_again()
        return test(stage=stage, **arguments)

    return tries


def ends_well(box: Box, peer: Running) -> None:
    """See both ends end well. Raises NoClockError if all was done but cannot be reported on."""
    ended = peer.wait(120) or Ended(-1, "does not end")
    # Our end may wait for ever for a peer that failed, but not for one that was only to report.
    ours = box.wait(30 if ended.status == 0 or NO_CLOCK in ended.output else 3)
    said = f"rdma_rxe: {ended.output}\nmigroce: {box.log()}"
    if {ended.status, ours} in ({0, 1}, {1}) and NO_CLOCK in said:  # 1: perftest saw it; no crash, no hanging
        assert not re.search(r"Completion with error|Failed status", said), said
        raise NoClockError(said)
    assert (ended.status, ours) == (0, 0), said


def _gid_index(guest: Guest, family: int) -> str:
    """Index of the GID of the machine's address in the lab."""
    address = ipaddress.ip_address(net.LAB[family])
    gid = address if address.version == 6 else ipaddress.IPv6Address(f"::ffff:{address}")
    look = (
        "import pathlib; gids = pathlib.Path('/sys/class/infiniband/rxe0/ports/1/gids'); "
        f"print(*(p.name for p in gids.iterdir() if p.read_text().strip() == '{gid.exploded}'))"
    )
    found = guest.run(["/usr/bin/python3", "-I", "-S", "-c", look]).output.split()
    assert len(found) == 1, found
    return found[0]


class Pair:
    """A program between a container on node-a and the emulated machine.

    `container`: which end it is, server or client. `idle`: mgcheck connects and then waits until `go`.
    `family`: what its packets go by; it is V4 for TCP. `further`: an address
    of the container's besides its own, and what they go by.
    """

    def __init__(
        self, stage: Both, command: str, container: str, *, idle: bool = False, family: int = V4,
        further: str | None = None,
    ) -> None:  # fmt: skip
        self._stage, self._kernels = stage, stage.kernels
        argv = [*command.split(), "-d", "rxe0"]
        self._counts = argv[0] in (MGCHECK, UDCHECK)
        self._reads = command.endswith("--ops read")
        ours = [*argv, "-x", FURTHER_GID if further else OWN_GID[family]]
        if argv[0].startswith("ib_") and " -c " not in command:
            ours += ["-u", PATIENT]
        theirs = [*argv, "-x", _gid_index(self._kernels.guest, family)]
        files = {}
        if self._counts:
            files = {argv[0]: str(built(f"tests/workload/{Path(argv[0]).name}"))}
            ours += ["--progress", "/progress"]
        if idle:
            ours += ["--idle-until", "/go"]
        options: dict[str, Any] = {"files": files}
        if family == V6:
            options["ip6"] = BOX_V6
        if further:
            options["further"] = [further]
        self._datagrams = argv[0] == UDCHECK
        self.port = UDCHECK_PORT if self._datagrams else PORT
        if container == "server":
            self.box = stage.box("server", "a", ours, **options)
            wait_for("the server", self._box_listens)
            self.peer = stage.start([*theirs, self.box.ip])
        else:
            self.peer = stage.start(theirs)
            assert self._kernels.listens(self.port, 60)
            self.box = stage.box("client", "a", [*ours, net.LAB[V4]], **options)
        if not idle:
            self.box.wait_for_traffic()

    def _box_listens(self) -> bool:
        pid = self.box.info()["pid"]
        assert pid is not None, self.box.log()
        return listens(self.port, of=pid)

    def progress(self) -> dict[str, Any]:
        """The counters of the container's mgcheck or udcheck."""
        if self.box.info()["status"] == "exited":
            pytest.fail(f"the program has ended: {self.box.log()}")
        try:
            return dict(json.loads(self.box.file("/progress").read_text()))
        except (OSError, ValueError):
            return {}

    def go(self) -> None:
        """Let an idle mgcheck begin."""
        self.box.file("/go").touch()

    def goes_on(self) -> None:
        """Wait until more of the peer's messages were received and compared, or packets flow.

        Nobody sees another's READs: there it is our own, more than the queues hold, so READs are answered.
        """
        if self._counts:
            counter, more = ("sent", 1000) if self._reads else ("received", 200)
            wanted = int(self.progress().get(counter, 0)) + more
            wait_for("more messages", lambda: self.progress().get(counter, 0) >= wanted)
        else:
            self.box.wait_for_traffic()

    def move(self) -> None:
        """To the other node."""
        self._stage.blackouts.append(self.box.move().blackout)

    def goes_on_across_moves(self) -> None:
        """There and back, and the program goes on at each place: it has not ended before."""
        self.goes_on()
        for _ in range(2):
            self.move()
            self.goes_on()
        assert self.box.home == "node-a"

    def away(self, saved: Path) -> None:
        """Take the container away, and back on node-b after AWAY."""
        checkpoint(self.box.node, self.box.name, saved)
        time.sleep(AWAY)  # the length of the stop is what is tested
        restore(self._stage.lab.node("b"), saved)
        self.box.home = "node-b"

    def finish(self) -> None:
        """See both ends end well; mgcheck and udcheck are told to, and say what they found."""
        if self._counts:
            self.box.kill("TERM")
        if self._datagrams:
            self._kernels.guest.run(["pkill", "-TERM", "-x", "udcheck"])
        ends_well(self.box, self.peer)
        if self._counts and not self._datagrams:
            assert json.loads(self.box.log().strip().splitlines()[-1])["errors"] == 0
