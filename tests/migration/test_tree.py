# SPDX-License-Identifier: BSD-3-Clause
"""A writable layer arrives as it was: whatever is in it, in one go or in two."""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import shutil
import socket
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migroce.migration import tree

ROOT = os.geteuid() == 0
PROFILE = settings(
    max_examples=60, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

# Names where tar formats, shells and encodings have gone wrong: bytes, as file systems have them.
NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"c", b" ", b"-rf", b"new\nline", b"\xff\xfe", b"\xc3\xa4", b"x" * 255]),
    st.binary(min_size=1, max_size=8).filter(lambda n: not {*b"/\0"} & {*n} and n not in (b".", b"..")),
)
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o4711, 0o1777, 0o000])


@dataclasses.dataclass(frozen=True)
class Node:
    """A file to be made; `content` depends on the kind."""

    kind: str
    mode: int
    content: Any
    owner: int
    stamp: int
    xattrs: tuple[tuple[str, bytes], ...]


def _nodes(names: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[bytes, Any]]:
    def node(kind: str, content: st.SearchStrategy[Any]) -> st.SearchStrategy[Node]:
        xattrs = st.lists(
            st.tuples(st.sampled_from(["user.a", "trusted.overlay.opaque"] if ROOT else ["user.a"]),
                      st.sampled_from([b"y", b"\0\xff=\n", b"long" * 60])),
            max_size=1,
        ).map(tuple)  # fmt: skip
        owner = st.sampled_from([0, 1000, 2_000_000] if ROOT else [os.geteuid()])
        stamp = st.integers(0, 4_000_000_000_000_000_000)
        return st.builds(Node, st.just(kind), MODES, content, owner, stamp, xattrs)

    files = node("file", st.one_of(
        st.binary(max_size=3000), st.integers(1, 300).map(lambda n: b"\0" * 4096 * n + b"end")
    ))  # fmt: skip
    links = node("symlink", st.sampled_from([b"a", b"/nonexistent", b"../..", b"\xff", b"t" * 300]))
    leaves = [files, links, node("fifo", st.none()), node("hardlink", st.integers(0, 5))]
    if ROOT:
        leaves.append(node("char", st.sampled_from([(0, 0), (1, 3), (300, 70000)])))  # 0:0 is a whiteout
    return st.recursive(
        st.dictionaries(names, st.one_of(*leaves), max_size=5),
        lambda inner: st.dictionaries(names, st.one_of(*leaves, node("dir", inner)), max_size=5),
        max_leaves=12,
    )


TREES = _nodes(NAMES)


def _make(at: bytes, nodes: dict[bytes, Node], files: list[bytes]) -> None:
    for name, node in nodes.items():
        path = os.path.join(at, name)
        if os.path.lexists(path):
            _remove(path)
        if node.kind == "hardlink":
            known = [each for each in files if os.path.lexists(each)]
            if known:
                os.link(known[node.content % len(known)], path, follow_symlinks=False)
            continue
        if node.kind == "dir":
            os.mkdir(path)
            _make(path, node.content, files)
        elif node.kind == "file":
            with open(path, "wb") as target:
                target.write(node.content)
            files.append(path)
        elif node.kind == "symlink":
            os.symlink(node.content, path)
        elif node.kind == "fifo":
            os.mkfifo(path)
        else:
            os.mknod(path, stat.S_IFCHR, os.makedev(*node.content))
        os.lchown(path, node.owner, -1 if not ROOT else node.owner)
        for key, value in node.xattrs:
            try:
                os.setxattr(path, key, value, follow_symlinks=False)
            except OSError:  # user.* is for files and directories only; some file systems have none
                continue
        if node.kind != "symlink":
            os.chmod(path, node.mode | (0o700 if not ROOT and node.kind in ("dir", "file") else 0))
        os.utime(path, ns=(node.stamp, node.stamp), follow_symlinks=False)


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _picture(root: bytes) -> dict[bytes, tuple[Any, ...]]:
    """Everything that is to be kept, by relative path."""
    found: dict[bytes, tuple[Any, ...]] = {}
    inodes: dict[int, bytes] = {}
    for directory, subdirectories, names in os.walk(root):
        subdirectories.sort()
        for name in sorted(subdirectories + names):
            path = os.path.join(directory, name)
            info = os.lstat(path)
            content: Any = None
            if stat.S_ISREG(info.st_mode):
                with open(path, "rb") as source:
                    content = source.read()
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            attributes = {key: os.getxattr(path, key, follow_symlinks=False)
                          for key in os.listxattr(path, follow_symlinks=False)}  # fmt: skip
            relative = os.path.relpath(path, root)
            first = relative if stat.S_ISDIR(info.st_mode) else inodes.setdefault(info.st_ino, relative)
            found[relative] = (
                info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_rdev, content, attributes,
                first,
            )  # fmt: skip
    return found


