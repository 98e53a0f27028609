# SPDX-License-Identifier: BSD-3-Clause
"""Files and bytes between nodes: whole or an error, at any path, from anybody."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from migroce.engines import mounts
from migroce.migration import streams


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """Files in `here`, and who receives them into `there`."""
    with contextlib.closing(Line(tmp_path)) as it:
        yield it


class Line:
    """A sender in this thread, a receiver in another."""

    def __init__(self, base: Path) -> None:
        self.here, self.there = base / "here", base / "there"
        self.here.mkdir()
        self.there.mkdir()
        self.left, self._right = socket.socketpair()
        self.sender = streams.FileSender(self.left)
        self._pool = ThreadPoolExecutor(1)
        self._received = self._pool.submit(streams.receive_files, self._right, self.there)

    def write(self, name: str, data: bytes, *, append: bool = False) -> Path:
        path = self.here / name
        with path.open("ab" if append else "wb") as target:
            target.write(data)
        return path

    def say(self, *frames: object, end: bool = True) -> None:
        """Send records, and bytes as they are, then hang up."""
        for frame in frames:
            if isinstance(frame, bytes):
                self.left.sendall(frame)
            else:
                streams.send_record(self.left, cast("dict[str, Any]", frame))
        if end:
            self.left.close()

    def received(self) -> tuple[int, list[str]]:
        return self._received.result(20)

    def finish(self) -> tuple[int, list[str]]:
        """Send the rest and the end; see that both directories are the same."""
        self.sender.finish(sorted(self.here.iterdir()))
        got = self.received()
        whole = {path.name: path.read_bytes() for path in self.here.iterdir()}
        assert {path.name: path.read_bytes() for path in self.there.iterdir()} == whole
        assert got[0] == sum(map(len, whole.values()))
        assert sorted(got[1]) == sorted(whole)
        return got

    def close(self) -> None:
        self.left.close()
        self._pool.shutdown()
        self._right.close()


def test_files_arrive_whole_with_their_names(line: Line) -> None:
    line.write("pages-1.img", bytes(range(256)) * 20000)
    line.write("empty.img", b"")
    line.write("core-1.img", b"x")
    total, _ = line.finish()
    assert line.sender.total == total


def test_a_file_that_grows_is_sent_once_as_it_grows(line: Line) -> None:
    path = line.write("pages-1.img", b"a" * 5000)
    line.sender.send(path)
    line.sender.send(path)  # nothing new
    line.write("pages-1.img", b"b" * 3_000_000, append=True)
    line.sender.send(path)
    line.write("pages-2.img", b"of another process")
    line.write("pages-1.img", b"c", append=True)
    total, _ = line.finish()
    assert line.sender.total == total


def test_little_growth_waits_for_more_until_there_is_no_more(line: Line) -> None:
    path = line.write("pages-1.img", b"a" * 98)
    sent = []
    for more in (b"b", b"c", b"d", b""):
        line.write("pages-1.img", more, append=True)
        line.sender.send(path, least=100)
        sent.append(line.sender.total)
    assert sent == [0, 100, 100, 101]
    line.write("pages-1.img", b"e", append=True)
    line.finish()


@pytest.mark.parametrize("size", [0, 10, 4999])
def test_a_file_that_has_become_shorter_is_sent_again_whole(line: Line, size: int) -> None:
    path = line.write("pages-1.img", b"a" * 5000)
    line.sender.send(path)
    line.write("pages-1.img", b"b" * size)
    line.finish()
    assert line.sender.total == 5000 + size


def test_a_file_that_was_replaced_is_sent_again_whole(line: Line) -> None:
    path = line.write("pages-1.img", b"a" * 5000)
    line.sender.send(path)
    line.write("new", b"b" * 6000).rename(path)
    line.finish()
    assert line.sender.total == 11000


def test_a_file_that_has_gone_does_not_stay_there(line: Line) -> None:
    path = line.write("pages-1.img", b"a")
    line.sender.send(path)
    path.unlink()
    line.write("core-1.img", b"b")
    line.finish()


class _Shrinking:
    """A socket whose `sendfile` finds that the file has just lost its end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def sendfile(self, file: BinaryIO, offset: int, count: int) -> int:
        return self._sock.sendfile(file, offset, count // 2)


def test_a_file_that_becomes_shorter_while_it_is_sent_comes_whole_the_next_time(line: Line) -> None:
    path = line.write("pages-1.img", b"a" * 5000)
    shrinking = cast("socket.socket", _Shrinking(line.left))
    line.sender._sock, whole = shrinking, line.sender._sock
    line.sender.send(path)
    line.sender._sock = whole
    line.finish()
    line.sender._sock = shrinking
    path.write_bytes(b"bb")
    with pytest.raises(OSError, match=r"pages-1\.img became shorter"):
        line.sender.finish([path])


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "/etc/passwd", "a\0b", None, 7])
def test_a_name_that_leaves_the_directory_is_refused(line: Line, name: object) -> None:
    line.say({"name": name, "at": 0, "size": 0}, {"end": {}})
    with pytest.raises(ValueError, match="no file name"):
        line.received()
    assert list(line.there.iterdir()) == []


