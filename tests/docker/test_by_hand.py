# SPDX-License-Identifier: BSD-3-Clause
"""The recipe as users type it: docker checkpoint create, copy, docker start --checkpoint; no migroce CLI."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.docker.stage import containers, keep_network, kill_docker, start_docker
from tests.docker.test_bad_input import small_disk
from tests.e2e.stage import built, wait_for
from tests.native.perftest import NO_CLOCK

from migroce.agent.client import AgentClient
from migroce.lab.api import Lab, remove
from migroce.nodes import LocalNode

RELEASES = os.environ.get("MIGROCE_DOCKER_RELEASES", "20.10 26.1").split()
IMAGE = "docker-repo/perftest"
RDMA = ("--runtime", "migroce", "--network", "rdma-net")
_COUNTS = "while () { open F, '>/count'; print F ++$i; close F; select undef, undef, undef, 0.02 }"
COUNTER = ("perl", "-e", _COUNTS)
"""Starts no processes: CRIU under plain runc fails (type NOTIFY) when one is just being born."""

PATIENCE = 8.0
"""Seconds, longer than mgcheck's QPs repeat by themselves what nobody answers."""

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=RELEASES)
def up(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two nodes with a dockerd of this release each."""
    name = f"dh-{os.getpid()}"
    made = Lab.up(name, engine="docker", release=request.param)
    try:
        keep_network(made)
        yield made
    finally:
        made.down()
        remove(name)


@pytest.fixture
def hand(up: Lab) -> Iterator[Hand]:
    """Two shells. What they made is gone after the test, and the agents know of nothing any more."""
    with contextlib.closing(Hand(up)) as it:
        yield it
    for node in up.nodes.values():
        with AgentClient(node.context.agent) as agent:
            assert [c["id"] for c in agent.status()["containers"] if not c["implicit"]] == []
        assert not (node.context.agent.parent / "runtime").exists()


class Hand:
    """A user with a shell on both nodes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.a, self.b = lab.node("a"), lab.node("b")

    def docker(self, node: LocalNode, *args: str, check: bool = True) -> str:
        """Type a docker command on a node; what it prints."""
        done = node.run(["docker", *args], check=False, timeout=180)
        out = done.stdout.decode() + done.stderr.decode()
        assert not check or done.returncode == 0, f"docker {' '.join(args)}: {out}"
        return out.strip()

    def inspect(self, node: LocalNode, name: str) -> dict[str, Any]:
        return dict(json.loads(self.docker(node, "inspect", name))[0])

    def file(self, node: LocalNode, name: str, path: str) -> Path:
        """A file of a running container."""
        return Path(f"/proc/{self.inspect(node, name)['State']['Pid']}/root") / path.lstrip("/")

    def packets(self, node: LocalNode, name: str) -> int:
        """Packets that the QPs of a container have sent and received."""
        ident = self.inspect(node, name)["Id"]
        with AgentClient(node.context.agent) as agent:
            contexts = [each for c in agent.ps() if c["id"] == ident for each in c["contexts"]]
        qps = [qp for each in contexts if each["dump"] for qp in each["dump"]["qps"]]
        return sum(qp["tx_packets"] + qp["rx_packets"] for qp in qps)

    def checkpoint(self, node: LocalNode, name: str, *options: str) -> None:
        """`docker checkpoint create`; without --leave-running the container ends with it."""
        self.docker(node, "checkpoint", "create", *options, name, "ckpt1")
        if "--leave-running" not in options:
            wait_for(f"{name}'s end", lambda: not self.inspect(node, name)["State"]["Running"])

    def copy(self, source: LocalNode, target: LocalNode, name: str) -> None:
        """Copy the checkpoint and the writable layer from one node's container to the other's."""
        old, new = self.inspect(source, name), self.inspect(target, name)
        shutil.copytree(self.checkpoints(source, old) / "ckpt1", self.checkpoints(target, new) / "ckpt1")
        layers = [each["GraphDriver"]["Data"]["UpperDir"] for each in (old, new)]
        subprocess.run(["cp", "-a", f"{layers[0]}/.", layers[1]], check=True)

    def checkpoints(self, node: LocalNode, inspected: dict[str, Any]) -> Path:
        """Where Docker keeps a container's checkpoints."""
        root = self.docker(node, "info", "-f", "{{.DockerRootDir}}")
        return Path(root) / "containers" / inspected["Id"] / "checkpoints"

    def move(self, source: LocalNode, target: LocalNode, name: str, *created: str) -> None:
        """All of the recipe. `created`: what was behind `docker run` on the source."""
        self.checkpoint(source, name)
        self.docker(target, "create", "--name", name, *created)
        self.copy(source, target, name)
        self.docker(source, "rm", name)
        self.docker(target, "start", "--checkpoint", "ckpt1", name)

    def wait(self, node: LocalNode, name: str) -> int:
        """A container's exit status."""
        return int(self.docker(node, "wait", name))

    def said(self) -> str:
        """What all containers have written: who gives up is seldom who was wrong."""
        places = [(node, name) for node in (self.a, self.b) for name in containers(node)]
        return "\n".join(f"{name}: {self.docker(node, 'logs', name)}" for node, name in places)

    def close(self) -> None:
        for node in (self.a, self.b):
            for name in containers(node):
                self.docker(node, "rm", "-f", name, check=False)


def progress(hand: Hand, node: LocalNode, name: str) -> int:
    """Messages that mgcheck has verified; fails when it has ended."""
    assert hand.inspect(node, name)["State"]["Running"], hand.said()
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads(hand.file(node, name, "/progress").read_text())["received"])
    return 0


