# SPDX-License-Identifier: BSD-3-Clause
"""mount(2) and umount(2) without a process each: they are on the path of the blackout."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]

_MS_NOSUID, _MS_NODEV, _MS_BIND = 2, 4, 4096
_MNT_DETACH = 2
_OVERLAY_SPECIAL = (":", ",", "\\")


def _mount(source: str, target: Path, fstype: str, flags: int, data: str) -> None:
    done = _libc.mount(source.encode(), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))
    if done != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"mount of {fstype or source} on it failed: {os.strerror(err)}", str(target))


def overlay(target: Path, lower: Path, upper: Path, work: Path) -> None:
    """Mount `lower` with the writable layer `upper` on `target`. Raises OSError, ValueError."""
    for path in (lower, upper, work):
        if any(mark in str(path) for mark in _OVERLAY_SPECIAL):
            raise ValueError(f"overlayfs cannot take a path with ':', ',' or '\\' in it: {path}")
    _mount("migroce", target, "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work}")


def tmpfs(target: Path, options: str = "mode=0700", *, device_nodes: bool = False) -> None:
    """Mount an empty tmpfs, by default for root's eyes only, on `target`. Raises OSError."""
    _mount("migroce", target, "tmpfs", _MS_NOSUID | (0 if device_nodes else _MS_NODEV), options)


def bind(source: Path, target: Path) -> None:
    """Make `source` visible at `target`. Raises OSError."""
    _mount(str(source), target, "", _MS_BIND, "")


def unmount(target: Path) -> None:
    """Detach whatever is mounted on `target`; nothing mounted is no error. Raises OSError."""
    while _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0:
        pass
    err = ctypes.get_errno()
    if err not in (errno.EINVAL, errno.ENOENT):
        raise OSError(err, os.strerror(err), str(target))


def _unescape(field: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`, "ext4" or "overlay"; "" if that cannot be said."""
    best, kind = "", ""
    wanted = str(path.resolve()).rstrip("/") + "/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = _unescape(fields.split()[4]).rstrip("/") + "/"
        if wanted.startswith(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def below(directory: Path) -> list[Path]:
    """Mount points on or under `directory`, innermost first."""
    prefix = str(directory)
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = _unescape(line.split()[4])
        if point == prefix or point.startswith(prefix + "/"):
            found.append(Path(point))
    return found[::-1]


def unmount_below(directory: Path) -> None:
    """Detach everything mounted on or under `directory`; errors are ignored, they show when it is removed."""
    for point in below(directory):
        with contextlib.suppress(OSError):
            unmount(point)