def _copy(source: Path, target: Path, before: tree.Scan | None) -> tree.Scan:
    now = tree.scan(source)
    send, gone = tree.changes(before, now)
    stream = io.BytesIO()
    tree.pack(source, send, stream)
    tree.remove(target, gone)
    stream.seek(0)
    tree.unpack(target, stream)
    return now


@PROFILE
@given(TREES)
def test_a_tree_arrives_as_it_was(nodes: dict[bytes, Node]) -> None:
    with tempfile.TemporaryDirectory() as base:
        source, target = Path(base, "source"), Path(base, "target")
        source.mkdir()
        target.mkdir()
        _make(os.fsencode(source), nodes, [])
        _copy(source, target, None)
        assert _picture(os.fsencode(target)) == _picture(os.fsencode(source))


@PROFILE
@given(TREES, TREES, st.lists(st.integers(0, 20), max_size=4))
def test_a_second_copy_brings_what_has_changed_and_removes_what_has_gone(
    first: dict[bytes, Node], second: dict[bytes, Node], gone: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as base:
        source, target = Path(base, "source"), Path(base, "target")
        source.mkdir()
        target.mkdir()
        files: list[bytes] = []
        _make(os.fsencode(source), first, files)
        before = _copy(source, target, None)
        for position in gone:
            here = sorted(os.listdir(os.fsencode(source)))
            if here:
                _remove(os.path.join(os.fsencode(source), here[position % len(here)]))
        _make(os.fsencode(source), second, [each for each in files if os.path.lexists(each)])
        _copy(source, target, before)
        assert _picture(os.fsencode(target)) == _picture(os.fsencode(source))


def test_holes_stay_holes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with (tmp_path / "in" / "sparse").open("wb") as target:
        target.truncate(64 << 20)
        target.seek(32 << 20)
        target.write(b"in the middle")
    _copy(tmp_path / "in", tmp_path / "out", None)
    there = (tmp_path / "out" / "sparse").stat()
    assert there.st_size == 64 << 20
    assert there.st_blocks * 512 < 1 << 20
    with (tmp_path / "out" / "sparse").open("rb") as source:
        source.seek(32 << 20)
        assert source.read(13) == b"in the middle"


def test_sockets_are_left_to_criu(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "in" / "sock"))
        _copy(tmp_path / "in", tmp_path / "out", None)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_shrinks_while_it_is_sent_is_filled_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"abc")
    with path.open("rb") as source:
        padded = tree._Padded(source, 10)  # as if it had had ten bytes
        assert padded.read(4) + padded.read() == b"abc" + bytes(7)
        assert padded.read(1) == b""


def test_a_file_that_vanishes_while_it_is_sent_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "stays").write_text("x")
    stream = io.BytesIO()
    assert tree.pack(tmp_path / "in", [".", "gone", "stays"], stream) == 1
    stream.seek(0)
    tree.unpack(tmp_path / "out", stream)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stays"]


