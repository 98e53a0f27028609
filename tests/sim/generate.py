# SPDX-License-Identifier: BSD-3-Clause
"""Schedules drawn from a source of choices: a seeded generator, or Hypothesis (which shrinks them).

One generator serves both, so that what `make test` explores is what a seed replays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from .records import MS, US, CqMode, Link
from .schedule import Connection, Drop, Fatal, Host, Kind, Move, Op, Schedule, Side

_T = TypeVar("_T")

MTUS = (256, 512, 1024, 2048, 4096)
DURATION = 40 * MS
"""Time over which moves and late operations are spread."""


class Draw(Protocol):
    """A source of choices. Both ends of a range are included; small values are the simple ones."""

    def integer(self, lo: int, hi: int) -> int: ...
    def pick(self, choices: Sequence[_T]) -> _T: ...
    def chance(self, percent: int) -> bool: ...


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def integer(self, lo: int, hi: int) -> int:
        return self._random.randint(lo, hi)

    def pick(self, choices: Sequence[_T]) -> _T:
        return self._random.choice(choices)

    def chance(self, percent: int) -> bool:
        return self._random.random() * 100 < percent


def from_seed(seed: int) -> Schedule:
    """The schedule of a seed."""
    return schedule(Seeded(seed), seed)


def _size(d: Draw, mtu: int) -> int:
    """Sizes where things go wrong: none, one, odd, around multiples of the MTU."""
    shape = d.integer(0, 9)
    if shape < 3:
        return d.pick((1, 8, 64, 2, 3, 0))
    if shape < 6:
        return d.integer(0, mtu)
    if shape < 9:
        return max(0, mtu * d.integer(1, 4) + d.integer(-2, 2))
    return d.integer(0, 12 * mtu) if d.integer(0, 40) else d.integer(200_000, 700_000)


def _op(d: Draw, mtu: int, earlier: list[Op], late: bool) -> Op:
    kind = d.pick(tuple(Kind))
    size = kind.size(_size(d, mtu))
    target = -1
    if kind.atomic:
        return _atomic(d, kind, earlier, late)
    writes = [i for i, op in enumerate(earlier) if op.kind is Kind.WRITE and op.target < 0 and op.size]
    fence = d.chance(5)
    if not kind.sends and writes and d.chance(25):
        target = d.pick(writes)
        size = min(size, earlier[target].size)
        # A WRITE over memory that a READ may still be asking for must wait for it (IBA table 79).
        if kind is not Kind.READ and any(op.kind is Kind.READ and op.target == target for op in earlier):
            fence = True
    inline = not kind.answered and size <= 220 and d.chance(20)
    at = d.integer(0, DURATION) if late else 0
    return Op(
        kind, size, sges=d.integer(1, 4), signaled=d.chance(60), solicited=d.chance(20), inline=inline,
        fence=fence, at=at, target=target,
    )  # fmt: skip


def _atomic(d: Draw, kind: Kind, earlier: list[Op], late: bool) -> Op:
    words = [i for i, op in enumerate(earlier) if op.kind.atomic and op.target < 0]
    target = d.pick(words) if words and d.chance(60) else -1
    at = d.integer(0, DURATION) if late else 0
    return Op(
        kind, 8, sges=d.integer(1, 4), signaled=d.chance(60), inline=not kind.answered and d.chance(20),
        fence=d.chance(5), at=at, target=target,
    )  # fmt: skip


def _ops(d: Draw, mtu: int, most: int, after: int) -> tuple[Op, ...]:
    """Operations, in order of time; perhaps a pause (an idle connection) and some more `after` it."""
    ops: list[Op] = []
    spread = d.chance(30)
    for _ in range(d.integer(0, most)):
        ops.append(_op(d, mtu, ops, spread))
    times = sorted(op.at for op in ops)
    ops = [_at(op, t) for op, t in zip(ops, times, strict=True)]
    if d.chance(70):
        for _ in range(d.integer(1, 3)):
            op = _op(d, mtu, ops, False)
            ops.append(_at(op, after))
    return tuple(ops)


def _at(op: Op, t: int) -> Op:
    return replace(op, at=t)


def _psn(d: Draw) -> int:
    return d.pick((d.integer(0xFFFFE0, 0xFFFFFF), d.integer(0, 0xFFFFFF), d.integer(0x7FFFE0, 0x800010)))


def _side(d: Draw, engine: int, ops: tuple[Op, ...], only_rtr: bool) -> Side:
    return Side(
        engine, () if only_rtr else ops, psn=_psn(d), depth=d.pick((16, 1, 2, 5, 64)),
        recv_depth=d.pick((16, 1, 3, 64)), sig_all=d.chance(15), chain=d.pick((1, 4, 16)),
        recv_sges=d.integer(1, 4), recv_extra=d.pick((0, 0, 1, 40)),
        recv_at=d.integer(1, 5 * MS) if d.chance(20) else 0,
        recv_delay=d.integer(1, 200 * US) if d.chance(25) else 0,
        reads=d.pick((4, 1, 2, 16)),
        connect_at=d.integer(1, MS - 1) if d.chance(20) else 0, only_rtr=only_rtr,
    )  # fmt: skip


def _link(d: Draw) -> Link:
    rough = d.integer(0, 3)
    loss = (0, d.integer(0, 2), d.integer(0, 10), d.integer(5, 20))[rough] * 10_000
    return Link(
        delay=d.pick((5 * US, US, 50 * US)), jitter=d.pick((0, 3 * US, 30 * US)),
        queue=d.integer(50, 500) * US if d.chance(10) else 0,
        reorder_by=d.integer(1, 300) * US, ps_per_byte=d.pick((200, 80, 1000)), loss=loss,
        dup=d.integer(0, 10) * 10_000 if rough and d.chance(50) else 0,
        corrupt=d.integer(0, 5) * 10_000 if rough and d.chance(50) else 0,
        reorder=d.integer(0, 15) * 10_000 if rough and d.chance(50) else 0,
        burst=d.pick((0, 3, 10)) if rough else 0, fair=2, strip=int(d.chance(8)),
        late=d.integer(1, 5) * 10_000 if rough and d.chance(25) else 0,
        late_by=d.pick((10, 1, 100)) * MS,
    )  # fmt: skip


def _address(place: int, engine: int, v6: bool) -> str:
    return f"fd00::{place + 1}:{10 + engine}" if v6 else f"10.0.{place}.{10 + engine}"


def _host(d: Draw, address: str, slot: int, slots: int) -> Host:
    host = Host(
        address, cq_mode=d.pick((CqMode.POLL, CqMode.EVENT)), shared_cq=d.chance(40), slot=slot, slots=slots,
        clock=d.integer(0, 1 << 62) if d.chance(50) else 0,
        batch_window=d.pick((0, 2 * US, 20 * US)), timer_slack=d.pick((0, 50 * US, 2 * MS)),
        tx_batch=d.pick((16, 1, 2, 64)), id_mode=d.pick((1, 0, 2)), early_timer=1000 if d.chance(20) else 0,
    )  # fmt: skip
    return replace(host, train=host.id_mode == 1 and host.batch_window > 0)


def _move(d: Draw, engine: int, n: int, lenient: int, may_relocate: bool, v6: bool) -> Move:
    """A move; without a stand-in it must be over before the peers' patience is."""
    standin = d.chance(85)
    relocate = standin and may_relocate and d.chance(30)
    pause = d.integer(100 * US, 200 * MS) if standin else d.integer(1, max(1, lenient))
    return Move(
        at=d.integer(MS, DURATION), engine=engine, pause=pause,
        gap=min(d.integer(0, lenient), pause) if standin and d.chance(50) else 0,
        freeze=d.integer(0, pause) if d.chance(50) else 0,
        standin=standin,
        address=_address(1 + n, engine, v6) if relocate else "",
        clock=d.pick((-1, 0, d.integer(0, 1 << 62))),
    )  # fmt: skip


