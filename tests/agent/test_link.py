# SPDX-License-Identifier: BSD-3-Clause
"""A connection's end loses nothing that came before it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from migroce import control as c
from migroce.agent.link import Link


class Heard:
    """A handler that notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[c.Message] = []
        self.reason = asyncio.get_running_loop().create_future()

    def on_message(self, link: Link, request_id: int, msg: c.Message, fds: list[int]) -> None:  # noqa: ARG002
        self.messages.append(msg)

    def on_closed(self, link: Link, reason: str) -> None:  # noqa: ARG002
        self.reason.set_result(reason)


SAID = c.Stopped(0, 4, 100)


def _before_the_end(link: Link, process: socket.socket) -> None:
    """A snapshot was asked for, and the process hangs up without having read that."""
    assert link.send(c.DumpReq(), request_id=3)
    process.send(c.encode(SAID, 2))
    process.close()


def _after_the_end(link: Link, process: socket.socket) -> None:
    """A snapshot is asked for when the process has hung up already."""
    process.send(c.encode(SAID, 2))
    process.close()
    assert not link.send(c.DumpReq(), request_id=3)


@pytest.mark.parametrize("end", [_before_the_end, _after_the_end])
def test_a_last_word_is_heard_whatever_we_say_meanwhile(end: Callable[[Link, socket.socket], None]) -> None:
    async def play() -> tuple[list[c.Message], str]:
        ours, process = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        heard = Heard()
        link = Link(ours, heard, lambda _link: None)
        link.introduced(heard)
        end(link, process)
        reason = await asyncio.wait_for(heard.reason, 60)
        return heard.messages, reason

    assert asyncio.run(play()) == ([SAID], "")
