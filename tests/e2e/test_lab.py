# SPDX-License-Identifier: BSD-3-Clause
"""The lab itself: up, down, and nothing left of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.stage import Check, Stage, wait_for

from migroce import paths
from migroce.errors import LabError, MigroceError
from migroce.lab.api import Lab, labs, remove
from migroce.migration.api import migrate

NAME = f"e2e-x{os.getpid()}"[:16]


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name, of which nothing is left afterwards whatever the test does."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    yield NAME
    remove(NAME)


def remains(name: str) -> list[str]:
    """Everything on this machine that has to do with the lab `name`."""
    found = [f"namespace {path}" for path in Path("/run/netns").glob(f"migroce-{name}.*")]
    state = paths.run_dir() / "lab" / name
    found += [f"file {path}" for path in (state, state.with_name(f".{name}.lock")) if path.exists()]
    found += [
        f"mount {line}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f"/{name}/" in line
    ]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"*/migroce/{name}")]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"migroce/{name}")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environ, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"/lab/{name}".encode() in environ + command:
                found.append(f"process {entry.name} {command!r}")
    return found


def links_and_rules() -> str:
    """The machine's own interfaces and firewall: a lab adds nothing to them."""
    show = [["ip", "-o", "link", "show"], ["nft", "list", "tables"]]
    return "".join(subprocess.run(argv, capture_output=True, text=True, check=True).stdout for argv in show)


def test_nothing_is_left_after_down_with_containers_running_and_moved(name: str) -> None:
    before = links_and_rules()
    lab = Lab.up(name)
    check = Check(Stage(lab))
    check.more(20)
    check.server.move()
    assert remains(name)
    assert links_and_rules() == before
    lab.down()
    assert remains(name) == []


def test_nothing_is_left_after_down_when_everything_was_killed_in_the_middle_of_a_move(name: str) -> None:
    lab = Lab.up(name)
    check = Check(Stage(lab))
    check.more(20)
    os.environ["MIGROCE_FAULT"] = "transfer:kill"
    command = "import sys; from migroce.migration.api import migrate; migrate(*sys.argv[1:])"
    try:
        import sys

        argv = [sys.executable, "-c", command, check.server.name, f"{name}/node-a", f"{name}/node-b"]
        assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    finally:
        del os.environ["MIGROCE_FAULT"]
    lab.close()
    for entry in remains(name):
        kind, _, rest = entry.partition(" ")
        if kind == "process":
            try:
                os.kill(int(rest.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue
    remove(name)
    assert remains(name) == []


def test_up_takes_a_lab_that_is_up_as_it_is(name: str) -> None:
    first = Lab.up(name)
    box = Stage(first).box("sleeper", "a", ["sleep", "1000"])
    again = Lab.up(name)
    assert [info["id"] for info in again.node("a").call("list")] == [box.name]
    with pytest.raises(LabError, match="differs"):
        Lab.up(name, nodes=3)
    again.close()
    first.close()


def test_up_repairs_what_a_crash_left(name: str) -> None:
    lab = Lab.up(name)
    lab.close()
    (lab.state / "lab.json").unlink()  # as if `up` had been killed
    with Lab.up(name) as again:
        assert [status.agent is not None for status in again.status()] == [True, True]


def test_an_agent_that_dies_is_started_again(name: str) -> None:
    with Lab.up(name) as lab:
        before = lab.status()[0].agent
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_for("another agent", lambda: lab.status()[0].agent not in (None, before))


def test_exec_runs_in_nodes_and_in_containers(name: str) -> None:
    with Lab.up(name, nodes=3) as lab:
        box = Stage(lab).box("box", "c", ["sleep", "1000"], ip="10.0.1.9")

        def output(target: str, *argv: str) -> str:
            return subprocess.run(
                lab.command(target, argv), capture_output=True, text=True, check=True
            ).stdout

        assert "192.168.77.3/24" in output("node-c", "ip", "-o", "-4", "addr")
        assert "10.0.1.9/24" in output(box.name, "ip", "-o", "-4", "addr")
        assert output(box.name, "hostname").strip() == box.name
        # It is a directory of the node's /run: nothing for a container to fill or change.
        assert "Read-only" in output(box.name, "sh", "-c", "touch /run/migroce/x 2>&1; true")
        with pytest.raises(MigroceError, match="no node or container"):
            lab.command("nobody", ["true"])


def test_nodes_reach_each_other_with_packets_of_full_size(name: str) -> None:
    sender = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(0, 10, 2); "
    sender += "s.settimeout(10); s.sendto(bytes(8972), ('10.0.1.2', 7)); assert len(s.recv(9000)) == 8972"
    echo = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 7))\n"
    echo += "print('up', flush=True)\n"
    echo += "while True: s.sendto(*s.recvfrom(9000))"
    with Lab.up(name) as lab:
        stage = Stage(lab)
        server = stage.box("echo", "a", ["python3", "-c", echo], ip="10.0.1.2", device=False)
        wait_for("the echo", lambda: "up" in server.log())
        client = stage.box("client", "b", ["python3", "-c", sender], ip="10.0.1.3", device=False)
        assert client.wait() == 0, client.log()


def test_a_container_that_cannot_be_made_leaves_nothing(name: str) -> None:
    with Lab.up(name) as lab:
        stage = Stage(lab)
        bad = stage.box("bad", "a", ["no-such-program"])
        assert bad.wait() == 127
        assert "no-such-program" in bad.log()
        stage.close()
        stage.box("first", "a", ["sleep", "1000"], ip="10.0.1.9", device=False)
        with pytest.raises(MigroceError, match=r"10\.0\.1\.9 is in use"):
            stage.box("second", "b", ["sleep", "1000"], ip="10.0.1.9", device=False)
        assert lab.node("b").call("list") == []
        with pytest.raises(MigroceError, match="already"):
            lab.create(stage.boxes[-1].name, "a", ["sleep", "1"])


def test_migrating_what_is_not_there_says_what_is(name: str) -> None:
    with Lab.up(name) as lab:
        with pytest.raises(MigroceError, match="has no container nobody"):
            migrate("nobody", lab.node("a"), lab.node("b"))
        assert name in labs()
