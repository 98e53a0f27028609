# SPDX-License-Identifier: BSD-3-Clause
"""The simulated programs' memory: where things lie, what must be in them, what messages contain."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .schedule import Kind

GUARD = 24
"""Bytes between two pieces of memory that nothing may ever touch."""

_POOL = random.Random(4791).randbytes(2 << 20)


@dataclass(slots=True)
class Arena:
    """Bump allocator of an engine's memory, and the model of what must be in it at the end."""

    size: int = 64
    model: bytearray = field(default_factory=bytearray)
    masked: list[tuple[int, int]] = field(default_factory=list)
    names: list[tuple[int, int, str]] = field(default_factory=list)

    def take(self, size: int, name: str, align: int = 1) -> int:
        """Offset of `size` fresh bytes, with guards around."""
        at = self.size + -self.size % align
        self.size = at + size + GUARD
        self.names.append((at, size, name))
        return at

    def owner(self, offset: int) -> str:
        """What lies at an offset, for messages."""
        for at, size, name in self.names:
            if at <= offset < at + size:
                return f"byte {offset - at} of {name}"
            if at + size <= offset < at + size + GUARD:
                return f"{offset - at - size} bytes behind {name}"
        return "memory of nobody"


@dataclass(slots=True)
class Region:
    """Remote memory of one WRITE or atomic (and of those that target it) or READ."""

    offset: int
    size: int
    state: bytearray


def content(stream: int, index: int, size: int) -> bytes:
    """The bytes of a message, different for each one; the first ones tell which it is."""
    at = (stream * 104729 + index * 7919) % (len(_POOL) - size - 1)
    stamp = bytes((stream & 0xFF, index & 0xFF, index >> 8, size & 0xFF))
    return (stamp + _POOL[at : at + size])[:size]


def operands(kind: Kind, stream: int, index: int, before: int) -> tuple[int, int]:
    """compare_add and swap of an atomic on a word that holds `before`; two in three compares hit."""
    new = int.from_bytes(content(stream, index, 12)[4:], "little")
    if kind is Kind.FETCH_ADD:
        return new, 0
    return (before if index % 3 else new), new


def imm_of(stream: int, index: int) -> int:
    """The immediate data of a message."""
    return (stream * 0x9E3779B1 + index * 0x85EBCA77 + 1) & 0xFFFFFFFF


def pieces(at: int, size: int, n: int) -> list[tuple[int, int]]:
    """`size` bytes from `at` on as n pieces, unequal, with gaps, some of them perhaps empty."""
    out, left = [], size
    for i in range(n, 0, -1):
        length = left if i == 1 else min(left, left * 2 // (i + 1) + i % 2)
        out.append((at, length))
        at += length + 5
        left -= length
    return out


def span(size: int, n: int) -> int:
    """Bytes that `pieces` covers, gaps included."""
    return size + 5 * n
