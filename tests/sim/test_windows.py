# SPDX-License-Identifier: BSD-3-Clause
"""Promises about memory windows, invalidation and the keys of both (IBA 10.6.7)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migroce import dump as dumps
from migroce.wire import Op

from .pair import Pair
from .records import MS, Action, S, Sge, VerbsError, Wr
from .test_uc import Uc
from .verbs import ALL_ACCESS, Access, Event, QpState, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode
from .windows import OPEN, bind, invalidate
from .world import Mw

BIND, SEND_INV = WrOpcode.BIND_MW, WrOpcode.SEND_WITH_INV
READ, WRITE = WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE
DENIED = WcStatus.REM_ACCESS_ERR


def _bound(w: Pair, at: Sge, kind: int = 2, access: int = OPEN) -> Mw:
    """A window of b's over `at`, bound and ready."""
    mw = w.b.engine.mw(w.b.pd, kind)
    w.b.qp.post_send(bind(100, mw, w.b.mr, at.addr, at.length, access=access))
    w.go(MS)
    assert [(x.wr_id, x.status, x.opcode) for x in w.b.wcs] == [(100, 0, WcOpcode.BIND_MW)]
    w.b.wcs.clear()
    return mw


@pytest.mark.parametrize("kind", [1, 2])
def test_a_window_opens_its_part_of_a_region_under_a_key_of_its_own(kind: int) -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"opened" * 100)
        mw = _bound(w, at, kind)
        assert mw.rkey not in (w.b.mr.rkey, 0)
        into = w.a.space(600)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.a.post(2, WRITE, [w.a.put(b"changed")], remote_addr=at.addr + 593, rkey=mw.rkey)
        w.go()
        assert w.a.done() == [(1, 0), (2, 0)]
        assert w.a.get(into) == b"opened" * 100
        assert w.b.get(at)[593:] == b"changed"


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 2), (599, 2), (600, 1), (0, 601), (1 << 40, 1)],
    ids=["before", "across", "behind", "long", "far"],
)  # fmt: skip
def test_nothing_beside_the_window_is_open_though_the_region_is(kind: int, offset: int, size: int) -> None:
    with Pair() as w:
        w.settle()
        w.b.space(64)
        at = w.b.put(bytes(600))
        mw = _bound(w, at, kind)
        before = bytes(w.b.engine.memory)
        w.a.post(1, WRITE, [w.a.put(b"x" * size)], remote_addr=at.addr + offset, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]
        assert bytes(w.b.engine.memory) == before


def test_a_zero_based_window_is_named_by_offsets() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"0123456789")
        mw = _bound(w, at, 2, OPEN | Access.ZERO_BASED)
        into = w.a.space(4)
        w.a.post(1, READ, [into], remote_addr=6, rkey=mw.rkey)
        w.go()
        assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"6789")
        w.a.post(2, READ, [into], remote_addr=7, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done()[1:] == [(2, DENIED)]


def test_a_window_of_a_region_with_a_view_of_its_own() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"abcdefgh")
        mr = w.b.engine.mr(w.b.pd, at.addr - w.b.engine.base, 8, ALL_ACCESS, 0x5000)
        mw = w.b.engine.mw(w.b.pd, 2)
        w.b.qp.post_send(bind(1, mw, mr, 0x5002, 4))
        w.go(MS)
        into = w.a.space(4)
        w.a.post(1, READ, [into], remote_addr=0x5002, rkey=mw.rkey)
        w.go(MS)
        assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"cdef")
        w.a.post(2, READ, [into], remote_addr=0x5003, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done()[1:] == [(2, DENIED)]


@pytest.mark.parametrize(
    ("opcode", "access"),
    [(READ, Access.REMOTE_WRITE), (WRITE, Access.REMOTE_READ), (WrOpcode.ATOMIC_FETCH_AND_ADD, OPEN & ~8)],
)
def test_a_window_opens_no_more_than_its_flags_say(opcode: WrOpcode, access: int) -> None:
    with Pair() as w:
        w.settle()
        w.b.used += -w.b.used % 8
        at = w.b.space(64)
        mw = _bound(w, at, 2, access)
        w.a.post(1, opcode, [w.a.space(8)], remote_addr=at.addr, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]


def test_a_region_closed_to_peers_can_be_opened_by_windows() -> None:
    """The region itself needs no remote access, only MW_BIND (C10-73, C10-74)."""
    with Pair() as w:
        w.settle()
        at = w.b.put(b"part")
        mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, Access.LOCAL_WRITE | Access.MW_BIND)
        mw = w.b.engine.mw(w.b.pd, 2)
        w.b.qp.post_send(bind(1, mw, mr, at.addr, 4))
        w.go(MS)
        into = w.a.space(4)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.go(MS)
        assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"part")
        w.a.post(2, READ, [into], remote_addr=at.addr, rkey=mr.rkey)
        w.go(1 * S)
        assert w.a.done()[1:] == [(2, DENIED)]


