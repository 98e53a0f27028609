# SPDX-License-Identifier: BSD-3-Clause
"""Moves of programs on rdma_cm: at every step of a connection, with events waiting to be fetched."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.stage import Binder, Box, Stage, built, wait_for
from tests.native.procfs import waits_for_events

from migroce.errors import MigroceError

PROGRAM = "/usr/local/bin/cmcheck"


class Connection:
    """A server and a client of cmcheck, held at each step until the test lets them go on."""

    def __init__(self, stage: Stage, *options: str) -> None:
        self.stage = stage
        self.argv = [PROGRAM, "--hold", "/hold", *options]
        self.files = {PROGRAM: str(built("tests/workload/cmcheck"))}
        self.server = self._start("cm-server", "a")
        self.reach(self.server, "listening")
        self.client = self._start("cm-client", "b", self.server.ip)
        self.reach(self.client, "created")

    def _start(self, role: str, node: str, *more: str) -> Box:
        hold = ["sh", "-c", 'mkdir -p /hold && exec "$@"', "sh"]
        return self.stage.box(role, node, [*hold, *self.argv, *more], files=self.files)

    def reach(self, box: Box, step: str) -> None:
        """Wait until a program has come to a step."""

        def there() -> bool:
            assert box.info()["status"] != "exited", f"before {step}: {box.log()}"
            path = box.file("/hold/at")
            return path.exists() and path.read_text().strip() == step

        wait_for(f"{box.name} at {step}", there)

    def on(self, box: Box, at: str, to: str) -> None:
        """Let a program go on from one step to the next."""
        box.file(f"/hold/go-{at}").touch()
        self.reach(box, to)

    def ask(self) -> None:
        """From the beginning until the request is there, not fetched."""
        self.on(self.client, "created", "addressed")
        self.on(self.client, "addressed", "routed")
        self.on(self.client, "routed", "connecting")
        self.on(self.server, "listening", "arrived")

    def answer(self) -> None:
        """From the request fetched until its answer is there, not fetched."""
        self.on(self.server, "request", "accepted")
        self.on(self.client, "connecting", "answered")

    def establish(self) -> None:
        """From the beginning, without a move."""
        self.ask()
        self.on(self.server, "arrived", "request")
        self.answer()
        self.on(self.client, "answered", "established")

    def move_both(self) -> None:
        """At the same time."""
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(box.move) for box in (self.server, self.client)]:
                assert done.result().warnings == []

    def finish(self, *, client: str, server: str) -> None:
        """Let both go on to their ends, from these steps."""
        for box, steps in (
            (self.client, (client, "disconnecting", "left")),
            (self.server, (server, "ended")),
        ):
            for step in steps:
                box.file(f"/hold/go-{step}").touch()
        for box in (self.client, self.server):
            assert box.wait() == 0, box.log()
            assert '"done"' in box.log()


def test_a_listener_and_a_client_that_resolves_move(stage: Stage) -> None:
    """No connection yet: a port listened on, ids, events that nobody has fetched."""
    c = Connection(stage)
    c.server.move()
    for step in ("addressed", "routed"):
        c.client.move()
        c.on(c.client, {"addressed": "created", "routed": "addressed"}[step], step)
    with ThreadPoolExecutor(1) as pool:  # the request meets a server that may be anywhere in its move
        moving = pool.submit(c.server.move)
        c.client.move()
        c.on(c.client, "routed", "connecting")
        moving.result()
    c.on(c.server, "listening", "arrived")
    c.on(c.server, "arrived", "request")
    c.answer()
    c.on(c.client, "answered", "established")
    c.on(c.server, "accepted", "established")
    c.finish(client="established", server="established")


def test_both_ends_move_between_connect_and_accept(stage: Stage) -> None:
    """REQ arrived and not fetched; fetched and not accepted; REP sent and no RTU; RTU not fetched."""
    c = Connection(stage)
    c.ask()
    c.move_both()
    c.on(c.server, "arrived", "request")
    c.server.move()
    c.client.move()
    c.answer()
    c.move_both()
    c.on(c.client, "answered", "established")
    c.server.move()
    c.on(c.server, "accepted", "established")
    c.finish(client="established", server="established")


def test_both_ends_move_while_the_connection_ends(stage: Stage) -> None:
    """Established; DREQ arrived and not fetched; DREP arrived and not fetched; timewait."""
    c = Connection(stage)
    c.establish()
    c.on(c.server, "accepted", "established")
    c.move_both()
    c.server.file("/hold/go-established").touch()
    c.on(c.client, "established", "disconnecting")
    c.reach(c.server, "ended")
    c.move_both()
    c.server.file("/hold/go-ended").touch()
    c.on(c.client, "disconnecting", "left")
    c.client.move()
    c.finish(client="left", server="ended")


def test_a_datagram_service_moves(stage: Stage) -> None:
    """SIDR request waiting, answered, the answer not fetched; datagrams go to where the server is."""
    c = Connection(stage, "--ud")
    c.ask()
    c.move_both()
    c.on(c.server, "arrived", "request")
    c.server.move()
    c.answer()
    c.move_both()
    c.on(c.client, "answered", "established")
    c.on(c.server, "accepted", "established")
    c.server.move()
    c.finish(client="established", server="established")


def test_ports_move_with_the_processes_that_have_them(stage: Stage) -> None:
    """Two processes of a container: what the one has the other cannot take, there as well as here."""
    program = "/usr/local/bin/cmports"
    both = "mkdir /one /other && { cmports /one & exec cmports /other; }"
    box = stage.box("ports", "a", ["sh", "-c", both], files={program: str(built("tests/workload/cmports"))})
    wait_for("both", lambda: box.file("/other").exists())
    one, other = Binder(box.file("/one")), Binder(box.file("/other"))
    for at in range(2):
        one.do("new", at, "tcp")
    ports = [one.do("bind", at, "0.0.0.0", port).split()[1] for at, port in enumerate((7300, 0))]
    assert one.do("listen", 0) == "0 7300"
    for there in range(3):
        for port in ports:
            other.do("new", 0, "tcp")
            assert other.do("bind", 0, "0.0.0.0", port) == "EADDRNOTAVAIL"
            other.do("drop", 0)
        if there < 2:
            assert box.move().warnings == []
            one.directory, other.directory = box.file("/one"), box.file("/other")
    one.do("drop", 0)
    other.do("new", 0, "tcp")
    assert other.do("bind", 0, "0.0.0.0", 7300) == "0 7300"
    box.kill("KILL")


def _ended_well(box: Box) -> bool:
    """rping may close the channel that its own thread reads from, and then ends with 255."""
    status = box.wait()
    return status == 0 or (status == 255 and "rdma_get_cm_event: Bad file descriptor" in box.log())


def _rping(stage: Stage, count: int) -> tuple[Box, Box]:
    """Server and client of a run that has begun (or is over already)."""
    common = ["-C", str(count), "-V", "-S", "4000"]
    server = stage.box("rping-server", "a", ["rping", "-s", *common])
    wait_for("rping to listen", lambda: waits_for_events(server.info()["pid"]))
    client = stage.box("rping-client", "b", ["rping", "-c", "-a", server.ip, *common])
    wait_for("traffic", lambda: client.info()["status"] == "exited" or client.packets() > 20)
    return server, client


@pytest.mark.parametrize("who", ["server", "client"])
def test_rping_moves(stage: Stage, who: str) -> None:
    """SENDs, READs and WRITEs of a connection made by rdma_cm, with events; -V: it checks its data."""
    count, went_on = 5_000, False
    while not went_on:
        server, client = _rping(stage, count)
        with contextlib.suppress(MigroceError):  # it was over before
            (server if who == "server" else client).move()
            went_on = client.info()["status"] != "exited"
        for box in (client, server):
            assert _ended_well(box), box.log()
        assert count < 1_000_000
        count *= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "client"),
    [
        ("udaddy -C 50 -S 1000", "udaddy -C 50 -S 1000 -s"),
        ("rdma_server", "rdma_client -s"),
        ("rdma_xserver", "rdma_xclient -s"),
        ("ucmatose -c 20 -C 20", "ucmatose -c 20 -C 20 -s"),
    ],
)
def test_servers_that_listen_move_and_serve(stage: Stage, server: str, client: str) -> None:
    """Programs that are over in a moment, or whose datagrams a move may lose: moved before anybody calls."""
    first = stage.box("listener", "a", server.split())
    wait_for("the listener", lambda: waits_for_events(first.info()["pid"]))
    for _ in range(3):
        assert first.move().warnings == []
    second = stage.box("caller", "a", [*client.split(), first.ip])
    assert (second.wait(), first.wait()) == (0, 0), f"{second.log()}\n{first.log()}"


@pytest.mark.slow
def test_a_member_of_a_group_moves_and_hears(stage: Stage) -> None:
    """mckey, from the container that is moved, joined by rdma_join_multicast."""
    receiver = stage.box("member", "a", ["mckey", "-m", "239.4.3.2", "-C", "20"])
    igmp = Path(f"/proc/{receiver.info()['pid']}/net/igmp")
    wait_for("its membership", lambda: "020304EF" in igmp.read_text())
    for _ in range(3):
        assert receiver.move().warnings == []
    sender = stage.box("sender", "a", ["mckey", "-m", "239.4.3.2", "-s", "-C", "20"])
    assert (sender.wait(), receiver.wait()) == (0, 0), f"{sender.log()}\n{receiver.log()}"
