# SPDX-License-Identifier: BSD-3-Clause
"""A container's writable layer on its way: what has changed since the first copy, and tar streams of it.

Tar in the PAX format as GNU tar and podman write it: owners by number, times to the nanosecond, extended
attributes (also trusted.overlay.*), whiteouts (character devices 0:0), hard links. Unix sockets are left
out: CRIU makes them again.

The tree is a container's that may still run, and put a symbolic link where a directory was: each is opened
from the one above it and none through a link, or files of the node's would go along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import stat
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from migroce import urgency

_XATTR = "SCHILY.xattr."
_RACY_NS = 50_000_000
"""A change this close to a scan may have the same time stamp as the scan saw."""
_CHUNK = 1 << 20
_HOLE = 1 << 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Of an entry that is there no more, or is another kind of one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What tells whether a file has changed: ctime, but for what a mapping writes later."""

    mode: int
    inode: int
    size: int
    ctime_ns: int
    links: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The entries of a tree by relative path ('.' is its root), and when it was looked at (ns)."""

    entries: Mapping[str, Entry]
    taken_ns: int
    mapped: frozenset[int] = frozenset()
    """Inodes that processes could write by memory, which a page that is dirty already tells nobody."""

    def bytes(self) -> int:
        """Size of all regular files."""
        return sum(entry.size for entry in self.entries.values() if stat.S_ISREG(entry.mode))

    def without(self, names: Collection[str]) -> Scan:
        """The same, as if `names` had not been there."""
        left = {name: entry for name, entry in self.entries.items() if name not in names}
        return dataclasses.replace(self, entries=left) if names else self


def scan(root: Path, pid: int | None = None) -> Scan:
    """Look at every entry below `root`, following nothing, and what `pid` and its children have mapped of it.

    Raises OSError if `root` is not there.
    """
    taken = time.time_ns()
    mapped = frozenset() if pid is None else _mapped(pid)
    entries: dict[str, Entry] = {".": _entry(os.lstat(root))}
    with _Directories(root) as directories:
        todo = [""]
        while todo:
            prefix = todo.pop()
            with _unless_vanished():
                for name, info in directories.listing(prefix):
                    entries[prefix + name] = _entry(info)
                    if stat.S_ISDIR(info.st_mode):
                        todo.append(f"{prefix}{name}/")
    return Scan(entries, taken, mapped)


@contextlib.contextmanager
def _unless_vanished() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in _VANISHED:
            raise


class _Directories:
    """Those below `root`, opened step by step; the way to the last one stays open, as the next is near it."""

    def __init__(self, root: Path) -> None:
        self._way = [("", os.open(root, _DIRECTORY))]

    def at(self, prefix: str) -> int:
        """The descriptor of the directory whose entries have `prefix` before their name. Raises OSError."""
        while not prefix.startswith(self._way[-1][0]):
            os.close(self._way.pop()[1])
        for name in prefix[len(self._way[-1][0]) :].split("/")[:-1]:
            above, directory = self._way[-1]
            inner = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            self._way.append((f"{above}{name}/", inner))
        return self._way[-1][1]

    def listing(self, prefix: str) -> list[tuple[str, os.stat_result]]:
        """The entries of that directory. Raises OSError."""
        found = []
        with os.scandir(self.at(prefix)) as entries:
            for each in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((each.name, each.stat(follow_symlinks=False)))
        return found

    def path(self, name: str) -> str:
        """A path of the entry `name` that stays right whatever its parents become. Raises OSError."""
        prefix, slash, last = name.rpartition("/")
        return f"/proc/self/fd/{self.at(prefix + slash)}/{last}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _prefix, directory in self._way:
            os.close(directory)


def _mapped(pid: int) -> frozenset[int]:
    """Inodes of which a process or a descendant has a shared mapping that may be written."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            _, access, _, _, inode, *_ = line.split(maxsplit=5)
            if access[1] == "w" and access[3] == "s":
                found.add(int(inode))
    return frozenset(found).union(*(_mapped(child) for child in urgency.children(pid)))


def _entry(info: os.stat_result) -> Entry:
    return Entry(info.st_mode, info.st_ino, info.st_size, info.st_ctime_ns, info.st_nlink)


def changes(before: Scan | None, now: Scan) -> tuple[list[str], list[str]]:
    """(paths to send, parents first; paths to remove, children first). Without `before`: everything."""
    if before is None:
        return sorted(now.entries), []
    mapped = before.mapped | now.mapped
    send = {
        path
        for path, entry in now.entries.items()
        if before.entries.get(path) != entry
        or entry.ctime_ns > before.taken_ns - _RACY_NS
        or entry.inode in mapped
    }
    inodes = {now.entries[path].inode for path in send if now.entries[path].links > 1}
    if inodes:  # names of one file stay names of one file only if they are sent together
        send.update(path for path, entry in now.entries.items() if entry.inode in inodes)
    gone = [path for path in before.entries if path not in now.entries]
    return sorted(send), sorted(gone, reverse=True)


