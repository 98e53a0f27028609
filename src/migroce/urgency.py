# SPDX-License-Identifier: BSD-3-Clause
"""Priority for the moments in which a container stands still.

A move is some dozens of short steps in several processes; on a busy machine each would wait for its turn
while peers wait for all of them. From the stop to the resume our own processes are therefore real-time
processes of the lowest priority (niceness means little between sessions, which Linux weighs as groups),
where that is permitted; the kernel keeps those from taking more than 95 % of a CPU. What they start is not,
because the runtime puts itself into the container's cgroup, where that may not be allowed: it is nicer than
others instead. MIGROCE_URGENT=0 leaves all as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIABLE = "MIGROCE_URGENT"
_PRIORITY = 1
_NICENESS = -15
_lock = threading.Lock()
_depth = 0


def begin() -> None:
    """Schedule all threads of this process before others (later ones must `join`). Calls nest."""
    global _depth
    with _lock:
        _depth += 1
        if _wanted():
            _set(os.getpid(), os.SCHED_RR, _PRIORITY)


def end() -> None:
    """Take back one `begin`; the last one lets all threads wait for their turn again."""
    global _depth
    with _lock:
        _depth = max(0, _depth - 1)
        if _depth == 0:
            _set(os.getpid(), os.SCHED_OTHER, 0)


def join() -> None:
    """Let the calling thread be as urgent as the process is: threads are born like any other."""
    with _lock:
        if _depth and _wanted():
            _set_one(0, os.SCHED_RR, _PRIORITY)


@contextlib.contextmanager
def moment() -> Iterator[None]:
    """`begin` and `end`."""
    begin()
    try:
        yield
    finally:
        end()


def command(argv: Sequence[str], *, real_time: bool = False) -> list[str]:
    """The command line that runs `argv` before others; `real_time`: as urgently as this process is.

    In real time only what ends by itself and stays out of the container's cgroup.
    """
    if _depth == 0 or not _wanted() or os.geteuid() != 0:
        return list(argv)
    if real_time and _permitted():
        return ["chrt", "--rr", str(_PRIORITY), *argv]
    return ["nice", "-n", str(_NICENESS), *argv]


@contextlib.contextmanager
def nicer() -> Iterator[None]:
    """Run what the calling thread starts meanwhile before others, for who has no process that has begun.

    What is restored gets its own niceness again; its session is not weighed any more afterwards.
    """
    if not _wanted() or os.geteuid() != 0:
        yield
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    _weigh(os.getpid(), _NICENESS)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, min(before, _NICENESS))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)
        _weigh(os.getpid(), 0)


def _permitted() -> bool:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


def boost(pid: int) -> None:
    """Weigh the session that `pid` leads before others, where sessions are weighed; see `calm`."""
    if _depth and _wanted():
        _weigh(pid, _NICENESS)


def _weigh(pid: int, niceness: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(f"{niceness}\n")


def calm(pid: int) -> None:
    """Schedule all threads of a process that `command` has started like any other; gone is fine."""
    with contextlib.suppress(OSError):
        if os.getsid(pid) == pid:
            _weigh(pid, 0)
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            if os.getpriority(os.PRIO_PROCESS, task) == _NICENESS:
                os.setpriority(os.PRIO_PROCESS, task, 0)


def children(pid: int) -> list[int]:
    """Pids of the processes that a process has started."""
    found: list[int] = []
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _wanted() -> bool:
    return os.environ.get(VARIABLE) != "0"


def _tasks(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _set(pid: int, policy: int, priority: int) -> None:
    for task in _tasks(pid):
        _set_one(task, policy, priority)


def _set_one(task: int, policy: int, priority: int) -> None:
    with contextlib.suppress(OSError):  # not permitted, or gone
        now = os.sched_getscheduler(task) & ~os.SCHED_RESET_ON_FORK
        if now in (os.SCHED_OTHER, os.SCHED_RR):  # whoever chose another one has a reason
            flag = os.SCHED_RESET_ON_FORK if policy == os.SCHED_RR else 0
            os.sched_setscheduler(task, policy | flag, os.sched_param(priority))
