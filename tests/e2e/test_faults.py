# SPDX-License-Identifier: BSD-3-Clause
"""Whatever fails at whatever step: the container runs on exactly one node and no message is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.stage import Box, Check, Stage, wait_for

from migroce.errors import MigrationError, MigroceError
from migroce.migration.journal import PHASES
from migroce.migration.report import Event

SEEN_THROUGH = ("resume", "resume.end", "commit", "commit.end")
"""Faults after the point of no return: the move is finished."""
POINTS = [point for phase in PHASES for point in (phase, f"{phase}.end")]
QUICK = ("stop.end", "dump.end", "restore", "resume", "commit")


def points(quick: tuple[str, ...]) -> list[object]:
    """All fault points, those not quick marked slow."""
    return [point if point in quick else pytest.param(point, marks=pytest.mark.slow) for point in POINTS]


def settled(check: Check, box: Box) -> str:
    """The one node that `box` runs on, when nothing is in the middle of anything any more."""

    def over() -> bool:
        return all(each["ended"] for node in box.lab.nodes.values() for each in node.call("journals"))

    wait_for("the end of the recovery", over)
    wait_for("one running container", lambda: len(box.where()) == 1)
    (box.home,) = box.where()
    check.more()
    for node in box.lab.nodes.values():
        known = [info for info in node.call("list") if info["id"] == box.name]
        assert len(known) == (node.name == box.home)
    return box.home


@pytest.mark.parametrize("point", points(QUICK))
def test_a_failing_step_is_undone_or_seen_through(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    check = Check(stage)
    check.more(20)
    monkeypatch.setenv("MIGROCE_FAULT", point)
    if point in SEEN_THROUGH:
        report = check.server.move()
        assert point.split(".")[0] in report.warnings[0]
    else:
        with pytest.raises(MigrationError) as caught:
            check.server.move("node-b")
        assert caught.value.running_on == "node-a"
        assert caught.value.step == point
        check.server.home = "node-a"
    monkeypatch.delenv("MIGROCE_FAULT")
    assert settled(check, check.server) == ("node-b" if point in SEEN_THROUGH else "node-a")
    check.server.move()  # nothing is in the way of the next
    check.more()
    check.finish()


_COMMAND = "import sys; from migroce.migration.api import migrate; migrate(*sys.argv[1:])"


@pytest.mark.parametrize("point", points(("dump", "transfer.end", "resume.end")))
def test_a_killed_command_is_recovered(stage: Stage, point: str) -> None:
    check = Check(stage)
    check.more(20)
    name, lab = check.server.name, stage.lab.name
    env = {**os.environ, "MIGROCE_FAULT": f"{point}:kill"}
    argv = [sys.executable, "-c", _COMMAND, name, f"{lab}/node-a", f"{lab}/node-b"]
    assert subprocess.run(argv, env=env, check=False).returncode == -signal.SIGKILL
    expected = "node-b" if point in SEEN_THROUGH else "node-a"
    assert settled(check, check.server) == expected
    check.finish()


def processes(*words: str) -> list[int]:
    """Pids of processes whose command line has all of `words` as parts of arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                shell = argv[0].endswith("/sh")  # supervisors and monitors name what they run
                if not shell and all(any(word in arg for arg in argv) for word in words):
                    found.append(int(entry.name))
    return found


