# SPDX-License-Identifier: BSD-3-Clause
"""A gate before a restore: Docker starts the container while its images are still on their way.

The engine's driver makes the file and locks it (flock), has `docker start --checkpoint` begin, and opens the
gate when the images are whole. Meanwhile Docker attaches the network and migroce-runtime comes this far.
A driver that gives up, or dies, lets go of the lock without having opened: the restore fails.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from migroce.errors import MigroceError

_OPEN = b"open"


class Gate:
    """The driver's end of it."""

    def __init__(self, path: Path) -> None:
        """Make a shut gate at `path`. Raises OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let the restore go on; once. Raises OSError."""
        os.write(self._fd, _OPEN)
        self.give_up()

    def give_up(self) -> None:
        """Let a restore that waits fail, if the gate is still shut."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def wait(path: Path) -> None:
    """Wait until the gate at `path` is open; no file, no gate. Raises MigroceError if it stays shut."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.read(fd, len(_OPEN)) != _OPEN:
            raise MigroceError("the move was given up before the images were here")
    finally:
        os.close(fd)
