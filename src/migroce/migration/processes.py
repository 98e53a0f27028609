# SPDX-License-Identifier: BSD-3-Clause
"""What of a container's processes CRIU cannot take along, said before anything stops."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from migroce import urgency
from migroce.errors import EngineError

_STEPS = 10_000
"""Parents looked at, beginning again where one ended meanwhile; then nobody is accused."""


def check(container: str, init: int, users: Iterable[int] = ()) -> None:
    """Refuse processes that are traced, stopped, or not `init`'s own. Raises EngineError.

    `init`: the container's first process, `users`: those that have the device open. CRIU dumps `init` and its
    descendants. A process that `runc exec` or nsenter has put beside them would silently be left behind.
    """
    tree = descendants(init)
    for pid in tree:
        tracer = int(_status(pid).get("TracerPid", "0"))
        if tracer:
            reason = f"{_name(pid)} of {container} is traced by {_name(tracer)}"
            raise EngineError("check", reason, "let the tracer detach first")
    for pid in set(users) & set(tree):
        if _status(pid).get("State", "").startswith("T"):
            reason = f"{_name(pid)} of {container} is stopped by a signal and cannot stop its queue pairs"
            raise EngineError("check", reason, f"continue it first: kill -CONT {pid}")
    strangers = [pid for pid in _in_namespace(init) if not _descends(pid, init)]
    if strangers:
        names = ", ".join(_name(pid) for pid in strangers[:5])
        reason = f"{container} has processes that were put into it from outside: {names}"
        raise EngineError("check", reason, "they cannot move along: end what was started by exec or nsenter")


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:
        found += urgency.children(each)
    return found


def _descends(pid: int, init: int) -> bool:
    """Whether a process of `init`'s namespace descends from it, by its parents; one that is gone does."""
    own, at = _namespace(init), pid
    for _ in range(_STEPS):
        if at == init:
            return True
        status = _status(at)
        parent = int(status.get("PPid", "0"))
        there = _namespace(parent) if parent else ""
        if not status and at == pid:
            return True
        if there == own:
            at = parent
        elif not status or there is None:  # an ancestor has just ended, and `init` adopts its children
            at = pid
        else:
            return False
    return True


def _in_namespace(init: int) -> list[int]:
    """Processes in the PID namespace of `init`, if it has one of its own; none that are only to be reaped."""
    own = _namespace(init)
    if own is None or own == _namespace(os.getpid()):
        return []
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    there = [pid for pid in pids if _namespace(pid) == own]
    return [pid for pid in there if not _status(pid).get("State", "Z").startswith("Z")]


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _status(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty if it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def _name(pid: int) -> str:
    return f"{_status(pid).get('Name', 'a process')} (pid {pid})"