def more(hand: Hand, node: LocalNode, name: str) -> None:
    """Wait until mgcheck has verified more messages."""
    before = progress(hand, node, name)
    wait_for(f"messages to {name}", lambda: progress(hand, node, name) > before + 100)


def mgcheck(*args: str) -> list[str]:
    """What to put behind `docker run` for one side of mgcheck."""
    program = "/usr/local/bin/mgcheck"
    mount = ["-v", f"{built('tests/workload/mgcheck')}:{program}:ro"]
    own = [program, "--rate", "800", "--progress", "/progress", "--stall", "150", "--events"]
    return [*mount, IMAGE, *args, *own]


@pytest.fixture
def checked(hand: Hand) -> Hand:
    """mgcheck: a server in cont-moving, a client in cont-static."""
    hand.docker(hand.a, "run", "-d", *RDMA, "--name", "cont-moving", "--ip", "10.0.1.7", *mgcheck())
    client = [*mgcheck(), "--seconds", "600", "10.0.1.7"]
    hand.docker(hand.b, "run", "-d", *RDMA, "--name", "cont-static", "--ip", "10.0.1.3", *client)
    more(hand, hand.b, "cont-static")
    return hand


def finish(hand: Hand, moving: LocalNode) -> None:
    """End the pair of `checked` and see that nothing was wrong."""
    end(hand, (hand.b, "cont-static"), (moving, "cont-moving"))


def end(hand: Hand, *places: tuple[LocalNode, str]) -> None:
    """End these, the clients first, and see that nothing was wrong."""
    for node, name in places:
        hand.docker(node, "kill", "-s", "TERM", name, check=False)
    for node, name in places:
        assert hand.wait(node, name) == 0, hand.said()


@pytest.mark.parametrize("ways", [(), ("-b",)], ids=["one-way", "two-way"])
@pytest.mark.parametrize("moved", ["server", "client"])
def test_the_benchmark_finishes(hand: Hand, moved: str, ways: tuple[str, ...]) -> None:
    command = [IMAGE, "ib_send_bw", "-d", "rxe0", "-n", "100000", *ways]
    server = [*RDMA, "--ip", "10.0.1.7", *command]
    client = [*RDMA, "--ip", "10.0.1.3", *command, "10.0.1.7"]
    for _ in range(5):
        statuses, said = benchmark(hand, moved, server, client)
        if NO_CLOCK not in said:
            break
        hand.close()
    assert statuses == (0, 0), said
    assert said.count(" 65536      100000 ") == 2