@pytest.mark.parametrize("kind", [1, 2])
def test_an_unbound_window_opens_nothing(kind: int) -> None:
    with Pair() as w:
        w.settle()
        mw = w.b.engine.mw(w.b.pd, kind)
        w.a.post(1, READ, [w.a.space(8)], remote_addr=w.b.engine.base, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]


# ---- binding again, unbinding -------------------------------------------------------------------


def test_a_type_1_window_moves_with_each_binding_and_its_old_key_is_dead() -> None:
    with Pair() as w:
        w.settle()
        x, y = w.b.put(b"first"), w.b.put(b"other")
        mw = _bound(w, x, 1)
        old = mw.rkey
        w.b.qp.post_send(bind(2, mw, w.b.mr, y.addr, y.length))
        w.go(MS)
        into = w.a.space(5)
        w.a.post(1, READ, [into], remote_addr=y.addr, rkey=mw.rkey)
        w.go(MS)
        assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"other")
        w.a.post(2, READ, [into], remote_addr=x.addr, rkey=old)
        w.go(1 * S)
        assert w.a.done()[1:] == [(2, DENIED)]


def test_a_type_1_window_bound_to_nothing_is_closed_and_lets_its_region_go() -> None:
    with Pair() as w:
        w.settle()
        mr = w.b.engine.mr(w.b.pd, 0, 4096)
        mw = w.b.engine.mw(w.b.pd, 1)
        w.b.qp.post_send(bind(1, mw, mr, mr.iova, 4096))
        w.go(MS)
        with pytest.raises(VerbsError, match="EBUSY"):
            mr.free()
        key = mw.rkey
        w.b.qp.post_send(Wr(2, (), BIND, 2, rkey=key & ~0xFF | (key + 1) & 0xFF, mw_rkey=key))
        w.go(MS)
        assert w.b.done() == [(1, 0), (2, 0)]
        mr.free()
        w.a.post(1, READ, [w.a.space(8)], remote_addr=mr.iova, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]


def test_local_invalidation_closes_a_type_2_window_which_can_be_bound_again() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"again")
        mw = _bound(w, at)
        old = mw.rkey
        w.b.qp.post_send(invalidate(1, old), bind(2, mw, w.b.mr, at.addr, 5, key=7))
        w.go(MS)
        assert [(x.wr_id, x.status, x.opcode) for x in w.b.wcs] == [
            (1, 0, WcOpcode.LOCAL_INV), (2, 0, WcOpcode.BIND_MW),
        ]  # fmt: skip
        assert mw.rkey == old & ~0xFF | (old + 7) & 0xFF
        into = w.a.space(5)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.a.post(2, READ, [into], remote_addr=at.addr, rkey=old)
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, DENIED)]


