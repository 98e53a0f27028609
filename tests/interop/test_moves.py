# SPDX-License-Identifier: BSD-3-Clause
"""A container of ours moves, with its address, while its peer is the kernel's own driver.

    emulated machine            node-a                    node-b
      rxe0 10.0.1.254 --- tap --- br0 === VXLAN === br0
                                container -- moves --> container

The peer knows nothing of us: the stand-in has to hold it with the standard's own words.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.stage import Stage, built, wait_for
from tests.interop import net
from tests.interop.ends import V4, V6, Kernels, Ours
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
GROUPS = {V4: "239.1.1.1", V6: "ff0e::101"}
"""guestd.py has the machine join them."""
BOX_V6 = "fd01::7"
OWN_GID = {V4: "1", V6: "2"}
"""Index of the container's GID: after the link-local one, IPv4 first."""
CHECK = f"{MGCHECK} --no-fence --stall 60 --rate 200 --seconds 600"
"""It ends when the container's end is told to, and takes the other along."""


@pytest.fixture(scope="module")
def lab(ends: tuple[Ours, Kernels]) -> Iterator[Lab]:
    for family, address in net.LAB.items():
        argv = ["ip", "addr", "replace", f"{address}/{net.PREFIXES[family]}", "dev", "data0"]
        ended = ends[1].guest.run(argv + (["nodad"] if family == V6 else []))
        assert ended.status == 0, ended.output
    up = Lab.up(f"iop-{os.getpid()}")
    try:
        with net.plugged_into(f"migroce-{up.name}.node-a"):
            yield up
    finally:
        up.down()


class Both(Stage):
    """A stage with the emulated machine's programs, which end with the test, too."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.peers: list[Running] = []

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
        super().close()


@pytest.fixture
def stage(lab: Lab) -> Iterator[Both]:
    with contextlib.closing(Both(lab)) as it:
        yield it


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

    `idle`: mgcheck connects and then waits until `go`. `family`: what its packets go by; it is V4 for TCP.
    """

    def __init__(
        self, stage: Both, kernels: Kernels, command: str, container: str, *, idle: bool = False,
        family: int = V4,
    ) -> None:  # fmt: skip
        self._stage, self._kernels = stage, kernels
        argv = [*command.split(), "-d", "rxe0"]
        ours = [*argv, "-x", OWN_GID[family]]
        theirs = [*argv, "-x", _gid_index(kernels.guest, family)]
        files = {}
        if argv[0] in (MGCHECK, UDCHECK):
            files = {argv[0]: str(built(f"tests/workload/{Path(argv[0]).name}"))}
            ours += ["--progress", "/progress"]
        if idle:
            ours += ["--idle-until", "/go"]
        options: dict[str, Any] = {"files": files}
        if family == V6:
            options["ip6"] = BOX_V6
        self.port = UDCHECK_PORT if argv[0] == UDCHECK else PORT
        if container == "server":
            self.box = stage.box("server", "a", ours, **options)
            wait_for("the server", self._box_listens)
            self.peer = self._start([*theirs, self.box.ip])
        else:
            self.peer = self._start(theirs)
            assert kernels.listens(self.port, 60)
            self.box = stage.box("client", "a", [*ours, net.LAB[V4]], **options)
        if not idle:
            self.box.wait_for_traffic()

    def _start(self, argv: list[str]) -> Running:
        peer = self._kernels.start(argv)
        self._stage.peers.append(peer)
        return peer

    def _box_listens(self) -> bool:
        pid = self.box.info()["pid"]
        assert pid is not None, self.box.log()
        return listens(self.port, of=pid)

    def progress(self) -> dict[str, Any]:
        """The counters of the container's mgcheck."""
        if self.box.info()["status"] == "exited":
            pytest.fail(f"mgcheck has ended: {self.box.log()}")
        try:
            return dict(json.loads(self.box.file("/progress").read_text()))
        except (OSError, ValueError):
            return {}

    def go(self) -> None:
        """Let an idle mgcheck begin."""
        self.box.file("/go").touch()

    def away(self, lab: Lab, saved: Path) -> None:
        """Take the container away, and back on node-b after AWAY."""
        checkpoint(self.box.node, self.box.name, saved)
        time.sleep(AWAY)  # the length of the stop is what is tested
        restore(lab.node("b"), saved)
        self.box.home = "node-b"

    def verify_more(self, messages: int = 200) -> None:
        """Wait until so many more messages of the peer's were received and compared."""
        before = int(self.progress().get("received", 0))
        wait_for(f"{messages} more messages", lambda: self.progress().get("received", 0) >= before + messages)

    def finish_check(self) -> None:
        """End mgcheck; see that neither end found anything wrong."""
        self.box.kill("TERM")
        self.finish()
        verdict = json.loads(self.box.log().strip().splitlines()[-1])
        assert verdict["errors"] == 0

    def finish_datagrams(self) -> None:
        """End both ends of udcheck; see that what arrived was right."""
        self.box.kill("TERM")
        self._kernels.guest.run(["pkill", "-TERM", "-x", "udcheck"])
        self.finish()

    def finish(self) -> None:
        """See both end well."""
        ended = self.peer.wait(120) or Ended(-1, "does not end")
        ours = self.box.wait(30 if ended.status == 0 else 3)
        assert (ended.status, ours) == (0, 0), f"rdma_rxe: {ended.output}\nmigroce: {self.box.log()}"