def schedule(d: Draw, seed: int = 0) -> Schedule:
    """Draw a schedule of valid operations: all of it must succeed."""
    n_hosts = d.pick((2, 2, 2, 3, 4))
    shared = n_hosts > 2 and d.chance(30)  # two processes behind one address
    v6 = d.chance(15)
    hosts = tuple(
        _host(
            d,
            _address(0, 0 if shared and i == 1 else i, v6),
            i if shared and i < 2 else 0,
            4 if shared and i < 2 else 1,
        )
        for i in range(n_hosts)
    )
    link = _link(d)
    n_moves = d.pick((0, 1, 1, 2, 3))
    after = DURATION + 250 * MS * max(1, n_moves)
    connections = []
    most = d.pick((4, 12, 30))
    n_connections = d.pick((1, 1, 2, 3))
    if d.chance(3):
        n_connections, most = 20, 3
    for _ in range(n_connections):
        a = d.integer(0, n_hosts - 1)
        b = (a + d.integer(1, n_hosts - 1)) % n_hosts
        mtu = d.pick(MTUS)
        one_way = d.integer(0, 5)
        connections.append(
            Connection(
                _side(d, a, _ops(d, mtu, most, after), one_way == 1),
                _side(d, b, _ops(d, mtu, most, after), one_way == 2),
                mtu,
                timeout=d.pick((10, 8, 12, 14)),
                min_rnr_timer=d.pick((1, 5, 12)),
            )
        )
    patience = 2 * 4096 * (1 << min(c.timeout for c in connections))
    free = not shared and not link.strip
    moves = tuple(_move(d, d.integer(0, n_hosts - 1), n, patience, free, v6) for n in range(n_moves))
    drops = tuple(
        Drop(d.pick((0xC0, 0xC1, 0xC2, 0xC3, 17)), d.integer(1, 3), d.integer(0, 2))
        for _ in range(d.integer(0, 3) if d.chance(30) else 0)
    )
    return Schedule(hosts, tuple(connections), link, moves, drops, seed)


def with_mistake(d: Draw, seed: int = 0) -> Schedule:
    """One connection in which one operation is wrong: it must end as IBA asks for."""
    base = schedule(d, seed)
    c = base.connections[0]
    fatal = d.pick(tuple(Fatal)[1:])
    size = max(2, _size(d, c.mtu))
    kinds = {
        Fatal.BAD_LKEY: tuple(k for k in Kind if k is not Kind.FLUSH),
        Fatal.SHORT_RECV: (Kind.SEND, Kind.SEND_IMM),
    }.get(fatal, tuple(k for k in Kind if not k.sends and k is not Kind.FLUSH))  # fmt: skip
    kind = d.pick(kinds)
    bad = Op(kind, kind.size(size), sges=d.integer(1, 3), signaled=d.chance(50), fatal=fatal)
    ops = list(c.a.ops)
    where = d.integer(0, len(ops))
    ops[where:where] = [_at(bad, ops[where].at if where < len(ops) else (ops[-1].at if ops else 0))]
    # Targets name operations by number.
    ops = [op if op.target < where else replace(op, target=op.target + 1) for op in ops]
    connection = replace(c, a=replace(c.a, ops=tuple(ops), only_rtr=False))
    return replace(base, connections=(connection, *base.connections[1:]))
