# SPDX-License-Identifier: BSD-3-Clause
"""Priority while a container stands still, and none left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from migroce import urgency


def _may() -> bool:
    code = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _may(), reason="real-time scheduling is not permitted here")


def _policy(task: int = 0) -> int:
    return os.sched_getscheduler(task) & ~os.SCHED_RESET_ON_FORK


SAY = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0))"]


def _child(argv: list[str]) -> tuple[int, int]:
    """Policy and niceness of a child."""
    out = subprocess.run(argv, capture_output=True, check=True, text=True).stdout.split()
    return int(out[0]), int(out[1])


def test_all_threads_go_first_until_the_last_end() -> None:
    go, ready = threading.Event(), threading.Event()
    ids: list[int] = []

    def wait() -> None:
        ids.append(threading.get_native_id())
        ready.set()
        go.wait()

    other = threading.Thread(target=wait)
    other.start()
    ready.wait()
    tasks = [os.getpid(), ids[0]]
    urgency.begin()
    urgency.begin()
    assert [_policy(task) for task in tasks] == [os.SCHED_RR] * 2
    urgency.end()
    assert _policy(ids[0]) == os.SCHED_RR
    urgency.end()
    assert [_policy(task) for task in tasks] == [os.SCHED_OTHER] * 2
    urgency.end()  # one too many is none
    go.set()
    other.join()


def test_a_thread_that_is_born_meanwhile_joins() -> None:
    said: list[int] = []

    def work() -> None:
        said.append(_policy())
        urgency.join()
        said.append(_policy())

    for begun in (True, False):
        with urgency.moment() if begun else contextlib.nullcontext():
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert said == [os.SCHED_OTHER, os.SCHED_RR, os.SCHED_OTHER, os.SCHED_OTHER]


def test_children_are_nicer_only_if_they_are_to_and_only_meanwhile() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with urgency.moment():
        assert _child(SAY)[0] == os.SCHED_OTHER
        assert _child(urgency.command(SAY)) == (os.SCHED_OTHER, -15)
        assert _child(urgency.command(SAY, real_time=True))[0] == os.SCHED_RR
    assert urgency.command(SAY, real_time=True) == SAY
    assert _child(SAY) == (os.SCHED_OTHER, own)


def test_a_child_is_calmed_and_who_chose_its_niceness_itself_is_not() -> None:
    with urgency.moment():
        child = subprocess.Popen(urgency.command(["sleep", "1000"]))
        other = subprocess.Popen(["nice", "-n", "3", "sleep", "1000"])
    for each in (child, other):  # each has its niceness once it has become what it is to be
        while Path(f"/proc/{each.pid}/comm").read_text() != "sleep\n":
            os.sched_yield()
    assert {child.pid, other.pid} <= set(urgency.children(os.getpid()))
    niceness = os.getpriority(os.PRIO_PROCESS, other.pid)
    for each in (child, other):
        urgency.calm(each.pid)
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 0
    assert os.getpriority(os.PRIO_PROCESS, other.pid) == niceness
    for each in (child, other):
        each.kill()
        each.wait()
        urgency.calm(each.pid)  # gone is fine


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(urgency.VARIABLE, "0")
    with urgency.moment():
        assert _policy() == os.SCHED_OTHER


def test_what_the_runtime_starts_is_nicer_and_its_session_weighed_only_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = Path("/proc/self/autogroup")
    code = (
        "import os, subprocess, sys; from migroce import urgency\n"
        "def say():\n"
        f"    out = subprocess.run({SAY!r}, capture_output=True, text=True).stdout.split()[1]\n"
        f"    path = {str(weight)!r}\n"
        "    print(out, open(path).read().split()[-1] if os.path.exists(path) else '-')\n"
        "say()\n"
        "with urgency.nicer(): say()\n"
        "say()\n"
    )

    def said() -> list[list[str]]:
        out = subprocess.run(
            ["setsid", "-w", sys.executable, "-c", code],
            capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        return [line.split() for line in out.splitlines()]

    none, first = ("0", "-15") if weight.exists() else ("-", "-")
    assert said() == [["0", none], ["-15", first], ["0", none]]
    monkeypatch.setenv(urgency.VARIABLE, "0")
    assert said() == [["0", none]] * 3
