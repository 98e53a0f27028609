# SPDX-License-Identifier: BSD-3-Clause
"""What /proc tells about a program under test."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

LISTENING = "0A"
"""TCP_LISTEN in /proc/net/tcp."""
_READ = {"x86_64": "0", "aarch64": "63"}
_PPOLL = {"x86_64": "271", "aarch64": "73"}  # poll is that, too (native/verbs/waits.c)


def listens(*ports: int, of: int | str = "thread-self") -> bool:
    """Whether a TCP socket listens on one of `ports` in a process's network namespace (False: it is gone)."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{of}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            return False
        for line in lines:
            _, local, _, state, *_ = line.split()
            if state == LISTENING and int(local.rpartition(":")[2], 16) in ports:
                return True
    return False


def waits_for_events(pid: int) -> bool:
    """Whether a thread is blocked reading an eventfd: a server on rdma_cm does that once it listens."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, ValueError):
            number, *arguments = (task / "syscall").read_text().split()
            if number == _READ[platform.machine()]:
                target = (task / "fd" / str(int(arguments[0], 16))).readlink()
                if "eventfd" in str(target):
                    return True
    return False


def polls(pid: int) -> list[int]:
    """Of how many descriptors each of its threads waits in poll, the library's own thread aside."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, ValueError):
            number, _, descriptors, *_ = (task / "syscall").read_text().split()
            if number == _PPOLL[platform.machine()] and (task / "comm").read_text().strip() != "migroce":
                found.append(int(descriptors, 16))
    return found


def polls_a_listener(pid: int) -> bool:
    """Whether a server on rsockets listens: librdmacm's thread then polls the id beside its socket."""
    return any(descriptors >= 2 for descriptors in polls(pid))
