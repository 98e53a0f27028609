# SPDX-License-Identifier: BSD-3-Clause
"""Podman's own checkpoint and restore with open connections whose every message is verified."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.stage import built, wait_for
from tests.machines import Machine

IMAGE = "docker-repo/perftest"


class Pair:
    """mgcheck: a server in cont-moving on host-a, a client in cont-static on host-b."""

    def __init__(self, a: Machine, b: Machine) -> None:
        self.a, self.b = a, b

    @staticmethod
    def podman(host: Machine, *args: str, check: bool = True) -> str:
        """Type a podman command; what it prints."""
        line = shlex.join(["podman", *args])
        return host.run(line if check else f"{line} || true")

    def begin(self, *around: str, options: tuple[str, ...] = ()) -> None:
        program = "/usr/local/bin/mgcheck"
        runtime = self.a.run("command -v migroce-runtime").splitlines()[-1]
        mount = ["-v", f"{built('tests/workload/mgcheck')}:{program}:ro"]
        common = ["--runtime", runtime, "--network", "rdma-net", *mount]
        own = [program, "--rate", "800", "--progress", "/progress", "--stall", "60", "--events"]
        server = [*common, *options, "--ip", "10.0.1.7", "--name", "cont-moving", IMAGE, *around, *own]
        own += ["--seconds", "600", "10.0.1.7"]
        client = [*common, "--ip", "10.0.1.3", "--name", "cont-static", IMAGE, *own]
        self.podman(self.a, "run", "-d", *server)
        self.podman(self.b, "run", "-d", *client)
        self.more()

    def received(self) -> int:
        """Messages that the client has verified; fails when it has ended."""
        said = self.podman(self.b, "exec", "cont-static", "cat", "/progress", check=False)
        found = [line for line in said.splitlines() if line.startswith("{")]
        if not found:
            assert "Up " in self.podman(self.b, "ps"), self.podman(self.b, "logs", "cont-static")
        with contextlib.suppress(ValueError, IndexError):
            return int(json.loads(found[-1])["received"])
        return 0

    def more(self) -> None:
        before = self.received()
        wait_for("messages", lambda: self.received() > before + 100)

    def move(self, here: Machine, there: Machine) -> None:
        file = "/var/tmp/cont-moving.tar.zst"
        self.podman(here, "container", "checkpoint", "--export", file, "cont-moving")
        self.podman(here, "rm", "cont-moving")
        self.podman(there, "container", "restore", "--import", file)

    def finish(self, moving: Machine) -> None:
        """End both and see that nothing was wrong."""
        for host, name in ((self.b, "cont-static"), (moving, "cont-moving")):
            self.podman(host, "kill", "-s", "TERM", name, check=False)
            status = self.podman(host, "wait", name).splitlines()[-1]
            assert status == "0", self.podman(host, "logs", name)


@pytest.fixture
def pair(hosts: tuple[Machine, Machine]) -> Iterator[Pair]:
    yield Pair(*hosts)
    for host in hosts:
        Pair.podman(host, "rm", "-fa", "-t", "0")
        agent = json.loads(host.run("migroce agent status --json").partition("\n")[2])
        assert [each for each in agent["containers"] if not each["implicit"]] == []


def test_there_and_back_with_files(pair: Pair) -> None:
    pair.begin()
    pair.podman(pair.a, "exec", "cont-moving", "sh", "-c", "echo kept >/file")
    for here, there in ((pair.a, pair.b), (pair.b, pair.a), (pair.a, pair.b)):
        pair.move(here, there)
        pair.more()
    assert pair.podman(pair.b, "exec", "cont-moving", "cat", "/file").splitlines()[-1] == "kept"
    pair.finish(pair.b)


def test_on_one_machine_and_left_running(pair: Pair) -> None:
    pair.begin()
    for _ in range(2):
        pair.podman(pair.a, "container", "checkpoint", "--leave-running", "cont-moving")
        pair.more()
    pair.podman(pair.a, "container", "checkpoint", "cont-moving")
    pair.podman(pair.a, "container", "restore", "cont-moving")
    pair.more()
    pair.finish(pair.a)


def test_a_failed_checkpoint_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    connect = 'socket(S,AF_UNIX,SOCK_STREAM,0); connect(S,sockaddr_un("/s/s")) or die; exec @ARGV'
    # A connection to the host: CRIU refuses.
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as outside:
        outside.bind(str(tmp_path / "s"))
        outside.listen()
        pair.begin("perl", "-MSocket", "-e", "$^F=9; " + connect, options=("-v", f"{tmp_path}:/s"))
        said = pair.podman(pair.a, "container", "checkpoint", "cont-moving", check=False)
        print(said)
        assert "migroce: dump: " in said
        pair.more()
        pair.finish(pair.a)


def test_a_container_that_wants_no_device(pair: Pair) -> None:
    runtime = pair.a.run("command -v migroce-runtime").splitlines()[-1]
    shown = [IMAGE, "sh", "-c", "echo preloaded: $LD_PRELOAD."]
    for options, has in (((), True), (("-e", "MIGROCE=off"), False), (("--annotation", "migroce=no"), False)):
        said = pair.podman(pair.a, "run", "--rm", "--runtime", runtime, *options, *shown)
        assert ("preloaded: ." not in said.splitlines()) == has, said
