# SPDX-License-Identifier: BSD-3-Clause
"""Network namespaces and processes: entering, naming, telling whether one is still there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from migroce.agent.errors import AgentError, errno_name

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000

NetnsKey = tuple[int, int]
"""Device and inode of a namespace: its identity while anything holds it."""


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    native = getattr(os, "setns", None)  # Python 3.12
    if native is not None:
        native(fd, _CLONE_NEWNET)
    elif _libc().setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def key_of(fd: int) -> NetnsKey:
    """The identity of an open namespace."""
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


@lru_cache(maxsize=1)
def own_key() -> NetnsKey:
    """The identity of the agent's own namespace."""
    info = Path("/proc/self/ns/net").stat()
    return info.st_dev, info.st_ino


def open_path(path: str) -> int:
    """Open a namespace by path. AgentError names the path."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise AgentError(f"network namespace {path}: {e.strerror}", errno_name(e.errno)) from None
    if os.readlink(f"/proc/self/fd/{fd}").startswith("net:["):
        return fd
    if os.fstat(fd).st_dev == own_key()[0]:  # bind-mounted: the link shows the path, the device is nsfs
        return fd
    os.close(fd)
    raise AgentError(f"{path} is not a network namespace", "EINVAL")


def open_pid(pid: int) -> int:
    """Open a process's namespace; the agent's own when it cannot be looked at. AgentError: gone."""
    if pid <= 0:
        return open_path("/proc/self/ns/net")
    try:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return open_path("/proc/self/ns/net")
    except OSError as e:
        raise AgentError(f"process {pid} is gone", errno_name(e.errno)) from None


def run_in(fd: int | None, work: Callable[[], T]) -> T:
    """Call `work` inside a namespace (None: here), in a thread made for it that ends thereafter."""
    if fd is None or key_of(fd) == own_key():
        return work()
    result: list[T] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            _setns(fd)
            result.append(work())
        except BaseException as e:  # noqa: BLE001 - handed to the caller below
            error.append(e)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def start_time(pid: int) -> int:
    """When a process started (clock ticks since boot), 0 when there is none: with the pid, its identity."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
        fields = text[text.rindex(b")") + 2 :].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0


def is_alive(pid: int, start: int) -> bool:
    """Whether that very process is still running."""
    return pid > 0 and start != 0 and start_time(pid) == start


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process is dead; None when it cannot be had."""
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return None
