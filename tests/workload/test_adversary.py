# SPDX-License-Identifier: BSD-3-Clause
"""Programs finish with right data while somebody sends them every kind of nonsense."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.native.netns import Node, ip
from tests.native.perftest import NO_CLOCK
from tests.native.procfs import listens, waits_for_events

from migroce import paths

from .adversary import Adversary
from .test_mgcheck import PATIENCE, Nodes, _both, _wait_for_state

pytestmark = pytest.mark.root
PERFTEST_PORT = 18515
NO_END = 1 << 60
OUTSIDE = "10.9.8.2"
MAC = "02:00:0a:09:08:01"  # of node a on that side


@pytest.fixture(scope="module")
def outside(nodes: Nodes) -> Iterator[Node]:
    """A third namespace, whose packets node a takes from whatever address they claim to be."""
    a, third = nodes[0], Node(f"mgx{os.getpid()}", "vx", OUTSIDE)
    ip("netns", "add", third.netns)
    try:
        ip("-n", a.netns, "link", "add", "vxa", "address", MAC, "mtu", "9000", "type", "veth",
           "peer", "name", third.iface, "netns", third.netns, "mtu", "9000")  # fmt: skip
        ip("-n", third.netns, "addr", "add", f"{OUTSIDE}/24", "dev", third.iface)
        for node, iface in ((a, "vxa"), (third, third.iface)):
            ip("-n", node.netns, "link", "set", iface, "up")
        ip("-n", third.netns, "route", "add", f"{a.address}/32", "dev", third.iface)
        ip("-n", third.netns, "neigh", "add", a.address, "lladdr", MAC, "dev", third.iface)
        subprocess.run(
            a.command("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.vxa.rp_filter=0"),
            check=True,
        )
        yield third
    finally:
        ip("netns", "del", third.netns)


@contextlib.contextmanager
def _adversary(nodes: Nodes, outside: Node, seed: int) -> Iterator[Adversary]:
    a, b = nodes
    adversary = Adversary([a], {a.address: outside, b.address: a}, OUTSIDE, seed)
    try:
        yield adversary
    finally:
        adversary.close()


def _harass(adversary: Adversary, process: subprocess.Popen[str], packets: int) -> None:
    """Until the process has ended or so many packets were sent."""
    until = time.monotonic() + PATIENCE
    rounds = 0
    while process.poll() is None and adversary.sent.total() < packets and time.monotonic() < until:
        adversary.read()
        adversary.attack(50)
        rounds += 1
        if rounds % 20 == 1:
            adversary.flood(200)


LONG = [pytest.param(seed, 100_000, marks=pytest.mark.slow) for seed in range(100, 106)]


@pytest.mark.parametrize(("seed", "packets"), [(1, 5000), *LONG])
def test_every_message_arrives_right(
    nodes: Nodes, outside: Node, tmp_path: Path, seed: int, packets: int
) -> None:
    progress = tmp_path / "progress"
    events = ["--events"] if seed % 2 else []
    options = ["--seconds", "600", "--seed", str(seed), "--progress", str(progress)]
    with (
        _adversary(nodes, outside, seed) as adversary,
        _both(nodes, events, options) as (server, client),
    ):
        _wait_for_state(progress, "running", client)
        _harass(adversary, client.process, packets)
        client.process.send_signal(signal.SIGTERM)
        theirs, ours = client.finish(), server.finish()
        assert (server.status, client.status) == (0, 0), server.said + client.said
    for one, other in ((ours, theirs), (theirs, ours)):
        assert one["verdict"] == "ok"
        assert one["received"]["messages"] == other["sent"]["messages"] > 0
    assert len(adversary.sent) == 8, adversary.sent


@pytest.mark.parametrize("line", ["ib_send_bw -n 2000 -b", "ib_read_bw -n 2000", "ib_write_bw -n 2000 -q 2"])
def test_perftest_finishes(nodes: Nodes, outside: Node, tmp_path: Path, line: str) -> None:
    program, *options = line.split()
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    for _ in range(3):
        statuses, said, sent = _perftest(nodes, outside, tmp_path, [path, "-d", "rxe0", *options])
        if NO_CLOCK not in said:
            break
    assert statuses == (0, 0), said
    assert sent > 0


def _perftest(
    nodes: Nodes, outside: Node, logs: Path, command: list[str]
) -> tuple[tuple[int, int], str, int]:
    """Exit statuses, what both said, how many packets came in between."""
    with _adversary(nodes, outside, 7) as adversary, contextlib.ExitStack() as stack:
        server = stack.enter_context(_program(nodes[0], logs / "server", *command))
        _wait_for_listener(server)
        client = stack.enter_context(_program(nodes[1], logs / "client", *command, nodes[0].address))
        _harass(adversary, client, NO_END)
        ended = client.wait(PATIENCE)
        if ended:
            server.kill()  # it would wait for ever
        statuses = server.wait(PATIENCE), ended
    said = "".join((logs / end).read_text(errors="replace") for end in ("server", "client"))
    return statuses, said, adversary.sent.total()


@contextlib.contextmanager
def _program(node: Node, log: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    env = {
        **os.environ, "LD_PRELOAD": str(paths.library()), "MIGROCE_AGENT": "/nonexistent",
        "MIGROCE_ADDR": node.address,
    }  # fmt: skip
    with log.open("w") as out, subprocess.Popen(
        node.command(*argv), env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for_listener(server: subprocess.Popen[str]) -> None:
    _wait_until(lambda: listens(PERFTEST_PORT, of=server.pid), server)


def _wait_until(ready: Callable[[], bool], server: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not ready():
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < until, "the server does not listen"
        time.sleep(0.01)


def test_rping_finishes(nodes: Nodes, outside: Node, tmp_path: Path) -> None:
    """A connection by rdma_cm; forged datagrams to QP 1 come all the while. -V checks the data."""
    path = shutil.which("rping")
    if path is None:
        pytest.skip("rping is not installed")
    common = [path, "-V", "-C", "300", "-S", "3000", "-a", nodes[0].address]
    with _adversary(nodes, outside, 11) as adversary, contextlib.ExitStack() as stack:
        server = stack.enter_context(_program(nodes[0], tmp_path / "server", *common, "-s"))
        _wait_until(lambda: waits_for_events(server.pid), server)
        adversary.aim(nodes[1].address, nodes[0].address)
        adversary.attack(500)
        client = stack.enter_context(_program(nodes[1], tmp_path / "client", *common, "-c"))
        _harass(adversary, client, NO_END)
        ended = client.wait(PATIENCE), server.wait(PATIENCE)
    said = "".join((tmp_path / end).read_text(errors="replace") for end in ("server", "client"))
    # rping may close the channel that its own thread reads from: 255
    assert ended == (0, 0) or (set(ended) <= {0, 255} and "Bad file descriptor" in said), (ended, said)
    assert adversary.sent["a_cm_datagram"] > 0


def test_whoever_knows_address_qpn_and_psn_can_end_a_connection(
    nodes: Nodes, outside: Node, tmp_path: Path
) -> None:
    """The IBA allows it, and it shows that these packets do reach the QP."""
    progress, go = tmp_path / "progress", tmp_path / "go"
    options = ["--idle-until", str(go), "--messages", "50", "--progress", str(progress), "--qps", "1"]
    with (
        _adversary(nodes, outside, 3) as adversary,
        _both(nodes, client=options) as (server, client),
    ):
        _wait_for_state(progress, "idle", client)
        a, b = (node.address for node in nodes)
        until = time.monotonic() + PATIENCE
        while not {a, b} <= adversary.control.keys():
            assert time.monotonic() < until, "the ends have not exchanged their tokens"
            adversary.read()
        of_a = adversary.control[b].meh
        assert of_a is not None
        write = adversary.request(adversary.control[a].dest_qpn, of_a.psn, rkey=0x12345678)
        adversary.send(b, a, 0xC000, write)
        go.touch()
        verdict = server.finish()
        assert server.status == 1
    assert verdict["errors"] >= 1