def benchmark(hand: Hand, moved: str, server: list[str], client: list[str]) -> tuple[tuple[int, int], str]:
    """Move one of the two while they measure: (their exit statuses, what they have said)."""
    home, peer = (hand.a, hand.b) if moved == "server" else (hand.b, hand.a)
    hand.docker(hand.a, "run", "-d", "--name", "server", *server)
    listens = ["exec", "server", "sh", "-c", "cat /proc/net/tcp /proc/net/tcp6"]
    wait_for("the server", lambda: ":4853 " in hand.docker(hand.a, *listens))
    hand.docker(hand.b, "run", "-d", "--name", "client", *client)
    wait_for("traffic", lambda: hand.packets(home, moved) > 1000)
    hand.move(home, peer, moved, *(server if moved == "server" else client))
    return (hand.wait(peer, "client"), hand.wait(peer, "server")), hand.said()


def test_data_is_right_and_the_writable_layer_comes_along(checked: Hand) -> None:
    hand = checked
    hand.docker(hand.a, "exec", "cont-moving", "sh", "-c", "echo kept >/file")
    hand.move(hand.a, hand.b, "cont-moving", *RDMA, "--ip", "10.0.1.7", *mgcheck())
    more(hand, hand.b, "cont-static")
    assert hand.docker(hand.b, "exec", "cont-moving", "cat", "/file") == "kept"
    finish(hand, hand.b)


_FILLED = (
    "$data = join('', map { chr(rand(256)) } 1 .. 65536) x 4096; sub sum { unpack('%32C*', $data) } "
    "$sum = sum(); $pid = fork() // die; if (!$pid) { exec @ARGV } $SIG{TERM} = sub { kill 'TERM', $pid }; "
    "1 until waitpid($pid, 0) == $pid; exit(sum() == $sum ? $? >> 8 : 99)"
)
"""256 MB that must be the same at the end, around a program."""


def test_256_mb_of_touched_memory(hand: Hand) -> None:
    server = [*RDMA, "--ip", "10.0.1.7", *mgcheck("perl", "-e", _FILLED)]
    hand.docker(hand.a, "run", "-d", "--name", "cont-moving", *server)
    client = [*mgcheck(), "--seconds", "600", "10.0.1.7"]
    hand.docker(hand.b, "run", "-d", *RDMA, "--name", "cont-static", "--ip", "10.0.1.3", *client)
    more(hand, hand.b, "cont-static")
    hand.checkpoint(hand.a, "cont-moving")
    images = hand.checkpoints(hand.a, hand.inspect(hand.a, "cont-moving")) / "ckpt1"
    assert sum(path.stat().st_size for path in images.glob("pages-*.img")) > 256 << 20
    hand.docker(hand.b, "create", "--name", "cont-moving", *server)
    hand.copy(hand.a, hand.b, "cont-moving")
    hand.docker(hand.a, "rm", "cont-moving")
    hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving")
    more(hand, hand.b, "cont-static")
    finish(hand, hand.b)


def test_one_of_several_on_a_host_is_moved_and_its_neighbours_go_on(hand: Hand) -> None:
    """cont-moving's peer is on the same host before, on the other one afterwards; a third talks to node-b."""
    server, neighbour = [*RDMA, "--ip", "10.0.1.7", *mgcheck()], [*RDMA, "--ip", "10.0.1.8", *mgcheck()]
    hand.docker(hand.a, "run", "-d", "--name", "cont-moving", *server)
    hand.docker(hand.a, "run", "-d", "--name", "neighbour", *neighbour)
    for node, name, ip, to in ((hand.a, "near", 3, 7), (hand.b, "far", 4, 8)):
        client = [*RDMA, "--ip", f"10.0.1.{ip}", *mgcheck(), "--seconds", "600", f"10.0.1.{to}"]
        hand.docker(node, "run", "-d", "--name", name, *client)
        more(hand, node, name)
    hand.checkpoint(hand.a, "cont-moving")
    more(hand, hand.b, "far")  # also while the one stands still
    hand.docker(hand.b, "create", "--name", "cont-moving", *server)
    hand.copy(hand.a, hand.b, "cont-moving")
    hand.docker(hand.a, "rm", "cont-moving")
    hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving")
    more(hand, hand.a, "near")
    more(hand, hand.b, "far")
    end(hand, (hand.a, "near"), (hand.b, "far"), (hand.b, "cont-moving"), (hand.a, "neighbour"))


