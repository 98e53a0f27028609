# SPDX-License-Identifier: BSD-3-Clause
"""Containers move while a program checks every message they exchange."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.stage import Check, Stage, built, wait_for

from migroce import urgency


def test_the_server_moves_and_moves_back_and_no_message_is_wrong(stage: Stage) -> None:
    check = Check(stage, polling=True)
    for _ in range(2):
        check.more()
        report = check.server.move()
        assert report.contexts == 1
        assert report.qps == 4
        assert report.warnings == []
        check.more()
        assert check.server.where() == [check.server.home]
    assert check.server.home == "node-a"
    check.finish()


def test_nothing_of_a_moved_container_is_scheduled_otherwise_than_before(stage: Stage) -> None:
    """What was done in a hurry for it has left no priority, neither here nor there."""
    check = Check(stage)
    check.more()
    check.server.move()
    pid = check.server.info()["pid"]
    monitor = int((check.server.node.context.bundle(check.server.name) / "monitor.pid").read_text())
    for node in stage.lab.nodes.values():
        assert os.sched_getscheduler(node.call("agent", method="status")["pid"]) == os.SCHED_OTHER
    family = [pid, monitor, *urgency.children(pid), *urgency.children(monitor)]
    tasks = [int(task) for each in family for task in os.listdir(f"/proc/{each}/task")]
    assert {os.sched_getscheduler(task) for task in tasks} == {os.SCHED_OTHER}
    # The tests themselves may run nicely, and so may all that they start.
    niceness = {os.getpriority(os.PRIO_PROCESS, task) for task in tasks}
    assert niceness <= {0, os.getpriority(os.PRIO_PROCESS, 0)}
    check.more()
    check.finish()


def test_the_client_moves(stage: Stage) -> None:
    check = Check(stage)
    check.more()
    check.client.move()
    check.more()
    check.finish()


def test_both_ends_move_at_the_same_time(stage: Stage) -> None:
    check = Check(stage)
    check.more()
    with ThreadPoolExecutor(2) as pool:
        reports = [each.result() for each in [pool.submit(box.move) for box in (check.server, check.client)]]
    assert [report.qps for report in reports] == [4, 4]
    assert (check.server.home, check.client.home) == ("node-b", "node-a")
    check.more()
    check.finish()


def test_an_idle_connection_moves_and_then_carries_messages(stage: Stage) -> None:
    check = Check(stage, "a", "b", "--idle-until", "/go")
    wait_for("a connected client", lambda: check.state(check.client) == "idle")
    check.server.move()
    check.client.move()
    check.client.file("/go").touch()
    check.more()
    check.finish()


@pytest.mark.parametrize("direction", ["--one-way", "--reverse"])
def test_one_way_traffic_moves(stage: Stage, direction: str) -> None:
    check = Check(stage, "a", "b", direction)
    check.more()
    check.server.move()
    check.more()
    check.client.move()
    check.more()
    check.finish()


def test_sixteen_qps_of_three_processes_in_one_container_move(stage: Stage) -> None:
    # A shell starts two servers in one container; clients in another.
    from tests.e2e.stage import built

    program = "/usr/local/bin/mgcheck"
    files = {program: str(built("tests/workload/mgcheck"))}
    common = f"{program} --rate 200 --stall 60 --events"
    ports = (18515, 18516, 18517)
    servers = "; ".join(f"{common} -p {port} --progress /p{port} & a{port}=$!" for port in ports)
    waits = "; ".join(f"wait $a{port} || exit 1" for port in ports)
    server = stage.box("servers", "a", ["sh", "-c", f"{servers}; {waits}"], files=files)
    for port in ports:
        wait_for(f"server {port}", lambda port=port: server.file(f"/p{port}").exists())
    client = stage.box("clients", "b", ["sleep", "1000"], files=files)
    clients = []
    for port, qps in zip(ports, (5, 5, 6), strict=True):
        argv = [*common.split(), "--seconds", "600", "-p", str(port), "--qps", str(qps), server.ip]
        clients.append(subprocess.Popen(stage.lab.command(client.name, argv), stdout=subprocess.PIPE))
    wait_for("all QPs", lambda: len(server.qps()) == 16)
    server.wait_for_traffic()
    report = server.move()
    assert (report.contexts, report.qps) == (3, 16)
    server.wait_for_traffic()
    # The servers end with their clients; told themselves, they might be gone already.
    subprocess.run(stage.lab.command(client.name, ["pkill", "-TERM", "mgcheck"]), check=True)
    for process in clients:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert json.loads(out.splitlines()[-1])["errors"] == 0
    assert server.wait() == 0, server.log()


@pytest.mark.slow
def test_ten_moves_in_one_run(stage: Stage) -> None:
    check = Check(stage)
    for turn in range(10):
        check.more(50)
        (check.server if turn % 3 else check.client).move()
    check.more()
    check.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--new-api", "--cq", "per-qp"), ("--qps", "64"), ("--no-tcp-after-setup",)]
)
def test_other_ways_to_use_the_device_move_too(stage: Stage, options: tuple[str, ...]) -> None:
    check = Check(stage, "a", "b", *options)
    check.more()
    check.server.move()
    check.more()
    check.client.move()
    check.more()
    check.finish()


@pytest.mark.slow
def test_many_threads_children_and_qps_in_every_state_move(stage: Stage) -> None:
    """64 threads that poll; children that are born and end meanwhile; one with copies of everything."""
    program = "/usr/local/bin/crowd"
    files = {program: str(built("tests/workload/crowd"))}
    box = stage.box("crowd", "a", [program, "64", "/stop"], files=files)
    wait_for("its QPs", lambda: len(box.qps()) == 2 * 64 + 6)
    for _ in range(4):
        box.wait_for_traffic()
        report = box.move()
        assert (report.qps, report.warnings) == (2 * 64 + 6, [])
    box.wait_for_traffic()
    box.file("/stop").touch()
    assert box.wait() == 0, box.log()
    assert int(box.log().split()[0]) > 64
