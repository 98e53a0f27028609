# SPDX-License-Identifier: BSD-3-Clause
"""Promises about mistakes: the right completion, the right event, nothing written, all flushed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migroce.wire import Aeth, Op, Packet, Reth, build_body, parse

from .pair import Node, Pair
from .records import MS, NEVER, US, Action, CqMode, Link, S, Sge, Wr
from .verbs import ALL_ACCESS, Access, Event, QpState, SendFlag, WcStatus, WrOpcode

SLOW = Link(delay=100 * US, ps_per_byte=1000)
READ, WRITE, WRITE_IMM = WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM
CMP_SWAP, FETCH_ADD = WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD


def _bad_rkey(w: Pair, at: Sge) -> dict[str, int]:
    return {"remote_addr": at.addr, "rkey": w.b.mr.rkey ^ 1}


def _key_of_nobody(_: Pair, at: Sge) -> dict[str, int]:
    return {"remote_addr": at.addr, "rkey": 0}


def _behind_the_end(w: Pair, _: Sge) -> dict[str, int]:
    return {"remote_addr": w.b.engine.base + (1 << 20) - 1999, "rkey": w.b.mr.rkey}


def _before_the_start(w: Pair, _: Sge) -> dict[str, int]:
    return {"remote_addr": w.b.engine.base - 1, "rkey": w.b.mr.rkey}


def _around_the_address_space(w: Pair, _: Sge) -> dict[str, int]:
    return {"remote_addr": NEVER - 10, "rkey": w.b.mr.rkey}


def _no_remote_access(w: Pair, at: Sge) -> dict[str, int]:
    mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, Access.LOCAL_WRITE)
    return {"remote_addr": at.addr, "rkey": mr.rkey}


def _a_freed_region(w: Pair, at: Sge) -> dict[str, int]:
    mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, ALL_ACCESS)
    mr.free()
    return {"remote_addr": at.addr, "rkey": mr.rkey}


def _another_pd(w: Pair, at: Sge) -> dict[str, int]:
    mr = w.b.engine.mr(w.b.engine.pd(), 0, 1 << 20, ALL_ACCESS)
    return {"remote_addr": at.addr, "rkey": mr.rkey}


def _events(w: Pair, node: Node) -> list[int]:
    return [e.type for e in w.events() if e.engine == node.engine.index and e.type != Event.COMM_EST]


@pytest.mark.parametrize("opcode", [READ, WRITE, WRITE_IMM])
@pytest.mark.parametrize(
    "mistake",
    [
        _bad_rkey, _key_of_nobody, _behind_the_end, _before_the_start, _around_the_address_space,
        _no_remote_access, _a_freed_region, _another_pd,
    ],
)  # fmt: skip
def test_memory_that_is_not_open_is_neither_read_nor_written(
    mistake: Callable[[Pair, Sge], dict[str, int]], opcode: WrOpcode
) -> None:
    with Pair() as w:
        w.settle()
        at, good = w.b.space(2000), w.b.space(8)
        w.a.recvs(2, 8)
        w.b.recvs(2, 8)
        before = bytes(w.b.engine.memory)
        w.a.write(1, b"good", good, w.b, flags=0)
        into = w.a.put(b"?" * 2000)
        w.a.post(2, opcode, [into], flags=0, **mistake(w, at))
        w.a.write(3, b"late", good, w.b)
        w.go(1 * S)
        assert w.a.done()[:2] == [(2, WcStatus.REM_ACCESS_ERR), (3, WcStatus.WR_FLUSH_ERR)]
        assert [s for _, s in w.a.done()[2:]] == [WcStatus.WR_FLUSH_ERR] * 2
        assert w.b.done() == [(0, WcStatus.WR_FLUSH_ERR), (1, WcStatus.WR_FLUSH_ERR)]
        assert w.b.get(good)[:4] == b"good"
        after = bytearray(w.b.engine.memory)
        start = good.addr - w.b.engine.base
        after[start : start + 4] = before[start : start + 4]
        assert bytes(after) == before
        assert w.a.get(into) == b"?" * 2000
        assert _events(w, w.b) == [Event.QP_ACCESS_ERR]
        assert (w.a.qp.state(), w.b.qp.state()) == (QpState.ERR, QpState.ERR)


@pytest.mark.parametrize(
    ("opcode", "access"),
    [
        (READ, ALL_ACCESS & ~Access.REMOTE_READ), (WRITE, ALL_ACCESS & ~Access.REMOTE_WRITE),
        (WRITE_IMM, ALL_ACCESS & ~Access.REMOTE_WRITE),
        (CMP_SWAP, ALL_ACCESS & ~Access.REMOTE_ATOMIC), (FETCH_ADD, ALL_ACCESS & ~Access.REMOTE_ATOMIC),
    ],
)  # fmt: skip
def test_a_qp_offers_only_what_its_own_flags_say(opcode: WrOpcode, access: Access) -> None:
    """IBA 9.7.4.1.5: what a QP does not offer is an invalid request."""
    with Pair(access=access) as w:
        w.settle()
        w.a.post(1, opcode, [w.a.space(8)], **w.b.remote(w.b.space(8)))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert _events(w, w.b) == [Event.QP_REQ_ERR]


@pytest.mark.parametrize("length", [(1 << 31) + 1, (1 << 32) - 1])
@pytest.mark.parametrize("opcode", [Op.WRITE_FIRST, Op.READ_REQ])
def test_a_length_that_no_message_may_have_is_an_invalid_request(opcode: int, length: int) -> None:
    """Whatever the key opens: nothing is written, and the NAK is not the one for wrong keys."""
    with Pair() as w:
        w.settle()
        at = w.b.space(1024)
        w.rule(Action.CAPTURE, Op.ACK)
        forged = Packet(
            opcode, w.b.qp.num, w.b.dump().epsn, reth=Reth(at.addr, w.b.mr.rkey, length),
            payload=b"x" * 1024 if opcode == Op.WRITE_FIRST else b"",
        )  # fmt: skip
        w.inject(w.a.engine.gid, w.b.engine.gid, build_body(forged))
        w.go(1 * S)
        assert [p.aeth.syndrome for p in (parse(c.data) for c in w.captured()) if p.aeth] == [0x61]
        assert _events(w, w.b) == [Event.QP_REQ_ERR]
        assert w.b.get(at) == bytes(1024)


@pytest.mark.parametrize("opcode", [WrOpcode.SEND, WRITE, READ])
def test_local_memory_without_a_right_key_fails_locally(opcode: WrOpcode) -> None:
    with Pair() as w:
        w.settle()
        w.b.recvs(3, 8)
        w.a.send(1, b"good", flags=0)
        sge = w.a.space(8)
        w.a.post(2, opcode, [Sge(sge.addr, 8, sge.lkey ^ 1)], flags=0, **w.b.remote(w.b.space(8)))
        w.go(1 * S)
        assert w.a.done() == [(2, WcStatus.LOC_PROT_ERR)]
        assert w.b.done() == [(0, 0)]
        assert w.b.qp.state() is QpState.RTS


@pytest.mark.parametrize("size", [9, 1024, 5000])
def test_a_message_longer_than_its_receive_fails_at_both_ends(size: int) -> None:
    with Pair() as w:
        w.settle()
        w.b.recv(1, 8)
        w.b.recv(2, 8)
        w.a.send(1, bytes(size))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert w.b.done() == [(1, WcStatus.LOC_LEN_ERR), (2, WcStatus.WR_FLUSH_ERR)]
        assert (w.a.qp.state(), w.b.qp.state()) == (QpState.ERR, QpState.ERR)


def test_a_receive_into_memory_without_a_right_key_fails_at_both_ends() -> None:
    with Pair() as w:
        w.settle()
        sge = w.b.space(8)
        w.b.qp.post_recv(Wr(1, (Sge(sge.addr, 8, sge.lkey ^ 1),)))
        w.a.send(1, b"x")
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.REM_OP_ERR)]
        assert w.b.done() == [(1, WcStatus.LOC_PROT_ERR)]


def test_read_data_into_memory_that_may_not_be_written_fails_locally() -> None:
    with Pair() as w:
        w.settle()
        mr = w.a.engine.mr(w.a.pd, 0, 1 << 20, Access.REMOTE_READ)
        to = w.a.space(8)
        w.a.post(1, READ, [Sge(to.addr, 8, mr.lkey)], **w.b.remote(w.b.put(b"12345678")))
        w.go(1 * S)
        assert w.a.done() == [(1, WcStatus.LOC_PROT_ERR)]
        assert w.a.get(to) == bytes(8)


@pytest.mark.parametrize("size", [0, 4, 12])
@pytest.mark.parametrize("opcode", [Op.READ_RESP_ONLY, Op.ATOMIC_ACK])
def test_a_response_that_does_not_fit_is_dropped(opcode: int, size: int) -> None:
    with Pair(link=Link(delay=100 * US)) as w:
        w.settle()
        source = w.b.put(b"12345678")
        psn = w.a.dump().next_psn
        into = w.a.read(1, 8, source, w.b)
        w.go(50 * US)
        atomic = opcode == Op.ATOMIC_ACK
        answer = Packet(
            opcode, w.a.qp.num, psn, aeth=Aeth(0x1F, 1), atomic_orig=7 if atomic else None,
            payload=b"" if atomic else b"x" * size,
        )  # fmt: skip
        w.inject(w.b.engine.gid, w.a.engine.gid, build_body(answer))
        w.go(1 * S)
        assert w.a.done() == [(1, 0)]
        assert w.a.get(into) == b"12345678"


def test_a_region_may_go_away_while_a_read_of_it_is_answered() -> None:
    with Pair() as w:
        w.settle()
        mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, ALL_ACCESS)
        w.link(SLOW)
        into = w.a.space(500_000)
        w.a.post(1, READ, [into], remote_addr=w.b.engine.base, rkey=mr.rkey)
        w.run_for(300_000)
        mr.free()
        w.go(2 * S)
        assert w.a.done()[0][1] in (WcStatus.SUCCESS, WcStatus.REM_ACCESS_ERR)


def test_a_qp_moved_to_err_flushes_in_order_and_stays_silent() -> None:
    with Pair(sig_all=False) as w:
        w.settle()
        w.link(SLOW)
        w.a.recvs(3, 8)
        for i in range(10, 13):
            w.a.send(i, bytes(3000), flags=0)
        w.a.qp.modify(QpState.ERR)
        w.go(1 * S)
        flushed = WcStatus.WR_FLUSH_ERR
        assert sorted(w.a.done()) == [(i, flushed) for i in (0, 1, 2, 10, 11, 12)]
        assert [i for i, _ in w.a.done() if i >= 10] == [10, 11, 12]
        assert [i for i, _ in w.a.done() if i < 10] == [0, 1, 2]


def test_the_error_of_one_qp_leaves_others_of_its_engine_alone() -> None:
    with Pair() as w:
        w.settle()
        x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
        for me, peer in ((x, y), (y, x)):
            me.connect(w.a.path.__class__(peer.engine.gid, peer.num))
        w.a.post(1, WRITE, [w.a.space(8)], remote_addr=0, rkey=0)
        into = w.b.space(8)
        y.post_recv(Wr(7, (into,)))
        x.post_send(Wr(8, (w.a.put(b"fine"),), WrOpcode.SEND, SendFlag.SIGNALED))
        w.go(1 * S)
        assert sorted(w.a.done()) == [(1, WcStatus.REM_ACCESS_ERR), (8, 0)]
        assert w.b.done() == [(7, 0)]
        assert y.state() is QpState.RTS


@pytest.mark.parametrize(("op", "answer"), [(READ, 16), (FETCH_ADD, 18)])
def test_a_nak_that_overtakes_an_answer_is_not_forgotten(op: WrOpcode, answer: int) -> None:
    """Who breaks off says so once: the answer that comes late completes, then the error is as it was said."""
    with Pair() as w:
        w.settle()
        w.rule(Action.DELAY, answer, count=1, delay=100 * US)
        w.a.post(1, op, [w.a.space(8)], **w.b.remote(w.b.put(bytes(8))))
        into = w.b.recv(7, 100)
        w.a.send(2, b"between")
        w.a.post(3, WRITE, [w.a.put(bytes(8))], remote_addr=into.addr, rkey=w.b.mr.rkey ^ 1)
        w.go(30 * S)
        assert w.a.done() == [(1, 0), (2, 0), (3, WcStatus.REM_ACCESS_ERR)]
        assert w.b.qp.state() is QpState.ERR


@pytest.mark.parametrize("strip", [1, 0], ids=["plain peer", "capable peer"])
@pytest.mark.parametrize("heard", [True, False], ids=["heard otherwise", "silent"])
def test_a_plain_peer_that_is_heard_otherwise_gets_more_time(strip: int, heard: bool) -> None:
    """rdma_rxe serves its QPs in turns: its answer may come late while it goes on asking. Not for ever."""
    tries = 8 + (3 * 7 if strip and heard else 0)
    with Pair(link=Link(strip=strip), timeout=10) as w:
        w.go(5 * S)
        patience = tries * 4 * (4096 << 10)
        w.rule(Action.DROP, 17, src=1)  # b's acknowledgements
        to = w.a.space(8)
        w.a.send(1, b"nobody answers")
        for _ in range(70):
            if heard:
                w.b.write(9, b"x", to, w.a)
            w.go(8 * MS)
            if w.now >= 5 * S + patience - 8 * MS:
                break
            assert w.a.done() == []
        w.go(30 * MS)
        assert w.a.done()[:1] == [(1, WcStatus.RETRY_EXC_ERR)]


@pytest.mark.parametrize("op", [READ, FETCH_ADD], ids=["read", "atomic"])
def test_what_came_before_a_refused_request_in_one_go_is_answered_first(op: WrOpcode) -> None:
    """Also if the receiver posts meanwhile, to a QP that is in ERR by then."""
    with Pair(engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        at = w.b.put((7).to_bytes(8, "little"))
        into = w.a.space(8)
        w.a.post(1, op, [into], compare_add=1, **w.b.remote(at))
        w.a.post(2, WRITE, [w.a.put(b"x")], **_bad_rkey(w, at))
        w.go(70 * US)  # a has sent, b has refused and not yet answered
        assert w.b.qp.state() == QpState.ERR
        assert w.a.wcs == []
        w.b.recv(3, 8)
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, WcStatus.REM_ACCESS_ERR)]
        assert w.a.get(into) == (7).to_bytes(8, "little")
        assert w.b.done() == [(3, WcStatus.WR_FLUSH_ERR)]
        assert _events(w, w.b) == [Event.QP_ACCESS_ERR]


def test_a_repeated_read_of_closed_memory_is_refused_before_what_came_in_one_go_with_it() -> None:
    """The first of both is what fails: the other comes after it."""
    with Pair(engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, ALL_ACCESS)
        w.b.recv(7, 8)
        w.rule(Action.DROP, Op.READ_RESP_ONLY, count=1)
        w.a.post(1, READ, [w.a.space(8)], remote_addr=w.b.put(bytes(8)).addr, rkey=mr.rkey)
        w.a.send(2, b"after")
        w.go(150 * US)  # both executed, and a has found out what is missing
        mr.free()
        w.a.post(3, WRITE, [w.a.put(b"x")], **_bad_rkey(w, w.b.space(8)))
        w.go(30 * S)
        assert w.b.done() == [(7, 0)]
        flushed = WcStatus.WR_FLUSH_ERR
        assert w.a.done() == [(1, WcStatus.REM_ACCESS_ERR), (2, flushed), (3, flushed)]


def test_of_repeated_reads_that_are_refused_in_one_go_the_first_is_told_of() -> None:
    """And the requester knows at once: it need not ask a second time."""
    with Pair(engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        mr = w.b.engine.mr(w.b.pd, 0, 1 << 20, ALL_ACCESS)
        w.b.recv(7, 8)
        w.rule(Action.DROP, Op.READ_RESP_ONLY, count=2)
        for n in (1, 2):
            w.a.post(n, READ, [w.a.space(8)], remote_addr=w.b.put(bytes(8)).addr, rkey=mr.rkey)
        w.a.send(3, b"after")
        w.go(150 * US)  # all executed, and a has found out what is missing
        mr.free()
        w.go(150 * US)
        assert w.b.done() == [(7, 0)]
        flushed = WcStatus.WR_FLUSH_ERR
        assert w.a.done() == [(1, WcStatus.REM_ACCESS_ERR), (2, flushed), (3, flushed)]


def test_what_came_before_an_overrun_in_one_go_is_acknowledged() -> None:
    """A CQ without room ends its QP in silence, as rdma_rxe's does; what the program was told of is done."""
    with Pair(mode=CqMode.MANUAL, cqe=3, engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        w.b.recvs(6, 8)
        for i in range(2):
            w.a.send(i, b"x", flags=0)
        w.a.read(2, 8, w.b.put(b"12345678"), w.b)
        for i in range(3, 6):
            w.a.send(i, b"x", flags=SendFlag.SIGNALED if i == 3 else 0)
        w.go(30 * S)
        assert [wc.wr_id for wc in w.b.cq.poll()] == [0, 1, 2]
        done = [(wc.wr_id, wc.status) for wc in w.a.cq.poll()]
        assert done == [(2, 0), (3, 0), (4, WcStatus.RETRY_EXC_ERR)]


def test_what_came_before_an_error_of_our_own_in_one_go_is_acknowledged() -> None:
    """The peer's message has been received: that a request the other way fails is nothing to do with it."""
    with Pair(engine={"batch_window": 50 * US, "train": True}) as w:
        w.settle()
        w.a.recv(7, 8)
        shut = w.a.engine.mr(w.a.pd, 0, 1 << 20, Access.REMOTE_READ)
        to = w.a.space(8)
        w.rule(Action.DELAY, Op.READ_RESP_ONLY, count=1, delay=10 * US)
        w.a.post(2, READ, [Sge(to.addr, 8, shut.lkey)], **w.b.remote(w.b.put(b"12345678")))
        w.go(70 * US)  # b has not yet answered: its message overtakes the answer
        w.b.send(1, b"x")
        w.go(30 * S)
        assert w.a.done() == [(7, 0), (2, WcStatus.LOC_PROT_ERR)]
        assert w.b.done() == [(1, 0)]
