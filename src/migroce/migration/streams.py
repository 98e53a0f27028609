# SPDX-License-Identifier: BSD-3-Clause
"""Data between nodes: unix sockets, records, streams of flat files (images, dumps), a pump of sockets."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

_SUN_PATH = 100  # of 108; longer paths are reached through a directory descriptor
_CHUNK = 1 << 20
_LENGTH = struct.Struct("!I")
_MAX_RECORD = 1 << 26  # names of all the files that have gone may be many
_MAX_FILE = 1 << 62


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


def send_record(sock: socket.socket, value: dict[str, Any]) -> None:
    """Send `value` as JSON with its length before it. Raises OSError."""
    data = json.dumps(value).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_record(sock: socket.socket, limit: int = _MAX_RECORD) -> dict[str, Any]:
    """What `send_record` sent, and not a byte more, so that others can read on from `sock`.

    Raises OSError, EOFError, ValueError (longer than `limit` bytes, or no JSON object).
    """
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if length > limit:
        raise ValueError(f"a record of {length} bytes is too long")
    value = json.loads(_exactly(sock, length))
    if not isinstance(value, dict):
        raise ValueError("a record is no object")
    return value


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), _CHUNK))
        if not part:
            raise EOFError("the sender ended in the middle")
        data += part
    return bytes(data)


# Flat files, also while they grow: a record {"name", "at", "size"} and `size` bytes of content that follow
# the `at` bytes which are there already; `at` is 0 for a new file, or to begin one again. At the end
# {"end": {name: size}} with all that there is to be.


class FileSender:
    """Sends files of a directory, each as far as it has been written."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sent: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, int] = {}
        self.total = 0
        """Bytes of content sent."""

    def send(self, path: Path, *, least: int = 0) -> None:
        """Send what `path` has got since the last time; all of it if it has become shorter or another file.

        Less than `least` bytes wait until the next time. Raises OSError.
        """
        with path.open("rb") as source:
            stat = os.fstat(source.fileno())
            inode, at = self._sent.get(path.name, (stat.st_ino, -1))
            if inode != stat.st_ino or stat.st_size < at:
                at = -1
            size = stat.st_size - max(at, 0)
            if at >= 0 and not size:
                return
            if size < least and self._seen.get(path.name) != stat.st_size:
                self._seen[path.name] = stat.st_size
                return
            at = max(at, 0)
            send_record(self._sock, {"name": path.name, "at": at, "size": size})
            sent = self._sock.sendfile(source, at, size) if size else 0
        self.total += sent
        if sent != size:  # what has been promised must come; what is right comes the next time
            _zeros(self._sock, size - sent)
            self._sent[path.name] = (-1, 0)
            return
        self._sent[path.name] = (stat.st_ino, at + size)

    def finish(self, paths: Iterable[Path]) -> None:
        """Send what is missing of `paths`, which do not change any more, and the end. Raises OSError."""
        paths = list(paths)
        for path in paths:
            self.send(path)
            if self._sent[path.name][0] < 0:
                raise OSError(f"{path} became shorter while it was sent")
        send_record(self._sock, {"end": {path.name: self._sent[path.name][1] for path in paths}})


def _zeros(sock: socket.socket, size: int) -> None:
    while size:
        part = min(size, _CHUNK)
        sock.sendall(bytes(part))
        size -= part


def send_files(sock: socket.socket, paths: Iterable[Path]) -> int:
    """Send files that do not change. Bytes of content sent. Raises OSError."""
    sender = FileSender(sock)
    sender.finish(paths)
    return sender.total


def receive_files(sock: socket.socket, directory: Path) -> tuple[int, list[str]]:
    """Receive what a `FileSender` sends into `directory`: bytes, names.

    Raises OSError, ValueError, EOFError.
    """
    sizes: dict[str, int] = {}
    with _Pipe() as pipe:
        while "end" not in (frame := receive_record(sock)):
            name, at, size = frame.get("name"), frame.get("at"), frame.get("size")
            if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
                raise ValueError(f"{name!r} is no file name to receive")
            if not isinstance(at, int) or not isinstance(size, int) or size < 0 or at + size > _MAX_FILE:
                raise ValueError(f"{name} cannot have {size} bytes at {at}")
            if at not in (0, sizes.get(name, 0)):
                raise ValueError(f"{name} does not go on at {at}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if at else os.O_TRUNC)
            target = os.open(directory / name, flags, 0o600)
            try:
                os.lseek(target, at, os.SEEK_SET)
                pipe.copy(sock, target, size, name)
            finally:
                os.close(target)
            sizes[name] = at + size
    end = frame["end"]
    if not isinstance(end, dict) or any(sizes.get(name) != size for name, size in end.items()):
        raise ValueError("what has come is not what was sent")
    for name in sizes.keys() - end.keys():  # there no more
        (directory / name).unlink()
    return sum(end.values()), list(end)


class _Pipe:
    """From a socket into files without a copy into this process: half the time of mapping the file."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        with contextlib.suppress(OSError):  # the usual size does as well
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _CHUNK)

    def copy(self, sock: socket.socket, target: int, size: int, name: str) -> None:
        """`size` bytes to where `target` stands."""
        while size:
            count = os.splice(sock.fileno(), self._in, min(size, _CHUNK))
            if not count:
                raise EOFError(f"the sender ended in the middle of {name}")
            size -= count
            while count:
                count -= os.splice(self._out, target, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._in)
        os.close(self._out)


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
