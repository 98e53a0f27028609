# SPDX-License-Identifier: BSD-3-Clause
"""docs/docker.md, "On two real machines" and "By command": each block as it is written, where it says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docker.conftest import RELEASES
from tests.e2e.stage import wait_for
from tests.machines import TREE, Machine, blocks, two_machines

from migroce.lab import docker

LISTENS = "docker exec cont-moving cat /proc/net/tcp /proc/net/tcp6"


def dockerd(host: Machine) -> None:
    """Start Docker as a service would, and wait for it."""
    host.start(["dockerd"], "dockerd.log")
    version = host.command(["docker", "version"])
    wait_for("dockerd", lambda: not subprocess.run(version, capture_output=True, check=False).returncode)


@pytest.fixture(params=RELEASES)
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """host-a and host-b with Docker as a distribution delivers it."""
    env = docker.find(request.param).environment({"PATH": f"{TREE}/.venv/bin:{os.environ['PATH']}"})
    with two_machines(tmp_path, env) as machines:
        for host in machines:
            dockerd(host)
        yield machines


def test_two_machines_as_documented(hosts: tuple[Machine, Machine]) -> None:
    a, b = hosts
    recipe = blocks("docker.md")
    assert [where for where, _ in recipe] == [
        "both", "both", "host-a", "host-a", "host-b", "host-a", "host-b", "host-a",
    ]  # fmt: skip
    setup, doctor, swarm, server, client, move, end, command = (lines for _, lines in recipe)
    for host in hosts:
        said = host.run(setup)
        assert "end dockerd and start it again" in said
        assert "start the agent" in said
        host.run("kill $(cat /run/docker.pid); tail -f /dev/null --pid $(cat /run/docker.pid)")
        dockerd(host)
        host.start(["migroce", "agent", "run", "--run-dir", "/run/migroce"], "agent.log")
        wait_for("the agent", lambda host=host: "migroce" in host.run("migroce agent status || true"))  # type: ignore[misc]
        assert "LACK" not in host.run(doctor)
    join = re.search(r"docker swarm join .*", a.run(swarm))
    assert join is not None
    b.run(join[0])
    for host in hosts:
        host.run("docker load -q -i .docker/perftest.tar")

    for moving in (move, command):
        a.run(server)
        wait_for("the server", lambda: ":4853 " in a.run(LISTENS))
        b.run(client)
        said = a.run(moving)
        assert "cont-moving" in said
        said = b.run(end, 600)
        assert "\n0\n0\n" in said, said
        assert " 65536      200000 " in said, said
        assert "cont-moving" not in a.run("docker ps -a")
