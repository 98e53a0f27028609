# SPDX-License-Identifier: BSD-3-Clause
"""Promises about binding and invalidating as work requests: their turn, their fences, no second one."""

from __future__ import annotations

import pytest

from .pair import Pair
from .records import MS, Link, S
from .verbs import QpState, SendFlag, WrOpcode
from .windows import bind, invalidate

READ = WrOpcode.RDMA_READ


def test_local_operations_complete_in_their_place() -> None:
    with Pair(link=Link(delay=MS), timeout=14) as w:
        w.settle()
        at = w.b.put(b"x" * 64)
        mw = w.b.engine.mw(w.b.pd, 2)
        w.a.recvs(3, 8)
        w.b.send(1, b"before")
        first = bind(2, mw, w.b.mr, at.addr, 64)
        w.b.qp.post_send(first, invalidate(3, first.rkey))
        w.b.send(4, b"after")
        w.b.qp.post_send(bind(5, mw, w.b.mr, at.addr, 64, key=2, flags=0))
        w.b.send(6, b"last")
        w.go(MS // 2)
        assert w.b.done() == []
        w.go(1 * S)
        assert w.b.done() == [(1, 0), (2, 0), (3, 0), (4, 0), (6, 0)]
        assert [wc.wr_id for wc in w.a.wcs] == [0, 1, 2]
        assert w.b.engine.counters()["retransmits"] == 0


def test_an_invalidation_waits_for_what_was_posted_before_it() -> None:
    """Local invalidate fence (IBA 10.6.5.1): the peer may use the window until then."""
    with Pair(link=Link(delay=MS), timeout=14) as w:
        w.settle()
        at = w.b.put(b"x" * 64)
        mw = w.b.engine.mw(w.b.pd, 2)
        w.b.qp.post_send(bind(1, mw, w.b.mr, at.addr, 64))
        w.go(MS)
        w.a.recvs(1, 8)
        w.b.send(2, b"slow")
        w.b.qp.post_send(invalidate(3, mw.rkey))
        into = w.a.space(64)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.get(into) == b"x" * 64
        assert w.b.done() == [(1, 0), (2, 0), (3, 0)]


def test_local_operations_survive_retransmission_without_a_second_turn() -> None:
    with Pair(link=Link(loss=200_000, fair=2), seed=3) as w:
        w.settle()
        at = w.b.put(b"x" * 64)
        mw = w.b.engine.mw(w.b.pd, 2)
        key = mw.rkey
        w.a.recvs(60, 3000)
        for i in range(20):
            w.b.send(i * 3, bytes(2500), flags=0)
            wr = bind(i * 3 + 1, mw, w.b.mr, at.addr, 64)._replace(rkey=key & ~0xFF | (key + i) & 0xFF)
            w.b.qp.post_send(wr, invalidate(i * 3 + 2, wr.rkey))
        w.go(5 * S)
        assert w.b.done() == [(n, 0) for i in range(20) for n in (i * 3 + 1, i * 3 + 2)]
        assert w.b.engine.counters()["retransmits"] > 0


@pytest.mark.parametrize("flags", [SendFlag.SIGNALED, SendFlag.SIGNALED | SendFlag.INLINE])
def test_a_list_of_data_means_nothing_to_a_local_operation(flags: int) -> None:
    """However long it is: it must not be copied into the queue."""
    with Pair() as w:
        w.settle()
        sges = tuple(w.b.space(4000) for _ in range(34))
        mw = w.b.engine.mw(w.b.pd, 2)
        first = bind(1, mw, w.b.mr, sges[0].addr, 64)._replace(sges=sges, flags=flags)
        w.b.qp.post_send(first, invalidate(2, first.rkey)._replace(sges=sges, flags=flags))
        w.b.send(3, b"alive")
        w.a.recv(1, 8)
        w.go(MS)
        assert w.b.done() == [(1, 0), (2, 0), (3, 0)]


def test_a_drained_queue_takes_no_local_operation_until_it_goes_on() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(bytes(8))
        mw = w.b.engine.mw(w.b.pd, 2)
        w.b.qp.modify(QpState.SQD)
        w.b.qp.post_send(bind(1, mw, w.b.mr, at.addr, 8))
        w.go(MS)
        assert w.b.done() == []
        w.b.qp.modify(QpState.RTS)
        w.go(MS)
        assert w.b.done() == [(1, 0)]


def test_a_full_queue_of_local_operations_drains_though_nothing_is_sent() -> None:
    with Pair() as w:
        w.settle()
        mw = w.b.engine.mw(w.b.pd, 1)
        for i in range(200):
            w.b.qp.post_send(bind(i, mw, w.b.mr, w.b.engine.base, 8))
        assert [wc.wr_id for wc in w.wcs()] == list(range(200))
