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


@contextlib.contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def bind_unix(path: Path, kind: int, mode: int) -> socket.socket:
    """A listening unix socket in place of whatever file is there, ready once it is seen. Raises OSError.

    The directory may be one that a container writes to: the file is made with its mode, as changing it
    afterwards would go to wherever a link leads that has been put in its place.
    """
    early = path.with_name(f".{path.name}")
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        early.unlink(missing_ok=True)
        os.fchmod(sock.fileno(), mode)  # what bind(2) gives the file, less the umask
        with short_path(early) as short, _no_umask():
            sock.bind(short)
        sock.listen(_BACKLOG)
        early.rename(path)
    except BaseException:
        sock.close()
        raise
    return sock