sides = pytest.mark.parametrize("container", ["server", "client"])


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize(
    "command",
    [
        "ib_send_bw -s 4096", "ib_send_bw -b -s 4096", "ib_write_bw -s 4096", "ib_read_bw -s 4096",
        "ib_send_bw -q 4 -s 4096", "ib_write_bw -q 4 -s 4096", "ib_send_bw -q 4 -b --use-srq -s 4096",
        "ib_atomic_bw -b", "ib_atomic_bw -A CMP_AND_SWAP",
    ],
)  # fmt: skip
def test_an_unmodified_peer_survives_a_move_there_and_back(
    command: str, container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    pair = Pair(stage, ends[1], f"{command} -n 10000", container)
    pair.box.move()
    pair.box.wait_for_traffic()  # it has not ended before
    pair.box.move()
    pair.box.wait_for_traffic()
    pair.finish()
    assert pair.box.home == "node-a"


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize("command", ["ib_send_bw", "ib_write_bw", "ib_read_bw"])
def test_an_unmodified_peer_waits_for_a_container_that_is_away_for_long(
    command: str, container: str, stage: Both, ends: tuple[Ours, Kernels], tmp_path: Path
) -> None:
    pair = Pair(stage, ends[1], f"{command} -s 4096 -n 5000", container)
    pair.away(stage.lab, tmp_path / "saved")
    pair.box.wait_for_traffic()
    pair.finish()


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize("lost", [None, 100], ids=["no loss", "1 % lost"])
def test_every_byte_is_right_across_moves(
    lost: int | None, container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    with net.loss_on_the_cable(lost):
        pair = Pair(stage, ends[1], f"{CHECK} --qps 4", container)
        pair.verify_more()
        for _ in range(2):
            pair.box.move()
            pair.verify_more()
        pair.finish_check()


@pytest.mark.timeout(300)
@sides
def test_every_byte_is_right_after_a_long_absence(
    container: str, stage: Both, ends: tuple[Ours, Kernels], tmp_path: Path
) -> None:
    pair = Pair(stage, ends[1], f"{CHECK} --qps 4", container)
    pair.verify_more()
    pair.away(stage.lab, tmp_path / "saved")
    pair.verify_more()
    pair.finish_check()


@pytest.mark.timeout(300)
def test_a_connection_that_was_idle_across_moves_is_whole(stage: Both, ends: tuple[Ours, Kernels]) -> None:
    pair = Pair(stage, ends[1], f"{CHECK} --qps 4", "client", idle=True)
    wait_for("the connection", lambda: pair.progress().get("state") == "idle")
    pair.box.move()
    pair.box.move()
    assert pair.progress().get("received", 0) == 0
    pair.go()
    pair.verify_more()
    pair.finish_check()


@pytest.mark.timeout(300)
@sides
def test_uc_goes_on_after_a_move(container: str, stage: Both, ends: tuple[Ours, Kernels]) -> None:
    pair = Pair(stage, ends[1], "ib_write_bw -c UC -s 1024 -D 30", container)
    pair.box.move()
    pair.box.wait_for_traffic()  # it has not ended before
    pair.box.move()
    pair.box.wait_for_traffic()
    pair.finish()


@pytest.mark.timeout(300)
@sides
def test_every_atomic_is_executed_once_across_moves(
    container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    pair = Pair(stage, ends[1], f"{CHECK} --qps 2 --ops atomic,send", container)
    pair.verify_more()
    for _ in range(2):
        pair.box.move()
        pair.verify_more()
    pair.finish_check()


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_datagrams_go_on_after_a_move(
    family: int, container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    """What is sent while the container is away is lost, as UD may; all that arrives is right."""
    group = GROUPS[family]
    pair = Pair(stage, ends[1], f"{UDCHECK} --group {group}", container, family=family)
    pair.verify_more()
    for _ in range(2):
        pair.box.move()
        pair.verify_more()
    assert pair.progress()["by_group"] > 0
    pair.finish_datagrams()


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize("command", ["ib_send_bw -b", "ib_write_bw", "ib_read_bw"])
def test_an_unmodified_peer_survives_moves_over_ipv6(
    command: str, container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    pair = Pair(stage, ends[1], f"{command} -s 4096 -n 10000", container, family=V6)
    for _ in range(2):
        pair.box.move()
        pair.box.wait_for_traffic()
    pair.finish()


@pytest.mark.timeout(300)
@sides
def test_every_byte_is_right_across_moves_over_ipv6(
    container: str, stage: Both, ends: tuple[Ours, Kernels]
) -> None:
    pair = Pair(stage, ends[1], f"{CHECK} --qps 4", container, family=V6)
    pair.verify_more()
    for _ in range(2):
        pair.box.move()
        pair.verify_more()
    pair.finish_check()