def kill(pids: list[int]) -> None:
    """Kill them all, at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def agent_of(node: str) -> Callable[[Stage], list[int]]:
    """The agent of a node."""
    return lambda stage: processes(
        "migroce.agent", str(stage.lab.node(node).context.agent.parent), "--run-dir"
    )


def worker_of(node: str) -> Callable[[Stage], list[int]]:
    """The worker of a node that belongs to this process."""
    return lambda stage: [stage.lab.node(node).worker().pid]


VICTIMS = {
    "source agent": agent_of("a"),
    "destination agent": agent_of("b"),
    "source worker": worker_of("a"),
    "destination worker": worker_of("b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_helper_does_not_lose_the_container(stage: Stage, victim: str, phase: str) -> None:
    check = Check(stage)
    check.more(20)

    def strike(event: Event) -> None:
        if (event.phase, event.state) == (phase, "start"):
            pids = VICTIMS[victim](stage)
            assert pids
            kill(pids)

    with contextlib.suppress(MigroceError):
        check.server.move("node-b", strike)
    settled(check, check.server)
    check.finish()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["runc", "criu"])
@pytest.mark.parametrize("phase", ["dump", "restore"])
def test_killed_runc_or_criu_is_undone(stage: Stage, phase: str, program: str) -> None:
    check = Check(stage)
    check.more(20)
    node = stage.lab.node("a" if phase == "dump" else "b").context
    before = PHASES[PHASES.index(phase) - 1]
    command = {"dump": "checkpoint", "restore": "restore"}[phase]
    wanted = ["runc", str(node.runc_root), command] if program == "runc" else ["criu", "swrk"]
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from tests.e2e.test_faults import kill, processes\n"
        "print('ready', flush=True)\n"
        "last = time.monotonic() + 60\n"
        "while time.monotonic() < last:\n"
        "    if pids := processes(*sys.argv[2:]):\n"
        "        kill(pids)\n"
        "        last = time.monotonic() + 0.5  # the runtime asks CRIU for its version first\n"
    )
    root = str(Path(__file__).resolve().parent.parent.parent)
    killer: list[subprocess.Popen[str]] = []

    def strike(event: Event) -> None:
        if (event.phase, event.state) == (before, "start"):
            argv = [sys.executable, "-c", script, root, *wanted]
            killer.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
            assert killer[0].stdout is not None
            assert killer[0].stdout.readline() == "ready\n"

    with pytest.raises(MigrationError) as caught:
        check.server.move("node-b", strike)
    killer[0].communicate(timeout=90)
    assert caught.value.running_on == "node-a"
    assert caught.value.step == phase
    check.server.home = "node-a"
    assert settled(check, check.server) == "node-a"
    check.finish()


def test_the_destination_s_address_in_use_is_refused_before_anything_stops(stage: Stage) -> None:
    check = Check(stage)
    taken = stage.box("taken", "b", ["sleep", "1000"], device=False)
    ip = check.server.ip
    script = f"ip addr add {ip}/24 dev eth0"
    netns = stage.lab.node("b").context.container_netns(taken.name)
    subprocess.run(["nsenter", f"--net={netns}", "sh", "-c", script], check=True)
    events: list[Event] = []
    with pytest.raises(MigroceError, match=f"{ip} is in use"):
        check.server.move("node-b", events.append)
    check.server.home = "node-a"
    assert {event.phase for event in events} == {"check"}
    subprocess.run(
        ["nsenter", f"--net={netns}", "sh", "-c", script.replace("addr add", "addr del")], check=True
    )
    check.finish()


def test_a_network_with_a_smaller_mtu_is_refused_before_anything_stops(stage: Stage) -> None:
    check = Check(stage)
    node = stage.lab.node("b")
    events: list[Event] = []
    dataclasses.replace(node.context, mtu=1500).save()
    node.close()  # its worker has read the old one
    try:
        with pytest.raises(MigroceError, match="node-b's network carries packets of 1500 bytes"):
            check.server.move("node-b", events.append)
    finally:
        node.context.save()
        node.close()
    check.server.home = "node-a"
    assert {event.phase for event in events} == {"check"}
    check.server.move("node-b")
    check.finish()


def test_an_unknown_node_is_refused_with_the_names_of_those_there_are(stage: Stage) -> None:
    from migroce.migration.api import migrate

    with pytest.raises(MigroceError, match="node-a"):
        migrate("whatever", "node-a" if len(stage.lab.nodes) == 0 else f"{stage.lab.name}/node-a", "node-x")


def test_a_full_disk_on_the_destination_is_undone(stage: Stage) -> None:
    check = Check(stage)
    check.more(20)
    bundles = stage.lab.node("b").context.bundles
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "full", str(bundles)], check=True)
    try:
        with pytest.raises(MigrationError) as caught:
            check.server.move("node-b")
    finally:
        subprocess.run(["umount", "-l", str(bundles)], check=True)
    check.server.home = "node-a"
    assert "No space left" in caught.value.reason
    assert settled(check, check.server) == "node-a"
    check.finish()


def test_a_destination_whose_runtime_fails_is_undone(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(stage)
    check.more(20)
    runc = tmp_path / "runc"
    runc.write_text("#!/bin/sh\necho 'level=error msg=\"this runtime is broken\"' >&2\nexit 1\n")
    runc.chmod(0o755)
    node = stage.lab.node("b")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    node.close()  # its next worker finds the broken runtime
    with pytest.raises(MigrationError, match="this runtime is broken") as caught:
        check.server.move("node-b")
    monkeypatch.undo()
    node.close()
    check.server.home = "node-a"
    assert caught.value.step == "restore"
    assert settled(check, check.server) == "node-a"
    check.finish()