@pytest.mark.parametrize("options", [RDMA[:2], (*RDMA[:2], "-e", "MIGROCE=off"), ()], ids=["on", "off", "no"])
def test_a_container_without_rdma_moves_as_with_plain_docker(hand: Hand, options: tuple[str, ...]) -> None:
    created = [*options, "--network", "rdma-net", "--ip", "10.0.1.9", IMAGE, *COUNTER]
    hand.docker(hand.a, "run", "-d", "--name", "plain", *created)

    def count(node: LocalNode) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int(hand.file(node, "plain", "/count").read_text())
        return 0

    at = wait_for("counting", lambda: count(hand.a))
    environ = hand.file(hand.a, "plain", "/proc/1/environ").read_bytes()
    assert (b"LD_PRELOAD" in environ) == (len(options) == 2)
    hand.move(hand.a, hand.b, "plain", *created)
    wait_for("counting on", lambda: count(hand.b) > at + 3)


def test_a_checkpoint_that_leaves_it_running(checked: Hand) -> None:
    hand = checked
    for _ in range(2):
        hand.checkpoint(hand.a, "cont-moving", "--leave-running")
        more(hand, hand.b, "cont-static")
        dumps = hand.checkpoints(hand.a, hand.inspect(hand.a, "cont-moving")) / "ckpt1" / "migroce"
        assert [path.name for path in dumps.glob("*.dump")] == ["rdma-0.dump"]
        hand.docker(hand.a, "checkpoint", "rm", "cont-moving", "ckpt1")
    finish(hand, hand.a)


def test_peers_wait_for_a_paused_container(checked: Hand) -> None:
    hand = checked
    hand.docker(hand.a, "commit", "cont-moving", "committed:1")
    more(hand, hand.b, "cont-static")
    hand.docker(hand.a, "rmi", "committed:1")
    hand.docker(hand.a, "pause", "cont-moving")
    assert hand.inspect(hand.a, "cont-moving")["State"]["Status"] == "paused"
    time.sleep(PATIENCE)
    hand.docker(hand.a, "unpause", "cont-moving")
    more(hand, hand.b, "cont-static")
    finish(hand, hand.a)


def test_a_failed_checkpoint_changes_nothing(hand: Hand, tmp_path: Path) -> None:
    connect = 'socket(S,AF_UNIX,SOCK_STREAM,0); connect(S,sockaddr_un("/s/s")) or die; exec @ARGV'
    outside = ["perl", "-MSocket", "-e", "$^F=9; " + connect]  # a connection to the host: CRIU refuses
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    server = ["-v", f"{tmp_path}:/s", *mgcheck(*outside)]
    hand.docker(hand.a, "run", "-d", *RDMA, "--name", "cont-moving", "--ip", "10.0.1.7", *server)
    client = [*mgcheck(), "--seconds", "600", "10.0.1.7"]
    hand.docker(hand.b, "run", "-d", *RDMA, "--name", "cont-static", "--ip", "10.0.1.3", *client)
    more(hand, hand.b, "cont-static")
    for _ in range(2):
        said = hand.docker(hand.a, "checkpoint", "create", "cont-moving", "ckpt1", check=False)
        assert "Cannot checkpoint container cont-moving" in said
        assert "migroce: dump: Error " in said, said
        more(hand, hand.b, "cont-static")
    assert hand.docker(hand.a, "checkpoint", "ls", "cont-moving").splitlines()[1:] == []
    finish(hand, hand.a)
    listener.close()