def test_a_link_in_the_way_is_not_followed(line: Line) -> None:
    (line.there / "a").symlink_to(line.here / "victim")
    line.say({"name": "a", "at": 0, "size": 1}, b"x")
    with pytest.raises(OSError, match="symbolic links"):
        line.received()
    assert list(line.here.iterdir()) == []


_TWO = {"name": "a", "at": 0, "size": 2}


@pytest.mark.parametrize(
    "frames",
    [(), ({"name": "a", "at": 0, "size": 3}, b"ab"), (b"\0\0",), (b"\0\0\0\x09{",), (_TWO, b"ab")],
    ids=["nothing", "half a file", "half a length", "half a record", "no end"],
)
def test_a_sender_that_ends_in_the_middle_is_an_error(line: Line, frames: tuple[object, ...]) -> None:
    line.say(*frames)
    with pytest.raises(EOFError, match="in the middle"):
        line.received()


@pytest.mark.parametrize(
    "frames",
    [
        (b"\xff\xff\xff\xff",),
        (b"\0\0\0\x02[]",),
        (b"\0\0\0\x02{x",),
        ({},),
        ({"name": "a", "at": 0, "size": -1},),
        ({"name": "a", "at": 0, "size": 1 << 63},),
        ({"name": "a", "at": 0, "size": "1"},),
        ({"name": "a", "at": -1, "size": 1},),
        ({"name": "a", "at": 1, "size": 1},),
        (_TWO, b"ab", {"name": "a", "at": 1, "size": 1}),
        (_TWO, b"ab", {"name": "b", "at": 2, "size": 1}),
        (_TWO, b"ab", {"end": {"a": 3}}),
        (_TWO, b"ab", {"end": {"a": 2, "b": 0}}),
        (_TWO, b"ab", {"end": ["a"]}),
    ],
)
def test_what_no_sender_says_is_refused(line: Line, frames: tuple[object, ...]) -> None:
    line.say(*frames)
    with pytest.raises(ValueError, match=r"."):
        line.received()


@pytest.mark.root
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    mounts.tmpfs(tmp_path, "size=64k")
    line = Line(tmp_path)
    try:
        line.say({"name": "a", "at": 0, "size": 100_000}, bytes(100_000))
        with pytest.raises(OSError, match="No space left"):
            line.received()
    finally:
        line.close()
        mounts.unmount(tmp_path)


def test_nothing_is_read_beyond_a_record() -> None:
    left, right = socket.socketpair()
    with left, right:
        streams.send_record(left, {"what": "layer", "remove": ["a" * 100000]})
        left.sendall(b"tar")
        assert streams.receive_record(right)["what"] == "layer"
        assert right.recv(10) == b"tar"


def test_sockets_may_have_any_path_and_are_for_their_owner_only(tmp_path: Path) -> None:
    deep = tmp_path
    while len(str(deep)) < 300:
        deep /= "a" * 50
    deep.mkdir(parents=True)
    path = deep / "in.sock"
    with streams.listen_unix(str(path)) as listening:
        assert path.stat().st_mode & 0o777 == 0o600
        with streams.connect_unix(str(path)) as one, listening.accept()[0] as other:
            one.sendall(b"hello")
            assert other.recv(10) == b"hello"


def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        streams.connect_unix(str(tmp_path / "none"))


def test_a_pump_passes_everything_on_and_then_the_end() -> None:
    data = bytes(range(256)) * 20000
    left, source = socket.socketpair()
    target, right = socket.socketpair()
    counts: list[int] = []
    feeder = threading.Thread(target=lambda: (left.sendall(data), left.close()))
    pumping = threading.Thread(target=lambda: counts.append(streams.pump(source, target)))
    feeder.start()
    pumping.start()
    with right, streams.reader(right) as stream:
        assert stream.read() == data  # until the end that the pump tells
    feeder.join()
    pumping.join()
    source.close()
    target.close()
    assert counts == [len(data)]
