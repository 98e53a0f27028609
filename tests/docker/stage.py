# SPDX-License-Identifier: BSD-3-Clause
"""What the Docker tests by command are written with: containers that know on which node they are."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.stage import built, wait_for

from migroce.errors import MigroceError
from migroce.lab.api import Lab
from migroce.lab.docker import IMAGE, NETWORK
from migroce.migration.api import Report, migrate
from migroce.migration.report import Event, Progress
from migroce.nodes import LocalNode

COUNTER = "i=0; while true; do i=$((i+1)); echo $i >/count; sleep 0.02; done"
"""A program whose memory and file tell that it went on from where it was."""

_KEEPER = "network-keeper"


def keep_network(lab: Lab) -> None:
    """Have a container on each node that keeps the swarm's network there between tests.

    A node that leaves an overlay network with its last container and comes back at once with the next may be
    forgotten by the others for good, without any migration (moby issue 47728): "No route to host".
    """
    for node in lab.nodes.values():
        if node.run(["docker", "start", _KEEPER], check=False).returncode:
            options = ["--name", _KEEPER, "--network", NETWORK]
            node.run(["docker", "run", "-d", *options, IMAGE, "sleep", "infinity"], timeout=120)


def drop_network(lab: Lab, node: str) -> None:
    """End the one on a node: the last container of a test to go takes the network along."""
    lab.node(node).run(["docker", "rm", "-f", _KEEPER])


def containers(node: LocalNode) -> list[str]:
    """Names of all the containers on a node that tests have made."""
    found = node.run(["docker", "ps", "-a", "--format", "{{.Names}}"], check=False).stdout.decode().split()
    return [name for name in found if name != _KEEPER]


def kill_docker(node: LocalNode) -> None:
    """Kill a node's dockerd and its containerd; containers live on."""
    for path in ("docker.pid", "docker-run/containerd/containerd.pid"):
        pid = int((node.context.state / path).read_text())
        with contextlib.suppress(ProcessLookupError):  # containerd ends with it
            os.kill(pid, signal.SIGKILL)
        wait_for("its end", lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def start_docker(lab: Lab) -> None:
    """Start what was killed."""
    made = lab.docker
    Lab.up(lab.name, engine="docker", release=str(made.bin) if made and made.bin else None).close()
    keep_network(lab)


def as_begins(phase: str, do: Callable[[], object]) -> Progress:
    """For `Box.move`: do something as the phase begins."""

    def progress(event: Event) -> None:
        if (event.phase, event.state) == (phase, "start"):
            do()

    return progress


class Box:
    """A Docker container of a test; `home` is the node that it is on."""

    def __init__(self, lab: Lab, name: str, home: str, ip: str) -> None:
        self.lab = lab
        self.name = name
        self.home = home
        self.ip = ip

    @property
    def node(self) -> LocalNode:
        return self.lab.node(self.home)

    def docker(self, *args: str, check: bool = True) -> str:
        """Run docker on its node; the output."""
        return self.node.run(["docker", *args], check=check, timeout=120).stdout.decode()

    def inspect(self) -> dict[str, Any]:
        return dict(json.loads(self.docker("inspect", self.name))[0])

    def pid(self) -> int:
        return int(self.inspect()["State"]["Pid"])

    def file(self, path: str) -> Path:
        """A file as the container sees it."""
        return Path(f"/proc/{self.pid()}/root") / path.lstrip("/")

    def count(self) -> int:
        """How far a COUNTER has counted."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.file("/count").read_text())
        return 0

    def counts_on(self, at_least: int = 0) -> int:
        """Wait until a COUNTER has gone on, from `at_least` or later; where it is."""
        start = max(wait_for(f"{self.name}'s count", self.count), at_least)
        wait_for(f"{self.name} counting on", lambda: self.count() > start + 3)
        return self.count()

    def other(self) -> str:
        """A node that it is not on."""
        return next(name for name in self.lab.nodes if name != self.home)

    def move(self, to: str | None = None, progress: Progress = lambda _: None) -> Report:
        """Migrate it to another node."""
        to = to or self.other()
        report = migrate(self.name, self.node, self.lab.node(to), progress=progress)
        self.home = to
        return report

    def where(self) -> list[str]:
        """Nodes whose Docker has a running container of this name (more than one would be a disaster)."""
        names = []
        for node in self.lab.nodes.values():
            argv = ["docker", "ps", "-q", "--filter", f"name=^{self.name}$", "--filter", "status=running"]
            if node.run(argv, check=False).stdout.strip():
                names.append(node.name)
        return names

    def wait(self, seconds: float = 120) -> int:
        """Its exit status, when it has ended."""
        status = self.node.call("wait", container=self.name, timeout=seconds)
        return int(status)

    def logs(self) -> str:
        return str(self.node.call("logs", container=self.name))


class Stage:
    """A lab's containers for one test; all of them end with it."""

    _numbers = itertools.count(1)

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def box(
        self, role: str, node: str, args: list[str], *options: str, rdma: bool = True, image: str = IMAGE
    ) -> Box:
        """`docker run -d` on the lab's network."""
        number = next(self._numbers)
        box = Box(self.lab, f"{role}-{number}", self.lab.node(node).name, f"10.0.1.{number % 120 + 2}")
        runtime = ["--runtime", "migroce"] if rdma else []
        where = ["--network", NETWORK, "--ip", box.ip]
        box.docker("run", "-d", "--name", box.name, *runtime, *where, *options, image, *args)
        return box

    def counter(self, node: str = "a", *options: str, rdma: bool = False, image: str = IMAGE) -> Box:
        """A container that counts."""
        box = self.box("counter", node, ["sh", "-c", COUNTER], *options, rdma=rdma, image=image)
        box.counts_on()
        return box

    def nothing_in_the_middle(self) -> None:
        """No migration is open, and nothing of one is left on the nodes."""
        for node in self.lab.nodes.values():
            assert [each for each in node.call("journals") if not each["ended"]] == []
            root = Path(node.run(["docker", "info", "-f", "{{.DockerRootDir}}"]).stdout.decode().strip())
            assert list(root.glob("containers/*/checkpoints/*")) == []
            for each in node.context.migrations.iterdir():
                left = {path.name for path in each.iterdir()} - {"dump.log", "restore.log", "recover.log"}
                assert left <= {"lock", "journal.json", "criu.conf", "docker.json", "stats-dump"}, each
                assert not Path(f"/dev/shm/migroce-{each.name}").exists()

    def close(self) -> None:
        """Remove all containers and volumes, wherever they are."""
        for node in self.lab.nodes.values():
            with contextlib.suppress(MigroceError):
                if found := containers(node):
                    node.run(["docker", "rm", "-fv", *found], check=False)
                node.run(["docker", "volume", "prune", "-f"], check=False)
                node.run(["docker", "volume", "prune", "-af"], check=False)  # 23 and later keep named ones


class Check:
    """Two containers that run mgcheck against each other until `finish`."""

    def __init__(
        self, stage: Stage, server_on: str = "a", client_on: str = "b", *options: str, rate: int = 800
    ) -> None:
        program = "/usr/local/bin/mgcheck"
        mount = ["-v", f"{built('tests/workload/mgcheck')}:{program}:ro"]
        own = [program, "--rate", str(rate), "--progress", "/progress", "--stall", "150", "--events"]
        self.server = stage.box("server", server_on, own, *mount)
        client = [*own, "--seconds", "600", *options, self.server.ip]
        self.client = stage.box("client", client_on, client, *mount)
        wait_for("mgcheck's beginning", lambda: self.state(self.client) in ("running", "idle"))

    @staticmethod
    def progress(box: Box) -> dict[str, Any]:
        """The counters that mgcheck keeps in a file."""
        try:
            return dict(json.loads(box.file("/progress").read_text()))
        except (OSError, ValueError):
            return {}

    def state(self, box: Box) -> str:
        if not box.inspect()["State"]["Running"]:
            pytest.fail(f"mgcheck of {box.name} has ended: {box.logs()}")
        return str(self.progress(box).get("state", ""))

    def done(self) -> int:
        """Messages verified by both."""
        return sum(int(self.progress(box).get("received", 0)) for box in (self.server, self.client))

    def more(self, messages: int = 100) -> None:
        """Wait until so many more messages were exchanged."""
        before = self.done()
        wait_for(f"{messages} more messages", lambda: self.done() >= before + messages)

    def finish(self) -> None:
        """End both and see that nothing was wrong."""
        for box in (self.server, self.client):
            box.docker("kill", "-s", "TERM", box.name, check=False)
        statuses = (self.client.wait(), self.server.wait())
        assert statuses == (0, 0), f"client: {self.client.logs()}\nserver: {self.server.logs()}"
        assert json.loads(self.client.logs().strip().splitlines()[-1])["errors"] == 0
