# SPDX-License-Identifier: BSD-3-Clause
"""Files and bytes between nodes: whole or an error, at any path, from anybody."""

from __future__ import annotations

import io
import json
import socket
import threading
from pathlib import Path

import pytest

from migroce.migration import streams


def test_files_arrive_whole_with_their_names(tmp_path: Path) -> None:
    contents = {"pages-1.img": bytes(range(256)) * 5000, "empty.img": b"", "core-1.img": b"x"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    left, right = socket.socketpair()
    done: list[int] = []

    def send() -> None:
        done.append(streams.send_files(left, [(name, tmp_path / name) for name in contents]))
        left.close()

    sender = threading.Thread(target=send)
    sender.start()
    with right, streams.reader(right) as stream:
        count, names = streams.receive_files(stream, tmp_path / "out")
    sender.join()
    assert names == list(contents)
    assert count == done[0] == sum(map(len, contents.values()))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == contents


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "/etc/passwd"])
def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    stream = io.BytesIO(json.dumps({"name": name, "size": 0}).encode() + b"\n\n")
    with pytest.raises(ValueError, match="no file name"):
        streams.receive_files(stream, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [b"", b'{"name": "a", "size": 3}\nab', b'{"name": "a"', b'{"name": "a", "size": 1}\nb'],
    ids=["nothing", "half a file", "half a header", "no end"],
)
def test_a_sender_that_ends_in_the_middle_is_an_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(EOFError, match="in the middle"):
        streams.receive_files(io.BytesIO(data), tmp_path)


def test_a_size_that_is_negative_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file name"):
        streams.receive_files(io.BytesIO(b'{"name": "a", "size": -1}\n\n'), tmp_path)


def test_a_file_too_large_for_the_disk_is_an_error_and_no_fault(tmp_path: Path) -> None:
    header = json.dumps({"name": "a", "size": 1 << 55}).encode() + b"\n"
    with pytest.raises(OSError, match=r"large|space"):
        streams.receive_files(io.BytesIO(header), tmp_path)


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