def test_a_damaged_dump_is_refused_and_the_right_one_still_works(checked: Hand) -> None:
    hand = checked
    hand.checkpoint(hand.a, "cont-moving")
    hand.docker(hand.b, "create", "--name", "cont-moving", *RDMA, "--ip", "10.0.1.7", *mgcheck())
    hand.copy(hand.a, hand.b, "cont-moving")
    hand.docker(hand.a, "rm", "cont-moving")
    images = hand.checkpoints(hand.b, hand.inspect(hand.b, "cont-moving")) / "ckpt1"
    dump = images / "migroce" / "rdma-0.dump"
    right = dump.read_bytes()
    dump.write_bytes(right[:-9])
    said = hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving", check=False)
    assert "migroce: " in said
    assert "rdma-0.dump" in said
    dump.write_bytes(right)
    hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving")
    more(hand, hand.b, "cont-static")
    finish(hand, hand.b)


def test_a_full_disk_at_the_source_changes_nothing(checked: Hand) -> None:
    hand = checked
    with small_disk(hand.a) as disk:
        disk.fill(128 << 10)  # room for what mgcheck itself writes
        said = hand.docker(hand.a, "checkpoint", "create", "cont-moving", "ckpt1", check=False)
        assert "Cannot checkpoint container cont-moving" in said
        assert "no space left" in said.lower(), said
        more(hand, hand.b, "cont-static")
        assert hand.docker(hand.a, "checkpoint", "ls", "cont-moving").splitlines()[1:] == []
    hand.move(hand.a, hand.b, "cont-moving", *RDMA, "--ip", "10.0.1.7", *mgcheck())
    more(hand, hand.b, "cont-static")
    finish(hand, hand.b)


def test_a_full_disk_at_the_destination_and_another_start(hand: Hand) -> None:
    """As docs/docker.md has it: dockerd must be restarted there, as it keeps the address."""
    server = [*RDMA, "--ip", "10.0.1.7", *mgcheck()]
    hand.docker(hand.a, "run", "-d", "--name", "cont-moving", *server)
    client = [*RDMA, "--ip", "10.0.1.3", *mgcheck(), "--seconds", "600", "10.0.1.7"]
    hand.docker(hand.a, "run", "-d", "--name", "cont-static", *client)
    more(hand, hand.a, "cont-static")
    hand.checkpoint(hand.a, "cont-moving")
    hand.docker(hand.b, "create", "--name", "cont-moving", *server)
    hand.copy(hand.a, hand.b, "cont-moving")
    hand.docker(hand.a, "rm", "cont-moving")
    with small_disk(hand.b) as disk:
        disk.fill()
        said = hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving", check=False)
        assert "no space left on device" in said.lower(), said
    kill_docker(hand.b)
    start_docker(hand.lab)
    hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving")
    more(hand, hand.a, "cont-static")
    end(hand, (hand.a, "cont-static"), (hand.b, "cont-moving"))


def test_a_wrong_address_is_told_and_can_be_mended(checked: Hand) -> None:
    hand = checked
    hand.checkpoint(hand.a, "cont-moving")
    hand.docker(hand.b, "create", "--name", "cont-moving", *RDMA, "--ip", "10.0.1.9", *mgcheck())
    hand.copy(hand.a, hand.b, "cont-moving")
    said = hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving", check=False)
    assert "has the container the address that it had?" in said
    hand.docker(hand.b, "rm", "cont-moving")
    hand.docker(hand.b, "create", "--name", "cont-moving", *RDMA, "--ip", "10.0.1.7", *mgcheck())
    hand.copy(hand.a, hand.b, "cont-moving")
    hand.docker(hand.a, "rm", "cont-moving")
    hand.docker(hand.b, "start", "--checkpoint", "ckpt1", "cont-moving")
    more(hand, hand.b, "cont-static")
    finish(hand, hand.b)


def test_what_is_executed_in_a_container_has_the_device(hand: Hand) -> None:
    hand.docker(hand.a, "run", "-d", *RDMA, "--name", "box", IMAGE, "sleep", "100")
    assert "rxe0" in hand.docker(hand.a, "exec", "box", "ibv_devinfo")
