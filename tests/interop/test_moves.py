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
from tests.interop.ends import Kernels, Ours
from tests.interop.guest import Ended, Guest
from tests.native.procfs import listens

from migroce.lab.api import Lab
from migroce.migration.api import checkpoint, restore

PORT = 18515
AWAY = 10.0
"""Seconds of a long stop: many times the peer's retry timeout (7 times 67 ms)."""
MGCHECK = "/usr/local/bin/mgcheck"
CHECK = f"{MGCHECK} --no-fence --stall 60 --rate 200 --seconds 600"
"""It ends when the container's end is told to, and takes the other along."""


@pytest.fixture(scope="module")
def lab(ends: tuple[Ours, Kernels]) -> Iterator[Lab]:
    ends[1].guest.run(["ip", "addr", "add", f"{net.LAB}/24", "dev", "data0"])
    up = Lab.up(f"iop-{os.getpid()}")
    try:
        with net.plugged_into(f"migroce-{up.name}.node-a"):
            yield up
    finally:
        up.down()


@pytest.fixture
def stage(lab: Lab) -> Iterator[Stage]:
    with contextlib.closing(Stage(lab)) as it:
        yield it


def _gid_index(guest: Guest) -> str:
    """Index of the GID of the machine's address in the lab."""
    high, low = divmod(int(ipaddress.IPv4Address(net.LAB)), 1 << 16)
    look = (
        "import pathlib; gids = pathlib.Path('/sys/class/infiniband/rxe0/ports/1/gids'); "
        "print(*(p.name for p in gids.iterdir()"
        f" if p.read_text().strip().endswith('ffff:{high:04x}:{low:04x}')))"
    )
    found = guest.run(["/usr/bin/python3", "-I", "-S", "-c", look]).output.split()
    assert len(found) == 1, found
    return found[0]


class Pair:
    """A program between a container on node-a and the emulated machine.

    `idle`: mgcheck connects and then waits until `go`.
    """

    def __init__(
        self, stage: Stage, kernels: Kernels, command: str, container: str, *, idle: bool = False
    ) -> None:
        argv = [*command.split(), "-d", "rxe0"]
        ours, theirs = [*argv, "-x", "1"], [*argv, "-x", _gid_index(kernels.guest)]
        files = {MGCHECK: str(built("tests/workload/mgcheck"))} if argv[0] == MGCHECK else {}
        if files:
            ours += ["--progress", "/progress"]
        if idle:
            ours += ["--idle-until", "/go"]
        if container == "server":
            self.box = stage.box("server", "a", ours, files=files)
            wait_for("the server", self._box_listens)
            self.peer = kernels.start([*theirs, self.box.ip])
        else:
            self.peer = kernels.start(theirs)
            assert kernels.listens(PORT, 60)
            self.box = stage.box("client", "a", [*ours, net.LAB], files=files)
        if not idle:
            self.box.wait_for_traffic()

    def _box_listens(self) -> bool:
        pid = self.box.info()["pid"]
        assert pid is not None, self.box.log()
        return listens(PORT, of=pid)

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

    def finish(self) -> None:
        """See both end well."""
        ended = self.peer.wait(120) or Ended(-1, "does not end")
        ours = self.box.wait(30 if ended.status == 0 else 3)
        self.peer.kill()
        assert (ended.status, ours) == (0, 0), f"rdma_rxe: {ended.output}\nmigroce: {self.box.log()}"


sides = pytest.mark.parametrize("container", ["server", "client"])


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize(
    "command",
    ["ib_send_bw", "ib_send_bw -b", "ib_write_bw", "ib_read_bw", "ib_send_bw -q 4", "ib_write_bw -q 4"],
)
def test_an_unmodified_peer_survives_a_move_there_and_back(
    command: str, container: str, stage: Stage, ends: tuple[Ours, Kernels]
) -> None:
    pair = Pair(stage, ends[1], f"{command} -s 4096 -n 10000", container)
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
    command: str, container: str, stage: Stage, ends: tuple[Ours, Kernels], tmp_path: Path
) -> None:
    pair = Pair(stage, ends[1], f"{command} -s 4096 -n 5000", container)
    pair.away(stage.lab, tmp_path / "saved")
    pair.box.wait_for_traffic()
    pair.finish()


@pytest.mark.timeout(300)
@sides
@pytest.mark.parametrize("lost", [None, 100], ids=["no loss", "1 % lost"])
def test_every_byte_is_right_across_moves(
    lost: int | None, container: str, stage: Stage, ends: tuple[Ours, Kernels]
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
    container: str, stage: Stage, ends: tuple[Ours, Kernels], tmp_path: Path
) -> None:
    pair = Pair(stage, ends[1], f"{CHECK} --qps 4", container)
    pair.verify_more()
    pair.away(stage.lab, tmp_path / "saved")
    pair.verify_more()
    pair.finish_check()


@pytest.mark.timeout(300)
def test_a_connection_that_was_idle_across_moves_is_whole(stage: Stage, ends: tuple[Ours, Kernels]) -> None:
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
def test_uc_goes_on_after_a_move(container: str, stage: Stage, ends: tuple[Ours, Kernels]) -> None:
    pair = Pair(stage, ends[1], "ib_write_bw -c UC -s 1024 -D 30", container)
    pair.box.move()
    pair.box.wait_for_traffic()  # it has not ended before
    pair.box.move()
    pair.box.wait_for_traffic()
    pair.finish()
