# SPDX-License-Identifier: BSD-3-Clause
"""The cable between the hosts is pulled while a container is on its way by ssh, and plugged in again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docker.machine import HOST, Machine
from tests.docker.stage import Box, Check, Stage
from tests.e2e.stage import wait_for

from migroce.lab.api import Lab

_MOVE = """
import pathlib, subprocess, sys
from migroce.migration.api import migrate
name, source, to, phase, cut, *pull = sys.argv[1:]
def strike(event):
    if (event.phase, event.state) == (phase, "start"):
        subprocess.run(pull, check=True)
        pathlib.Path(cut).touch()
migrate(name, source, to, strike)
"""


class Cable:
    """Between the hosts."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._set = ["ip", "-n", f"migroce-{lab.name}.net", "link", "set", "node1"]
        self.pull = [*self._set, "down"]

    def plug(self) -> None:
        subprocess.run([*self._set, "up"], check=True)

    def missed(self) -> bool:
        """Whether ssh has something to say that does not arrive."""
        shown = self._lab.node("a").run(["ss", "-tnoH", "dst", HOST]).stdout.decode()
        return any(int(times) > 1 for times in re.findall(r"timer:\(on,[^,]*,(\d+)\)", shown))


def begin(machine: Machine, box: Box, phase: str, cable: Cable, cut: Path) -> subprocess.Popen[str]:
    """Begin a move during which the cable is pulled as `phase` begins; wait for that."""
    here, there = f"{box.lab.name}/node-a", f"ssh://root@{HOST}"
    way = [here, there] if box.home == "node-a" else [there, here]
    env = {"PATH": f"{machine.keys.bin}:{os.environ['PATH']}"}
    argv = [sys.executable, "-c", _MOVE, box.name, *way, phase, str(cut), *cable.pull]
    command = box.lab.node("a").command(argv, env)
    moving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for("the cut", lambda: cut.exists() or moving.poll() is not None)
    assert cut.exists(), moving.communicate()[0]
    return moving


def pair(stage: Stage, home: str) -> Check:
    """mgcheck's server on `home`, its client on the other."""
    check = Check(stage, home, "node-b" if home == "node-a" else "node-a")
    check.more()
    return check


@pytest.mark.parametrize("home", ["node-a", "node-b"])
def test_it_comes_back_in_time(stage: Stage, machine: Machine, tmp_path: Path, home: str) -> None:
    check, cable = pair(stage, home), Cable(stage.lab)
    moving = begin(machine, check.server, "transfer", cable, tmp_path / "cut")
    try:
        wait_for("what is sent again", cable.missed)
    finally:
        cable.plug()
    said, _ = moving.communicate(timeout=200)
    assert moving.returncode == 0, said
    check.server.home = check.server.other()
    assert check.server.where() == [check.server.home]
    check.more()
    check.finish()
    stage.nothing_in_the_middle()


def test_it_stays_away(stage: Stage, machine: Machine, tmp_path: Path) -> None:
    check, cable = pair(stage, "node-a"), Cable(stage.lab)
    moving = begin(machine, check.server, "transfer", cable, tmp_path / "cut")
    try:
        said, _ = moving.communicate(timeout=200)
        assert moving.returncode == 1, said
        assert f"the connection to {HOST} was lost" in said
        assert f"{check.server.name} runs on node-a as before" in said
        assert check.server.where() == ["node-a"]
    finally:
        cable.plug()
    check.more()
    check.finish()
    stage.nothing_in_the_middle()


def test_a_source_that_is_cut_off_helps_itself(stage: Stage, machine: Machine, tmp_path: Path) -> None:
    """It needs the swarm's manager for that, so the cable comes back once it has begun to."""
    check, cable = pair(stage, "node-b"), Cable(stage.lab)
    moving = begin(machine, check.server, "transfer", cable, tmp_path / "cut")
    try:
        found = (machine.where / "run/node/migrations").glob
        wait_for("its recovery", lambda: list(found("*/recover.log")))
    finally:
        cable.plug()
    said, _ = moving.communicate(timeout=200)
    assert moving.returncode == 1, said
    check.more()
    assert check.server.where() == ["node-b"]
    check.finish()
    stage.nothing_in_the_middle()
