# SPDX-License-Identifier: BSD-3-Clause
"""The control messages' codec."""

from __future__ import annotations

import contextlib
import random
import struct
from dataclasses import replace

import pytest

from migroce import control as c

MESSAGES: list[c.Message] = [
    c.Hello(b"i" * 16, 42, c.HelloState.STOPPED, 3, 3 << 18, 1 << 18, "ib_send_bw", b"g" * 16),
    c.Hello(b"i" * 16, 42, c.HelloState.FRESH, flags=c.HELLO_FURTHER),
    c.Addresses((b"a" * 16, b"b" * 16)),
    c.Addresses(()),
    c.Sockets(0, 3),
    c.Welcome(0, 3, 3 << 18, 1 << 18, 2, 0, b"g" * 16),
    c.Stop(0, 250),
    c.Stopped(0, 4096, 1 << 20),
    c.Resumed(0, 4096),
    c.DumpReq(),
    c.DumpReply(0, 1234),
    c.Listens((0x01061C06, 0x01110FA0)),
]


@pytest.mark.parametrize("msg", MESSAGES, ids=lambda m: type(m).__name__)
def test_each_message_comes_back_with_its_request_id(msg: c.Message) -> None:
    assert c.decode(c.encode(msg, 77)) == (77, msg)


@pytest.mark.parametrize("msg", MESSAGES, ids=lambda m: type(m).__name__)
def test_longer_bodies_are_accepted_and_shorter_ones_refused(msg: c.Message) -> None:
    data = c.encode(msg, 1)
    head, body = data[:8], data[16:]
    longer = head + struct.pack("<II", len(body) + 9, 1) + body + b"\xff" * 9
    assert c.decode(longer) == (1, msg)
    if body:
        short = body[:67] if isinstance(msg, c.Hello) else body[:-1]
        with pytest.raises(c.ControlError, match="too short"):
            c.decode(head + struct.pack("<II", len(short), 1) + short)


def test_an_older_hello_has_no_flags() -> None:
    msg = c.Hello(b"i" * 16, 42, c.HelloState.FRESH, flags=c.HELLO_FURTHER)
    data = c.encode(msg, 1)
    older = data[:8] + struct.pack("<II", 68, 1) + data[16 : 16 + 68]
    assert c.decode(older) == (1, replace(msg, flags=0))


def test_unknown_types_are_ignored() -> None:
    assert c.decode(struct.pack("<IHHII", c.MAGIC, 99, 1, 3, 5) + b"abc") == (5, None)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "too short for its header"),
        (b"GET / HTTP/1.0\r\n\r\n", "instead of 0x3152474d"),
        (struct.pack("<IHHII", c.MAGIC, 1, 2, 0, 0), "version 2"),
        (struct.pack("<IHHII", c.MAGIC, 6, 1, 4, 0), "claims a body of 4"),
        (c.encode(c.Hello(b"i" * 16, 1, 3)), "unknown state 3"),
    ],
)
def test_broken_messages_are_refused_with_a_reason(data: bytes, says: str) -> None:
    with pytest.raises(c.ControlError, match=says):
        c.decode(data)


def test_a_name_cannot_smuggle_control_characters() -> None:
    _, msg = c.decode(c.encode(c.Hello(b"i" * 16, 1, 0, comm="a\x1b[31m\nb")))
    assert isinstance(msg, c.Hello)
    assert msg.comm == "a?[31m?b"


def test_random_bytes_never_raise_anything_but_control_error() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        data = bytearray(c.encode(rng.choice(MESSAGES), 1))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(c.ControlError):
            c.decode(bytes(data))