def pack(root: Path, names: Iterable[str], target: IO[bytes], missed: set[str] | None = None) -> int:
    """Write the entries `names` of `root` to `target` as tar; bytes of content. Raises OSError.

    `missed` gets those that were not there: the container is still running.
    """
    total = 0
    # Errors of file names that are no UTF-8 do not exist: tar takes them as they are.
    with (
        tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as tar,
        _Directories(root) as directories,
    ):
        for name in names:
            there = False
            with _unless_vanished():
                total += _pack_one(tar, directories.path(name), name)
                there = True
            if not there and missed is not None:
                missed.add(name)
    return total


def _pack_one(tar: tarfile.TarFile, path: str, name: str) -> int:
    info = tar.gettarinfo(path, arcname=name)
    if _nothing(info):
        return 0  # a socket
    info.name = name
    info.pax_headers = {_XATTR + key: value for key, value in _xattrs(path).items()}
    stamp = os.lstat(path).st_mtime_ns
    info.pax_headers["mtime"] = f"{stamp // 10**9}.{stamp % 10**9:09d}"
    if not info.isreg():
        tar.addfile(info)
        return 0
    with open(path, "rb", opener=_open_regular) as source:
        # It may change its size while it is read; a tar member has the size that was promised.
        tar.addfile(info, _Padded(source, info.size))
    return info.size


def _open_regular(path: str, flags: int) -> int:
    """Open a file unless it has become a link or something that is waited for (a FIFO)."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "it is no file any more", path)
    return fd


def _nothing(info: tarfile.TarInfo | None) -> bool:
    return info is None


class _Padded:
    """A file that yields exactly `size` bytes, zeros where it became shorter meanwhile."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self._source = source
        self._left = size

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        count = self._left if count < 0 else min(count, self._left)
        data = self._source.read(count)
        data += bytes(count - len(data))
        self._left -= count
        return data


def _xattrs(path: str) -> dict[str, str]:
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listxattr(path, follow_symlinks=False):
            with contextlib.suppress(OSError):
                value = os.getxattr(path, name, follow_symlinks=False)
                found[name] = value.decode("utf-8", "surrogateescape")
    return found


def unpack(root: Path, source: IO[bytes]) -> int:
    """Make the entries of a tar stream below `root`; bytes of content. Raises OSError, ValueError."""
    total = 0
    directories: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=source, mode="r|", bufsize=_CHUNK, errors="surrogateescape") as tar:
        for member in tar:
            path = _inside(root, member.name)
            if member.isdir():
                if path.is_symlink() or not path.is_dir():
                    _clear(path)
                    path.mkdir()
                directories.append(member)
                continue
            _clear(path)
            total += _make(tar, member, root, path)
            if not member.islnk():
                _dress(path, member)
    for member in reversed(directories):  # last: making entries changes their times
        _dress(_inside(root, member.name), member)
    return total


def _inside(root: Path, name: str) -> Path:
    """The place of `name`, refused if it would be outside `root` (also by way of a symbolic link)."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r} in the stream leaves the directory")
    path = root
    for part in parts[:-1]:
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{name!r} in the stream goes through a symbolic link")
    return root.joinpath(*parts)


def _clear(path: Path) -> None:
    try:
        directory = stat.S_ISDIR(os.lstat(path).st_mode)  # not where a link leads: nowhere, perhaps
    except FileNotFoundError:
        return
    if directory:
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path, path: Path) -> int:
    if member.isreg():
        source = tar.extractfile(member)
        assert source is not None
        with source, path.open("xb") as target:
            _copy_sparse(source, target, member.size)
        return member.size
    if member.issym():
        path.symlink_to(member.linkname)
    elif member.islnk():
        os.link(_inside(root, member.linkname), path, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(path)
    elif member.ischr() or member.isblk():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind, os.makedev(member.devmajor, member.devminor))
    else:
        raise ValueError(f"{member.name!r} in the stream is of a kind that is not known")
    return 0


def _copy_sparse(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """Copy `size` bytes; what is all zeros becomes a hole."""
    zeros = bytes(_HOLE)
    while data := source.read(_HOLE):
        if data == zeros[: len(data)]:
            target.seek(len(data), os.SEEK_CUR)
        else:
            target.write(data)
    target.truncate(size)


def _dress(path: Path, member: tarfile.TarInfo) -> None:
    os.lchown(path, member.uid, member.gid)
    for key, value in member.pax_headers.items():
        if key.startswith(_XATTR):
            data = value.encode("utf-8", "surrogateescape")
            with contextlib.suppress(OSError):  # a file system without them keeps the rest
                os.setxattr(path, key[len(_XATTR) :], data, follow_symlinks=False)
    if not member.issym():
        path.chmod(member.mode)
    seconds, _, fraction = str(member.pax_headers.get("mtime", member.mtime)).partition(".")
    stamp = int(seconds) * 10**9 + int((fraction + "000000000")[:9])
    os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


def remove(root: Path, names: Iterable[str]) -> None:
    """Remove the entries `names`, children first; those already gone are fine. Raises OSError, ValueError."""
    for name in names:
        _clear(_inside(root, name))