def test_a_container_that_runs_cannot_send_files_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts links, and a FIFO, where there was something else, after that has been looked at."""
    root, node, out = tmp_path / "in", tmp_path / "node", tmp_path / "out"
    for path in (root / "d", root / "e" / "deep", node / "deep", out):
        path.mkdir(parents=True)
    for name in ("d/f", "e/deep/f", "fifo", "link"):
        (root / name).write_text("the container's")
    for name in ("f", "deep/f"):
        (node / name).write_text("the node's")
    before = tree.scan(root)

    def swap(path: Path) -> None:
        if path.is_symlink() or path.is_fifo():
            path.unlink()
            path.with_name(f"{path.name}~").rename(path)
        else:
            path.rename(path.with_name(f"{path.name}~"))
            if path.name == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to(node / "f" if path.name == "link" else node)

    send, _ = tree.changes(None, before)
    swap(root / "d")
    swap(root / "e")
    assert not {"d/f", "e/deep", "e/deep/f"} & tree.scan(root).entries.keys()
    swap(root / "d")
    gettarinfo = tarfile.TarFile.gettarinfo

    def too_late(tar: tarfile.TarFile, name: str, arcname: str) -> tarfile.TarInfo:
        """Even what has just been looked at is another one when it is opened."""
        info = gettarinfo(tar, name, arcname=arcname)
        if arcname in ("d", "fifo", "link"):
            swap(root / arcname)
        return info

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", too_late)
    stream, missed = io.BytesIO(), set[str]()
    tree.pack(root, send, stream, missed)
    monkeypatch.undo()
    assert missed == {"d/f", "e/deep", "e/deep/f", "fifo", "link"}
    assert b"the node's" not in stream.getvalue()
    for name in ("d", "e", "fifo", "link"):
        swap(root / name)
    stream.seek(0)
    tree.unpack(out, stream)
    _copy(root, out, before.without(missed))  # stopped now: what was missed comes, changed or not
    assert _picture(os.fsencode(out)) == _picture(os.fsencode(root))


def _scan(taken: int, **entries: tree.Entry) -> tree.Scan:
    return tree.Scan(entries, taken)


def test_only_what_has_changed_is_sent_again_with_the_other_names_of_its_file() -> None:
    old = 10**18
    same, one = tree.Entry(0o100644, 1, 5, old, 1), tree.Entry(0o100644, 2, 5, old, 2)
    before = _scan(old + 10**9, same=same, one=one, other=one, gone=same)
    touched = tree.Entry(0o100644, 2, 5, old + 2 * 10**9, 2)
    send, gone = tree.changes(before, _scan(old + 3 * 10**9, same=same, one=touched, other=touched, new=same))
    assert (send, gone) == (["new", "one", "other"], ["gone"])


def test_a_file_that_is_mapped_to_be_written_is_sent_again(tmp_path: Path) -> None:
    """Once its page is dirty a mapping changes no time stamp; one that only reads does not matter."""
    for name in ("written", "read"):
        (tmp_path / name).write_bytes(bytes(4096))
        os.utime(tmp_path / name)
    with (tmp_path / "written").open("r+b") as w, (tmp_path / "read").open("rb") as r:
        with mmap.mmap(w.fileno(), 0), mmap.mmap(r.fileno(), 0, access=mmap.ACCESS_READ):
            mapped = tree.scan(tmp_path, os.getpid())
        gone = tree.scan(tmp_path, os.getpid())
    later = dataclasses.replace(mapped, taken_ns=mapped.taken_ns + 10**9)
    unmapped = dataclasses.replace(gone, taken_ns=later.taken_ns)
    assert tree.changes(later, gone)[0] == ["written"]
    assert tree.changes(unmapped, mapped)[0] == ["written"]
    assert tree.changes(unmapped, gone)[0] == []


def test_what_changed_just_before_the_first_look_is_sent_again() -> None:
    """Its time stamp may be the same after one more change."""
    entry = tree.Entry(0o100644, 1, 5, 10**18, 1)
    assert tree.changes(_scan(10**18 + 1, a=entry), _scan(10**18 + 10**9, a=entry))[0] == ["a"]


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../b", "link/x"])
def test_a_stream_cannot_leave_its_directory(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    stream.seek(0)
    with pytest.raises(ValueError, match="in the stream"):
        tree.unpack(root, stream)
    with pytest.raises(ValueError, match="in the stream"):
        tree.remove(root, [name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
