# SPDX-License-Identifier: BSD-3-Clause
"""Unix sockets at paths of any length, without a moment in which they exist and do not work."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_BACKLOG = 256


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """The path in a form that fits a socket address (107 bytes), however long it is."""
    if len(os.fsencode(path)) <= 107:
        yield str(path)
        return
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def bind_unix(path: Path, kind: int, mode: int) -> socket.socket:
    """A listening unix socket in place of whatever file is there, ready once it is seen. Raises OSError."""
    early = path.with_name(f".{path.name}")
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        early.unlink(missing_ok=True)
        with short_path(early) as short:
            sock.bind(short)
        early.chmod(mode)
        sock.listen(_BACKLOG)
        early.rename(path)
    except BaseException:
        sock.close()
        raise
    return sock
