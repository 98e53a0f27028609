# SPDX-License-Identifier: BSD-3-Clause
"""The source's dockerd is killed during a move and started again: what is said is true, nothing is left.

Without live-restore, which a swarm does not allow, a dockerd that starts ends the containers that it finds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.docker.stage import Box, Stage, as_begins, kill_docker, start_docker
from tests.docker.test_command import settled
from tests.e2e.stage import wait_for

from migroce.errors import MigrationError
from migroce.lab.docker import NETWORK
from migroce.nodes import LocalNode


def recover(node: LocalNode) -> str:
    """`migroce recover` on a node: what it says."""
    argv = [sys.executable, "-m", "migroce", "recover", "--on", node.spec]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    return " ".join((done.stdout + done.stderr).split())


def struck(box: Box, phase: str, *, when_given: bool = False) -> MigrationError:
    """What a move fails with during which the source's dockerd is killed as `phase` begins.

    `when_given`: not before the swarm has given the container's address to the destination.
    """
    home, there = box.node, box.lab.node(box.other())
    shown = "{{range .Containers}}{{.IPv4Address}} {{end}}"

    def given() -> bool:
        has = there.run(["docker", "network", "inspect", "-f", shown, NETWORK]).stdout.decode()
        return f"{box.ip}/24" in has.split()

    def strike() -> None:
        if when_given:
            wait_for("the address at the destination", given)
        kill_docker(home)

    with pytest.raises(MigrationError) as caught:
        box.move(progress=as_begins(phase, strike))
    assert f"Docker on {home.name} does not answer" in str(caught.value)
    return caught.value


def test_while_nothing_stands_still(stage: Stage) -> None:
    box = stage.counter("a", rdma=True)
    counter = Path(f"/proc/{box.pid()}/root/count")
    error = struck(box, "prepare")
    box.home = "node-a"
    assert error.running_on == "node-a"
    assert "runs on node-a as before" in str(error)
    at = int(counter.read_text())
    wait_for("counting", lambda: int(counter.read_text() or 0) > at)
    start_docker(stage.lab)
    box.docker("start", box.name)
    box.counts_on()
    box.move()
    box.counts_on()
    stage.nothing_in_the_middle()


@pytest.mark.parametrize("home", ["node-a", "node-b"])
def test_before_the_destination_has_the_address(stage: Stage, home: str) -> None:
    """The swarm's manager, or a node that is known to have the address until it speaks again."""
    box = stage.counter(home.removeprefix("node-"), rdma=True)
    error = struck(box, "dump")
    box.home = home
    assert "could not be brought back" in str(error)
    assert "then run `migroce recover`" in str(error)
    assert error.running_on is None
    start_docker(stage.lab)
    gone = f"{box.name} was ended by something else during its move; start it again on {home}"
    wait_for("word of it", lambda: gone in recover(box.node))
    assert box.where() == []
    assert box.inspect()["State"]["Status"] == "exited"
    stage.nothing_in_the_middle()
    box.docker("start", box.name)
    box.counts_on()
    assert set(box.docker("exec", box.name, "hostname", "-i").split()) == {box.ip}
    assert recover(box.node) == "nothing to recover"
    box.move()
    box.counts_on()


@pytest.mark.parametrize("phase", ["transfer", "restore", "commit"])
def test_when_the_destination_has_the_address(stage: Stage, phase: str) -> None:
    """To the swarm's manager, without which the destination could not give the container its network."""
    box = stage.counter("b", rdma=True)
    error = struck(box, phase, when_given=True)
    box.home = "node-a"
    assert error.running_on == "node-a"
    assert box.where() == ["node-a"]
    box.counts_on()
    start_docker(stage.lab)
    recover(box.lab.node("b"))
    assert settled(stage, box) == "node-a"
