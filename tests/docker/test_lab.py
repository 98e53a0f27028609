# SPDX-License-Identifier: BSD-3-Clause
"""A lab with Docker: two hosts that see each other, and nothing of them afterwards, whatever happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.stage import wait_for

from migroce.errors import LabError
from migroce.lab import docker, processes
from migroce.lab.api import Lab, remove

SHARED = ("/etc/docker", "/run/docker", "/run/containerd", "/opt/containerd")


@pytest.fixture
def name() -> Iterator[str]:
    mine = f"dl-{os.getpid()}"
    yield mine
    remove(mine)


def traces(name: str, state: Path) -> list[str]:
    """What there is of a lab on this machine."""
    found = [f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()
             if name in line]  # fmt: skip
    ours = processes.supervisors(state)
    for pid in [each for each in os.listdir("/proc") if each.isdigit()]:
        try:
            inside = name in (Path("/proc") / pid / "cgroup").read_text()
            if (inside or int(pid) in ours) and processes._lives(int(pid)):
                found.append(f"process {pid}: {(Path('/proc') / pid / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    found += [str(path) for path in Path("/run/netns").glob(f"migroce-{name}.*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/migroce/{name}")]
    return found + [str(path) for path in (state, docker._DATA / name) if path.exists()]


def test_up_used_and_down(name: str) -> None:
    before = [path for path in SHARED if Path(path).exists()]
    lab = Lab.up(name, engine="docker", release="26.1")
    again = Lab.up(name, engine="docker", release="26.1")
    assert again.docker == lab.docker
    with pytest.raises(LabError, match="is up with 2 nodes and differs"):
        Lab.up(name)
    a, b = lab.node("a"), lab.node("b")
    server = ["--network", "rdma-net", "--ip", "10.0.1.7", docker.IMAGE, "sleep", "1000"]
    a.run(["docker", "run", "-d", "--restart", "always", "--name", "box", *server])
    show = [docker.IMAGE, "ip", "-j", "address"]
    text = b.run(["docker", "run", "--rm", "--network", "rdma-net", *show]).stdout
    own = [addr["local"] for link in json.loads(text) for addr in link["addr_info"]]
    assert any(re.fullmatch(r"10\.0\.1\.(1[2-9]\d|2\d\d)", each) for each in own)  # the upper half
    pid = int(a.run(["docker", "inspect", "-f", "{{.State.Pid}}", "box"]).stdout)
    assert traces(name, lab.state) != []
    lab.down()
    assert traces(name, lab.state) == []
    assert not Path(f"/proc/{pid}").exists()
    assert [path for path in SHARED if Path(path).exists()] == before


def test_a_daemon_that_died_is_started_again_and_a_killed_lab_leaves_nothing(name: str) -> None:
    lab = Lab.up(name, engine="docker", release="20.10")
    daemon = int((lab.state / "node-b" / "docker.pid").read_text())
    os.kill(daemon, signal.SIGKILL)
    wait_for("its end", lambda: not Path(f"/proc/{daemon}").exists())
    lab = Lab.up(name, engine="docker", release="20.10")
    lab.node("b").run(["docker", "run", "--rm", "--network", "rdma-net", docker.IMAGE, "true"])
    lab.node("b").run(["docker", "run", "-d", "--network", "rdma-net", docker.IMAGE, "sleep", "1000"])
    for pid in processes.supervisors(lab.state):
        os.kill(pid, signal.SIGKILL)
    remove(name)
    assert traces(name, lab.state) == []


def test_interrupted_while_coming_up_it_leaves_nothing(name: str) -> None:
    argv = [sys.executable, "-m", "migroce", "lab", "up", "--lab", name, "--docker", "26.1"]
    for delay in (1.0, 3.0):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)  # no synchronisation: somewhere in the middle
        process.send_signal(signal.SIGINT)
        process.wait(60)
        state = Path("/run/migroce/lab") / name
        remove(name)
        assert traces(name, state) == []


def test_a_release_that_is_not_known_is_named() -> None:
    with pytest.raises(LabError, match=r"there is no Docker 'latest'; name 20\.10, 26\.1 or system"):
        docker.find("latest")