def test_a_send_with_invalidate_closes_the_window_and_says_so() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"take it")
        mw = _bound(w, at)
        into, got = w.a.space(7), w.b.recv(1, 3000)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.a.post(2, SEND_INV, [w.a.put(b"m" * 2500)], imm=mw.rkey, flags=SendFlag.SIGNALED | SendFlag.FENCE)
        w.go(MS)
        assert [(x.wr_id, x.status, x.opcode) for x in w.a.wcs] == [(1, 0, 2), (2, 0, WcOpcode.SEND)]
        (wc,) = w.b.wcs
        assert (wc.status, wc.opcode, wc.byte_len, wc.flags) == (0, WcOpcode.RECV, 2500, WcFlag.WITH_INV)
        assert wc.imm == mw.rkey
        assert w.b.get(got)[:2500] == b"m" * 2500
        w.a.post(3, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.go(1 * S)
        assert w.a.done()[2:] == [(3, DENIED)]


def test_a_repeated_send_with_invalidate_invalidates_once() -> None:
    """Its acknowledgement is lost; meanwhile the window is bound again under the same key."""
    with Pair() as w:
        w.settle()
        at = w.b.put(b"alive")
        mw = _bound(w, at)
        w.b.recv(1, 8)
        w.rule(Action.DROP, Op.ACK, src=1)
        w.a.post(1, SEND_INV, [w.a.put(b"m")], imm=mw.rkey)
        w.go(MS)
        w.b.qp.post_send(bind(2, mw, w.b.mr, at.addr, 5, key=0))
        w.go(20 * MS)
        assert w.b.engine.counters()["duplicates"] > 0
        w.clear_rules()
        w.go(1 * S)
        into = w.a.space(5)
        w.a.post(2, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.go(1 * S)
        assert (w.a.done(), w.a.get(into)) == ([(1, 0), (2, 0)], b"alive")


def test_a_copy_of_a_read_that_comes_after_its_window_was_closed_harms_nobody() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"take it")
        mw = _bound(w, at)
        w.b.recv(1, 8)
        w.rule(Action.DUP, Op.READ_REQ, count=1, delay=20 * MS)
        into = w.a.space(7)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.a.post(2, SEND_INV, [w.a.put(b"m")], imm=mw.rkey, flags=SendFlag.SIGNALED | SendFlag.FENCE)
        w.go(100 * MS)
        assert w.b.engine.counters()["duplicates"] == 1
        assert (w.a.done(), w.a.get(into)) == ([(1, 0), (2, 0)], b"take it")
        assert [e for e in w.events() if e.type != Event.COMM_EST] == []
        w.echo()


def test_who_still_waits_for_a_read_is_told_that_its_memory_has_closed() -> None:
    """The responder has executed it once, and goes on."""
    with Pair() as w:
        w.settle()
        at = w.b.put(b"gone")
        mr = w.b.engine.mr(w.b.pd, 0, 8192, ALL_ACCESS)
        rule = w.rule(Action.DROP, Op.READ_RESP_ONLY, count=1)
        w.a.post(1, READ, [w.a.space(4)], remote_addr=at.addr, rkey=mr.rkey)
        w.go(MS // 2)
        assert w.hits(rule) == 1
        mr.free()
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]
        assert w.b.qp.state() is QpState.RTS


@pytest.mark.parametrize("which", ["region", "type 1", "unbound", "nothing", "another QP's"])
def test_a_key_that_may_not_be_invalidated_breaks_the_receiver_alone(which: str) -> None:
    """Class J: the message is delivered and acknowledged, its receive fails, the QP is gone."""
    with Pair() as w:
        w.settle()
        at = w.b.put(bytes(64))
        key = w.b.mr.rkey
        if which == "type 1":
            key = _bound(w, at, 1).rkey
        elif which == "unbound":
            key = w.b.engine.mw(w.b.pd, 2).rkey
        elif which == "nothing":
            key = 0x12345678
        elif which == "another QP's":
            x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
            y.connect(w.b.path.__class__(w.a.engine.gid, x.num))
            mw = w.b.engine.mw(w.b.pd, 2)
            y.post_send(bind(100, mw, w.b.mr, at.addr, 64))
            w.go(MS)
            w.b.wcs.clear()
            key = mw.rkey
        w.b.recvs(2, 8)
        w.a.post(1, SEND_INV, [w.a.put(b"m")], imm=key)
        w.go(1 * S)
        assert w.a.done() == [(1, 0)]
        assert w.b.done() == [(0, WcStatus.REM_INV_REQ_ERR), (1, WcStatus.WR_FLUSH_ERR)]
        assert w.b.qp.state() is QpState.ERR
        assert Event.QP_ACCESS_ERR in [e.type for e in w.events()]


# ---- mistakes at home ---------------------------------------------------------------------------


def _plain(w: Pair, mw: Mw) -> Wr:
    mr = w.b.engine.mr(w.b.pd, 0, 4096, Access.LOCAL_WRITE)
    return bind(1, mw, mr, mr.iova, 8)


def _read_only(w: Pair, mw: Mw) -> Wr:
    mr = w.b.engine.mr(w.b.pd, 0, 4096, Access.MW_BIND)
    return bind(1, mw, mr, mr.iova, 8)


def _other_pd(w: Pair, mw: Mw) -> Wr:
    mr = w.b.engine.mr(w.b.engine.pd(), 0, 4096)
    return bind(1, mw, mr, mr.iova, 8)


def _too_long(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base + 8, 1 << 20)


def _before(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base - 1, 8)


def _around(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base, (1 << 64) - 1)


def _key_of_another(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base, 8)._replace(rkey=mw.rkey ^ 0x100)


def _unknown_flag(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base, 8, access=OPEN | Access.MW_BIND)


def _dead_region(w: Pair, mw: Mw) -> Wr:
    return bind(1, mw, w.b.mr, w.b.engine.base, 8)._replace(mr_lkey=w.b.mr.lkey ^ 1)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    "mistake",
    [
        _plain, _read_only, _other_pd, _too_long, _before, _around, _key_of_another, _unknown_flag,
        _dead_region,
    ],
)  # fmt: skip
def test_a_wrong_binding_fails_and_breaks_the_qp(mistake: Callable[[Pair, Mw], Wr], kind: int) -> None:
    with Pair() as w:
        w.settle()
        mw = w.b.engine.mw(w.b.pd, kind)
        key = mw.rkey
        w.b.qp.post_send(mistake(w, mw)._replace(flags=0), invalidate(2, key))
        w.go(MS)
        assert w.b.done() == [(1, WcStatus.MW_BIND_ERR), (2, WcStatus.WR_FLUSH_ERR)]
        assert w.b.qp.state() is QpState.ERR
        assert mw.rkey == key


