# SPDX-License-Identifier: BSD-3-Clause
"""Freeze and thaw a container's cgroup directly.

CRIU polls the freezer every 100 ms; a cgroup that is frozen beforehand it takes as it is, and leaves
frozen after a dump with --leave-running. So the source stays as it was until the destination runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from migroce.errors import EngineError

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine(), 272)
_KCMP_VM = 1


def _share_memory(one: int, other: int) -> bool:
    return int(_libc.syscall(_SYS_KCMP, one, other, _KCMP_VM, 0, 0)) == 0


@dataclass(frozen=True, slots=True)
class Freezer:
    """The freezer of one container's cgroup, of either version."""

    directory: Path
    v2: bool

    @classmethod
    def of(cls, paths: dict[str, str]) -> Freezer:
        """From `cgroup_paths` of runc's state. Raises EngineError."""
        if "freezer" in paths:
            return cls(Path(paths["freezer"]), v2=False)
        if "" in paths:
            return cls(Path(paths[""]), v2=True)
        raise EngineError(
            "freeze", "the container has no freezer cgroup", "mount the freezer controller or cgroup v2"
        )

    def _write(self, frozen: bool) -> None:
        if self.v2:
            (self.directory / "cgroup.freeze").write_text("1" if frozen else "0")
        else:
            (self.directory / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def frozen(self) -> bool:
        """Whether everything in it stands still. Raises OSError."""
        if self.v2:
            return "frozen 1" in (self.directory / "cgroup.events").read_text()
        return (self.directory / "freezer.state").read_text().strip() == "FROZEN"

    def freeze(self, timeout: float = 10.0) -> None:
        """Freeze and wait until it is. Raises EngineError; then nothing is frozen.

        A process frozen in the middle of vfork could not be dumped (its parent waits uninterruptibly until it
        has executed something): such a moment is let pass.
        """
        end = time.monotonic() + timeout
        try:
            self._freeze_once(end)
            enough = time.monotonic() + 1.0  # for those that mean to share it for good
            while self._in_vfork() and time.monotonic() < enough:
                self._write(False)
                time.sleep(0.001)
                self._freeze_once(end)
        except OSError as exc:
            self.thaw()
            raise EngineError("freeze", f"{exc.filename}: {exc.strerror}") from exc
        except EngineError:
            self.thaw()
            raise

    def _freeze_once(self, end: float) -> None:
        self._write(True)
        again = time.monotonic() + 0.01
        while not self.frozen():
            if time.monotonic() > end:
                raise EngineError("freeze", "the container does not freeze")
            time.sleep(0.0003)
            if time.monotonic() > again:  # version 1 may miss a task that was just being born
                self._write(True)
                again = time.monotonic() + 0.01

    def _in_vfork(self) -> bool:
        """Whether a process in it still lives in its parent's memory."""
        pids = {int(pid) for pid in (self.directory / "cgroup.procs").read_text().split()}
        for pid in pids:
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text()
                parent = int(stat[stat.rindex(")") + 2 :].split()[1])
                if parent in pids and _share_memory(parent, pid):
                    return True
        return False

    def thaw(self) -> None:
        """Let it run; a cgroup that is gone is fine."""
        with contextlib.suppress(OSError):
            self._write(False)


def _everywhere(name: str) -> list[Path]:
    """The cgroup `name` (relative) in every hierarchy that has it."""
    base = Path("/sys/fs/cgroup")
    return [root / name for root in (base, *base.glob("*/")) if (root / name).is_dir()]


def destroy(name: str, timeout: float = 5.0) -> None:
    """Kill what is in the cgroup `name` and below, in every hierarchy, and remove it; not there is fine.

    For what the runtime does not know: a restore that was killed in the middle.
    """
    end = time.monotonic() + timeout
    while (groups := _everywhere(name)) and time.monotonic() < end:
        for group in groups:
            for each in _innermost_first(group):
                with contextlib.suppress(OSError):
                    for pid in (each / "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    (each / "freezer.state").write_text("THAWED")
        remove_empty(name)
        time.sleep(0.002)


def remove_empty(name: str) -> None:
    """Remove the cgroup `name` and those below it as far as they are empty."""
    for group in _everywhere(name):
        for each in _innermost_first(group):
            with contextlib.suppress(OSError):
                each.rmdir()


def _innermost_first(group: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(group.glob("**/"), reverse=True)
    return []
