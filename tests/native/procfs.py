# SPDX-License-Identifier: BSD-3-Clause
"""What /proc tells about a program under test."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

_READ = {"x86_64": "0", "aarch64": "63"}


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
