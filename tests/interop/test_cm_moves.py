# SPDX-License-Identifier: BSD-3-Clause
"""Moves of programs on rdma_cm, whose peer is the kernel's, at every step of a connection."""

from __future__ import annotations

import pytest
from tests.e2e.stage import Box, built, wait_for
from tests.interop import net
from tests.interop.ends import V4, V6
from tests.interop.moves import BOX_V6, PORT, Both, ends_well, until_the_clock_is_measured
from tests.native.procfs import listens, waits_for_events

pytestmark = pytest.mark.timeout(300)
PROGRAM = "/usr/local/bin/cmcheck"
UD = pytest.mark.parametrize("options", [[], ["--ud"]], ids=["RC", "UD"])


def _move(stage: Both, box: Box) -> None:
    stage.blackouts.append(box.move().blackout)


def _waits(box: Box) -> bool:
    pid = box.info()["pid"]
    assert pid is not None, box.log()
    return waits_for_events(pid)


class Held:
    """A container with cmcheck, held at each step until the test lets it go on."""

    def __init__(self, stage: Both, *argv: str) -> None:
        self._stage = stage
        hold = ["sh", "-c", 'mkdir -p /hold && exec "$@"', "sh", PROGRAM, "--hold", "/hold", *argv]
        self.box = stage.box("cm", "a", hold, files={PROGRAM: str(built("tests/workload/cmcheck"))})
        self.step = ""

    def reach(self, step: str) -> None:
        """Wait until it has come to a step, and move it there."""

        def there() -> bool:
            assert self.box.info()["status"] != "exited", f"before {step}: {self.box.log()}"
            path = self.box.file("/hold/at")
            return path.exists() and path.read_text().strip() == step

        wait_for(f"cmcheck at {step}", there)
        self.step = step
        _move(self._stage, self.box)

    def on(self, to: str) -> None:
        """Let it go on to the next step, where it moves."""
        self.end()
        self.reach(to)

    def end(self) -> None:
        """Let it go on."""
        self.box.file(f"/hold/go-{self.step}").touch()


@UD
def test_a_server_moves_at_every_step_of_a_connection(options: list[str], stage: Both) -> None:
    """Listening; asked; the request fetched; accepted; established; ended, the event not fetched."""
    held = Held(stage, *options)
    held.reach("listening")
    peer = stage.start(["cmcheck", *options, held.box.ip])
    for step in ("arrived", "request", "accepted", "established"):
        held.on(step)
    if not options:
        held.on("ended")
    held.end()
    ends_well(held.box, peer)


@UD
def test_a_client_moves_at_every_step_of_a_connection(options: list[str], stage: Both) -> None:
    """Address and route resolved; asked; answered, the event not fetched; established; ended."""
    peer = stage.start(["cmcheck", *options])
    wait_for("the machine's listener", stage.kernels.has_listener)
    held = Held(stage, *options, net.LAB[V4])
    held.reach("created")
    for step in ("addressed", "routed", "connecting", "answered", "established"):
        held.on(step)
    if not options:
        held.on("disconnecting")
        held.on("left")
    held.end()
    ends_well(held.box, peer)


@pytest.mark.parametrize("container", ["server", "client"])
@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_rping_goes_on_across_moves(family: int, container: str, stage: Both) -> None:
    """SENDs, READs and WRITEs with events; -V: it checks its data."""
    options = {"ip6": BOX_V6} if family == V6 else {}
    common = ["-C", "500", "-V", "-S", "4000"]
    if container == "server":
        box = stage.box(
            "rping", "a", ["rping", "-s", "-a", BOX_V6 if family == V6 else "0.0.0.0", *common], **options
        )
        wait_for("rping to listen", lambda: _waits(box))
        peer = stage.start(["rping", "-c", "-a", BOX_V6 if family == V6 else box.ip, *common])
    else:
        peer = stage.start(["rping", "-s", "-a", net.LAB[family], *common])
        wait_for("the machine's listener", stage.kernels.has_listener)
        box = stage.box("rping", "a", ["rping", "-c", "-a", net.LAB[family], *common], **options)
    for _ in range(2):
        box.wait_for_traffic()
        _move(stage, box)
    box.wait_for_traffic()
    ends_well(box, peer)


@pytest.mark.parametrize("command", ["ib_send_bw", "ib_write_bw", "ib_read_bw"])
@until_the_clock_is_measured
def test_perftest_on_rdma_cm_goes_on_across_moves(command: str, stage: Both) -> None:
    """As server only: perftest's client crashes where the emulated server is late (gate.py)."""
    argv = [command, "-R", "-s", "4096", "-n", "10000"]
    box = stage.box("server", "a", argv)
    wait_for("the server", lambda: _waits(box) or listens(PORT, of=box.info()["pid"] or 0))
    peer = stage.start([*argv, box.ip])
    for _ in range(2):
        box.wait_for_traffic()
        _move(stage, box)
    box.wait_for_traffic()
    ends_well(box, peer)
