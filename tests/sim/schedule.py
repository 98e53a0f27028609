# SPDX-License-Identifier: BSD-3-Clause
"""A schedule: everything that happens in one simulated run, as data.

Two runs of one schedule are the same to the byte. A schedule is written as a token (one word for
the shell) so that a failure can be replayed: `python -m tests.sim.replay TOKEN`. Times in ns.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import types
import typing
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

from .records import MS, Link


class Kind(IntEnum):
    """What an operation does."""

    SEND = 0
    SEND_IMM = 1
    WRITE = 2
    WRITE_IMM = 3
    READ = 4
    CMP_SWAP = 5
    FETCH_ADD = 6
    ATOMIC_WRITE = 7
    FLUSH = 8

    @property
    def receives(self) -> bool:
        """Whether it takes a receive request of the peer's."""
        return self in (Kind.SEND, Kind.SEND_IMM, Kind.WRITE_IMM)

    @property
    def sends(self) -> bool:
        """Whether its data goes to a receive buffer."""
        return self in (Kind.SEND, Kind.SEND_IMM)

    @property
    def atomic(self) -> bool:
        """Whether it is about one word of the peer's memory."""
        return self in (Kind.CMP_SWAP, Kind.FETCH_ADD, Kind.ATOMIC_WRITE)

    @property
    def answered(self) -> bool:
        """Whether data comes back for it."""
        return self in (Kind.READ, Kind.CMP_SWAP, Kind.FETCH_ADD)

    def size(self, wanted: int) -> int:
        """The size it has when `wanted` is asked for: an atomic or a FLUSH has no choice."""
        return 8 if self.atomic else 0 if self is Kind.FLUSH else wanted


class Fatal(IntEnum):
    """A mistake in an operation that must end its connection in the right way."""

    NONE = 0
    BAD_RKEY = 1
    OUT_OF_BOUNDS = 2
    NO_ACCESS = 3
    BAD_LKEY = 4
    SHORT_RECV = 5


@dataclass(frozen=True, slots=True)
class Op:
    """One work request. `target`: -1 for remote memory of its own, else that of an earlier one."""

    kind: Kind
    size: int = 0
    sges: int = 1
    signaled: bool = True
    solicited: bool = False
    inline: bool = False
    fence: bool = False
    at: int = 0
    target: int = -1
    fatal: Fatal = Fatal.NONE


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a connection: what its program posts, and how."""

    engine: int
    ops: tuple[Op, ...] = ()
    psn: int = 0
    depth: int = 16
    recv_depth: int = 16
    sig_all: bool = False
    chain: int = 1
    """Requests given to one ibv_post_send at most."""
    recv_sges: int = 1
    recv_extra: int = 0
    """Bytes by which receive buffers are larger than their message."""
    recv_at: int = 0
    """When the first receives are posted."""
    recv_delay: int = 0
    """Time from a receive completion to the next post."""
    reads: int = 4
    """max_rd_atomic; the peer's max_dest_rd_atomic."""
    connect_at: int = 0
    only_rtr: bool = False


@dataclass(frozen=True, slots=True)
class Connection:
    """Two sides and what they agree on."""

    a: Side
    b: Side
    mtu: int = 1024
    timeout: int = 10
    retry_cnt: int = 7
    rnr_retry: int = 7
    min_rnr_timer: int = 1


@dataclass(frozen=True, slots=True)
class Host:
    """An engine, its address and how its process serves it."""

    address: str
    cq_mode: int = 1
    shared_cq: bool = False
    slot: int = 0
    slots: int = 1
    """How many the address has been divided into."""
    clock: int = 0
    batch_window: int = 0
    timer_slack: int = 0
    tx_batch: int = 16
    id_mode: int = 1
    early_timer: int = 0
    train: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """A stop and resume of an engine. All durations in ns.

    at      the stop is asked for; `ready_wait`: how long it may wait for mg_stop_ready
    gap     from the stop until the stand-in answers
    freeze  from the stop until the program is frozen
    pause   from the stop until the resume
    """

    at: int
    engine: int
    pause: int = 5 * MS
    gap: int = 0
    freeze: int = 0
    ready_wait: int = 50 * MS
    standin: bool = True
    address: str = ""
    """The new address; "" keeps the old one."""
    clock: int = -1
    """Where it goes on, how far its clock is ahead of the world's; -1: the same clock."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The first `count` packets of some kind are lost, after `skip` others."""

    op: int
    count: int
    skip: int = 0
    syndrome: int = -1


LINK = Link()


@dataclass(frozen=True, slots=True)
class Schedule:
    """A whole run."""

    hosts: tuple[Host, ...]
    connections: tuple[Connection, ...]
    link: Link = LINK
    moves: tuple[Move, ...] = ()
    drops: tuple[Drop, ...] = ()
    seed: int = 0

    def token(self) -> str:
        """One word that `from_token` turns back into this schedule."""
        text = json.dumps(_lean(self), separators=(",", ":"))
        return "mgs1." + base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode().rstrip("=")


def from_token(token: str) -> Schedule:
    """The inverse of `Schedule.token`; ValueError for anything else."""
    if not token.startswith("mgs1."):
        raise ValueError("a schedule's token starts with mgs1.")
    raw = token[5:]
    text = zlib.decompress(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
    return cast(Schedule, _build(Schedule, json.loads(text)))


def _lean(value: Any) -> Any:
    """Plain data, without what has its default."""
    if dataclasses.is_dataclass(value):
        out = {}
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            if v != f.default:
                out[f.name] = _lean(v)
        return out
    if isinstance(value, tuple):
        return [_lean(v) for v in value]
    return int(value) if isinstance(value, IntEnum) else value


def _build(cls: Any, data: Any) -> Any:
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return typing.cast(Any, cls)(**{name: _build(hints[name], v) for name, v in data.items()})
    if isinstance(cls, types.GenericAlias) and cls.__origin__ is tuple:
        return tuple(_build(cls.__args__[0], v) for v in data)
    return cls(data)
