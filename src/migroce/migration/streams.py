# SPDX-License-Identifier: BSD-3-Clause
"""Data between nodes: unix sockets, a stream of flat files (images, dumps), a pump between sockets."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

_SUN_PATH = 100  # of 108; longer paths are reached through a directory descriptor
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 16


def _short(path: str) -> tuple[str, int | None]:
    if len(path.encode()) <= _SUN_PATH:
        return path, None
    fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    return f"/proc/self/fd/{fd}/{os.path.basename(path)}", fd


def connect_unix(path: str) -> socket.socket:
    """Connect to the stream socket at `path`, however long. Raises OSError."""
    short, fd = _short(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _CHUNK)
        sock.connect(short)
    except OSError:
        sock.close()
        raise
    finally:
        if fd is not None:
            os.close(fd)
    return sock


def listen_unix(path: str) -> socket.socket:
    """Listen at `path`, for root only. Raises OSError."""
    short, fd = _short(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(short)
        os.chmod(path, 0o600)
        sock.listen(8)
    except OSError:
        sock.close()
        raise
    finally:
        if fd is not None:
            os.close(fd)
    return sock


def reader(sock: socket.socket) -> BinaryIO:
    """A buffered stream that reads from a socket."""
    return cast("BinaryIO", sock.makefile("rb", buffering=_CHUNK))


def writer(sock: socket.socket) -> BinaryIO:
    """A buffered stream that writes to a socket; flush or close it."""
    return cast("BinaryIO", sock.makefile("wb", buffering=_CHUNK))


def send_files(sock: socket.socket, files: Iterable[tuple[str, Path]]) -> int:
    """Send (name, path) each as a JSON line and its content, then an empty line. Bytes of content sent."""
    total = 0
    for name, path in files:
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            sock.sendall(json.dumps({"name": name, "size": size}).encode() + b"\n")
            sent = sock.sendfile(source, 0, size) if size else 0
            if sent != size:
                raise OSError(f"{path} became shorter while it was sent")
            total += size
    sock.sendall(b"\n")
    return total


def receive_files(stream: BinaryIO, directory: Path) -> tuple[int, list[str]]:
    """Receive what `send_files` sends: bytes, names. Raises OSError, ValueError, EOFError."""
    total = 0
    names: list[str] = []
    while True:
        line = stream.readline(_MAX_HEADER)
        if not line.endswith(b"\n"):
            raise EOFError("the sender ended in the middle")
        if line == b"\n":
            return total, names
        header = json.loads(line)
        name, size = str(header["name"]), int(header["size"])
        if "/" in name or name in ("", ".", "..") or size < 0:
            raise ValueError(f"{name!r} is no file name to receive")
        _receive_file(stream, directory / name, size)
        total += size
        names.append(name)


def _receive_file(stream: BinaryIO, path: Path, size: int) -> None:
    with path.open("w+b") as target:
        if size:
            # Reserve first: a full disk is then an error here and not a SIGBUS in the mapping.
            os.posix_fallocate(target.fileno(), 0, size)
            with mmap.mmap(target.fileno(), size) as area, memoryview(area) as view:
                done = 0
                while done < size:
                    count = stream.readinto(view[done : done + 4 * _CHUNK])  # type: ignore[attr-defined]
                    if not count:
                        raise EOFError(f"the sender ended in the middle of {path.name}")
                    done += count


def pump(source: socket.socket, target: socket.socket) -> int:
    """Copy bytes until `source` ends, then say so to `target`. Bytes copied. Raises OSError."""
    total = 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := source.recv_into(buffer):
        target.sendall(view[:count])
        total += count
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    return total