def test_rules_of_each_type() -> None:
    """Type 1 has no zero based view; type 2 is not bound to nothing, nor twice, nor in another PD."""
    for kind, change in (
        (1, {"mw_access": OPEN | Access.ZERO_BASED}), (2, {"compare_add": 0}),
        (2, {"twice": 1}), (2, {"pd": 1}),
    ):  # fmt: skip
        with Pair() as w:
            w.settle()
            mw = w.b.engine.mw(w.b.engine.pd() if "pd" in change else w.b.pd, kind)
            if "twice" in change:
                w.b.qp.post_send(bind(0, mw, w.b.mr, w.b.engine.base, 8, flags=0))
                w.go(MS)
            change = {k: v for k, v in change.items() if k in Wr._fields}
            w.b.qp.post_send(bind(1, mw, w.b.mr, w.b.engine.base, 8)._replace(**change))
            w.go(MS)
            assert w.b.done() == [(1, WcStatus.MW_BIND_ERR)], (kind, change)


@pytest.mark.parametrize("which", ["region", "type 1", "unbound", "nothing"])
def test_invalidating_what_may_not_be_fails_locally(which: str) -> None:
    with Pair() as w:
        w.settle()
        key = w.b.mr.rkey
        if which == "type 1":
            key = _bound(w, w.b.space(8), 1).rkey
        elif which == "unbound":
            key = w.b.engine.mw(w.b.pd, 2).rkey
        elif which == "nothing":
            key = 77
        w.b.qp.post_send(invalidate(1, key))
        w.go(MS)
        assert w.b.done() == [(1, WcStatus.LOC_QP_OP_ERR)]
        assert w.b.qp.state() is QpState.ERR


