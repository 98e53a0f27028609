# SPDX-License-Identifier: BSD-3-Clause
"""A container's images travel while CRIU writes them: whole, or not at all with the dump's own reason."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from migroce.engines.context import NodeContext
from migroce.errors import EngineError
from migroce.migration.destination import DestinationSide
from migroce.migration.source import SourceSide

_MIB = 1 << 20
PATIENCE = 20.0


class _Source(SourceSide):
    """Whose dump is what a test orders, step by step."""

    def __init__(self, ctx: NodeContext) -> None:
        super().__init__(ctx, "m1", "c")
        self.images.mkdir(parents=True)
        self.work: Callable[[], None] = lambda: None

    def _dump(self) -> dict[str, Any]:
        self.work()
        self._written.set_result(None)
        return {}

    def write(self, name: str, data: bytes) -> None:
        with (self.images / name).open("ab") as target:
            target.write(data)


class _Destination(DestinationSide):
    """Only its data."""

    def open(self) -> str:
        self.images.mkdir(parents=True)
        return self._listen()

    def close(self) -> None:
        self._close()


class Move:
    """Both sides, and their calls in threads of their own as a worker has them."""

    def __init__(self, base: Path) -> None:
        def node(name: str) -> NodeContext:
            return NodeContext(name=name, state=base / name, runc_root=base / "runc", cgroup="test")

        self.source, self.destination = _Source(node("a")), _Destination(node("b"), "m1", "c")
        self.to = self.destination.open()
        self.pool = ThreadPoolExecutor(4)

    def start(self) -> tuple[Future[dict[str, Any]], Future[dict[str, int]], Future[None]]:
        """The dump, the push, and who waits for what it brings."""
        return (
            self.pool.submit(self.source.dump),
            self.pool.submit(self.source.push, ["images"], self.to),
            self.pool.submit(self.destination.received, ["images"], PATIENCE),
        )

    def arrived(self, name: str) -> int:
        """Bytes of a file that are at the destination."""
        path = self.destination.images / name
        return path.stat().st_size if path.exists() else 0

    def wait_for(self, name: str, size: int) -> None:
        end = time.monotonic() + PATIENCE
        while self.arrived(name) < size:
            assert time.monotonic() < end, f"{self.arrived(name)} bytes of {name}"
            time.sleep(0.001)

    def close(self) -> None:
        self.destination.close()
        self.pool.shutdown()


@pytest.fixture
def move(tmp_path: Path) -> Iterator[Move]:
    with contextlib.closing(Move(tmp_path)) as it:
        yield it


def test_pages_go_while_the_dump_goes_on_and_the_rest_after_it(move: Move) -> None:
    source = move.source

    def work() -> None:
        for number in range(1, 4):
            source.write("pages-1.img", bytes([number]) * 2 * _MIB)
            move.wait_for("pages-1.img", number * 2 * _MIB)
        source.write("pages-1.img", b"end")
        source.write("core-1.img", b"core")

    source.work = work
    _, push, received = move.start()
    received.result(PATIENCE)
    sent = push.result(PATIENCE)
    there = {path.name: path.read_bytes() for path in move.destination.images.iterdir()}
    assert there == {path.name: path.read_bytes() for path in source.images.iterdir()}
    assert sent == {"images": 6 * _MIB + 7, "early": 6 * _MIB}


def test_a_dump_that_fails_ends_the_transfer_with_its_reason(move: Move) -> None:
    def work() -> None:
        move.source.write("pages-1.img", bytes(2 * _MIB))
        move.wait_for("pages-1.img", 2 * _MIB)
        raise EngineError("dump", "CRIU had enough")

    move.source.work = work
    for future in move.start()[:2]:
        with pytest.raises(EngineError, match="CRIU had enough"):
            future.result(PATIENCE)
    with pytest.raises(EngineError, match="the sender ended in the middle"):
        move.destination.received(["images"], PATIENCE)


def test_a_destination_that_is_given_up_ends_the_transfer_and_takes_nothing_more(move: Move) -> None:
    begun, given_up = threading.Event(), threading.Event()

    def work() -> None:
        move.source.write("pages-1.img", bytes(2 * _MIB))
        move.wait_for("pages-1.img", 2 * _MIB)
        begun.set()
        assert given_up.wait(PATIENCE)
        move.source.write("pages-1.img", bytes(2 * _MIB))

    move.source.work = work
    dump, push, received = move.start()
    assert begun.wait(PATIENCE)
    move.destination.close()
    given_up.set()
    assert dump.result(PATIENCE) == {}
    with pytest.raises(OSError, match="Broken pipe"):
        push.result(PATIENCE)
    with pytest.raises(EngineError, match="images could not be stored"):
        received.result(PATIENCE)
    assert move.arrived("pages-1.img") == 2 * _MIB
