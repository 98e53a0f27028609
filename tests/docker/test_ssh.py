# SPDX-License-Identifier: BSD-3-Clause
"""A Docker host that is reached by ssh or by a docker context, as one that knows nothing of a lab: node-b."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.docker.footprint import footprint
from tests.docker.machine import HOST, Machine
from tests.docker.stage import Check, Stage
from tests.docker.test_bad_input import same


def test_there_and_back_by_ssh_and_by_a_docker_context(stage: Stage, machine: Machine) -> None:
    check = Check(stage)
    check.more()
    for way in (f"ssh://root@{HOST}", "other"):
        for home in ("node-b", "node-a"):
            assert machine.move(check.server, way) == ""
            assert check.server.where() == [home]
            check.more()
    check.finish()
    stage.nothing_in_the_middle()


def test_what_is_wrong_with_a_machine_is_said_and_nothing_happens(stage: Stage, machine: Machine) -> None:
    box = stage.counter("a")
    before = footprint(stage.lab)
    keys = machine.keys
    for way in (f"ssh://root@{HOST}", "other"):
        keys.know(host=None)
        assert "its host key is not known here; log in once by hand" in machine.move(box, way)
        keys.know(user="other-user")
        assert "it does not let us in" in machine.move(box, way)
        keys.know()
    wrong = machine.where / "python"
    wrong.write_text('#!/bin/sh\nunset PYTHONPATH\nexec /usr/bin/python3 -I -S "$@"\n')
    wrong.chmod(0o755)
    said = machine.move(box, f"ssh://root@{HOST}?python={wrong}")
    assert "/usr/bin/python3 there has no migroce; install it there" in said
    wrong.write_text('#!/bin/sh\nexec setpriv --reuid 65534 --regid 65534 --clear-groups "$0.real" "$@"\n')
    wrong.with_name("python.real").symlink_to(sys.executable)
    said = machine.move(box, f"ssh://root@{HOST}?python={wrong}")
    assert HOST in said
    assert "root" in said
    tcp = ["docker", "context", "create", "far", "--docker", "host=tcp://192.0.2.1:2375"]
    stage.lab.node("a").run(tcp, env={"DOCKER_CONFIG": str(machine.where / "config")})
    assert "docker context far reaches Docker by tcp only" in machine.move(box, "far")
    box.counts_on()
    same(stage, before)


def test_a_connection_that_is_cut(stage: Stage, machine: Machine) -> None:
    """The sshd's sessions are killed while the container stands still."""
    box = stage.counter("a")
    before = footprint(stage.lab)
    script = (
        "import os, sys\nfrom migroce.migration.api import migrate\n"
        "name, source, to, pid = sys.argv[1:]\n"
        "def strike(event):\n"
        "    if (event.phase, event.state) == ('transfer', 'start'):\n"
        "        for child in open(f'/proc/{pid}/task/{pid}/children').read().split():\n"
        "            os.kill(int(child), 9)\n"
        "migrate(name, source, to, strike)\n"
    )
    env = {"PATH": f"{machine.keys.bin}:{os.environ['PATH']}"}
    args = [box.name, f"{stage.lab.name}/node-a", f"ssh://root@{HOST}", str(machine.sshd.process.pid)]
    argv = stage.lab.node("a").command([sys.executable, "-c", script, *args], env)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert f"{box.name} runs on node-a as before" in done.stderr
    assert box.where() == ["node-a"]
    box.counts_on()
    same(stage, before)