def test_a_type_2_window_serves_the_qp_that_bound_it_alone_and_closes_with_it() -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"mine only")
        mw = _bound(w, at)
        x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
        for me, peer in ((x, y), (y, x)):
            me.connect(w.a.path.__class__(peer.engine.gid, peer.num))
        x.post_send(Wr(1, (w.a.space(9),), READ, 2, 0, at.addr, mw.rkey))
        w.go(1 * S)
        assert w.a.done() == [(1, DENIED)]
        with pytest.raises(VerbsError, match="EBUSY"):
            w.b.mr.free()
        w.b.qp.free()
        w.b.mr.free()


def test_windows_hold_their_pd_and_a_window_that_goes_lets_its_region_go() -> None:
    with Pair() as w:
        w.settle()
        mw = _bound(w, w.b.space(8), 1)
        mw.free()
        w.b.mr.free()
        pd = w.b.engine.pd()
        other = w.b.engine.mw(pd, 2)
        assert w.lib.mgs_pd_free(w.ptr, pd) < 0
        other.free()
        assert w.lib.mgs_pd_free(w.ptr, pd) == 0
        with pytest.raises(VerbsError, match="EINVAL"):
            w.b.engine.mw(w.b.pd, 3)


# ---- the unreliable connection ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2])
def test_an_unreliable_connection_uses_windows_too(kind: int) -> None:
    with Uc() as w:
        at = w.b.put(bytes(64))
        mw = _bound(w, at, kind)
        w.a.post(1, WRITE, [w.a.put(b"inside")], remote_addr=at.addr + 58, rkey=mw.rkey)
        w.a.post(2, WRITE, [w.a.put(b"across")], remote_addr=at.addr + 59, rkey=mw.rkey)
        w.go()
        assert w.a.done() == [(1, 0), (2, 0)], "a UC request is done when it is sent"
        assert w.b.get(at) == bytes(58) + b"inside"
        if kind == 2:
            w.b.qp.post_send(invalidate(3, mw.rkey))
            w.go()
            assert w.b.done() == [(3, 0)]
            w.a.post(3, WRITE, [w.a.put(b"closed")], remote_addr=at.addr, rkey=mw.rkey)
            w.go()
            assert w.b.get(at) == bytes(58) + b"inside"


# ---- moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [None, "10.0.9.9"])
def test_windows_move_along_and_are_in_the_dump(address: str | None) -> None:
    with Pair() as w:
        w.settle()
        at = w.b.put(b"moved")
        mw = _bound(w, at)
        one = w.b.engine.mw(w.b.pd, 1)
        number = w.stop(w.b)
        records = {m.rkey: m for m in dumps.parse(w.b.engine.dump()).mws}
        pd = w.b.dump().pd
        bound = dumps.MwRecord(mw.rkey, 2, pd, OPEN, w.b.mr.lkey, w.b.qp.num, at.addr, 5)
        assert records == {mw.rkey: bound, one.rkey: dumps.MwRecord(one.rkey, 1, pd, 0, 0, 0, 0, 0)}
        into = w.a.space(5)
        w.a.post(1, READ, [into], remote_addr=at.addr, rkey=mw.rkey)
        w.b.qp.post_send(bind(7, one, w.b.mr, at.addr, 5))  # while stopped
        w.go(100 * MS)
        w.resume(w.b, number, address)
        w.go(1 * S)
        assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"moved")
        assert w.b.done() == [(7, 0)]
