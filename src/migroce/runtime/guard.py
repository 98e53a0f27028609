# SPDX-License-Identifier: BSD-3-Clause
"""Undoes what a killed process cannot undo itself.

An engine that dies, or loses patience, has its calls of the runtime killed. A container whose RDMA contexts
were stopped for a checkpoint must not stay stopped then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable


class Guard:
    """A child that calls `undo` once this process and those that it started are gone without `release`."""

    def __init__(self, undo: Callable[[], None]) -> None:
        read, self._write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._write)
                os.setsid()
                null = os.open(os.devnull, os.O_RDWR)
                for number in (0, 1, 2):  # the engine waits for the ends of its pipes
                    os.dup2(null, number)
                if not os.read(read, 1):
                    undo()
            finally:
                os._exit(0)
        os.close(read)
        os.set_inheritable(self._write, True)  # runc below us counts: it works on the container

    def release(self) -> None:
        """All is in order: nothing to undo."""
        if self._write >= 0:
            with contextlib.suppress(OSError):
                os.write(self._write, b".")
            os.close(self._write)
            self._write = -1
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
