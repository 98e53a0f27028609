# SPDX-License-Identifier: BSD-3-Clause
"""Shared receive queues and XRC: requests taken as messages begin, limits, errors, moves."""

from __future__ import annotations

import os
import random

import pytest

from migroce import dump as dumps

from .pair import Node, Pair
from .records import MS, Action, Link, Path, S, VerbsError, Wr, gid
from .shared import Shared, schedule
from .test_ud import Datagrams
from .verbs import Event, QpState, QpType, WcStatus, WrOpcode
from .windows import bind
from .world import Qp, Srq

SCALE = int(os.environ.get("MIGROCE_SIM_SCALE", "1"))


class Two(Pair):
    """Node b with a shared queue and, beside a's QP, one for a second QP of a; both take from it."""

    def __init__(self, *, xrc: bool = False, depth: int = 16, **more: object):
        super().__init__(connect=False, **more)  # type: ignore[arg-type]
        self.domain = self.b.engine.xrcd() if xrc else -1
        self.srq: Srq = self.b.engine.srq(self.b.pd, depth, xrcd=self.domain, cq=self.b.cq if xrc else None)
        self.src: list[Qp] = []
        self.dst: list[Qp] = []
        a, b = self.a, self.b
        for _ in range(2):
            if xrc:
                src = a.engine.qp_of(QpType.XRC_SEND, pd=a.pd, send_cq=a.cq)
                dst = b.engine.qp_of(QpType.XRC_RECV, xrcd=self.domain)
            else:
                src = a.engine.qp(a.pd, a.cq, a.cq)
                dst = b.engine.qp_of(QpType.RC, pd=b.pd, send_cq=b.cq, recv_cq=b.cq, srq=self.srq)
            src.connect(Path(b.engine.gid, dst.num))
            dst.connect(Path(a.engine.gid, src.num))
            self.src.append(src)
            self.dst.append(dst)

    def fill(self, n: int, size: int = 4096) -> None:
        for i in range(n):
            self.srq.post(Wr(i, (self.b.space(size),)))

    def send(self, which: int, wr_id: int, size: int, **more: int) -> None:
        wr = Wr(wr_id, (self.a.put(bytes(size)),), WrOpcode.SEND, 2, srqn=self.srq.num)
        self.src[which].post_send(wr._replace(**more))


@pytest.fixture(params=[False, True], ids=["basic", "xrc"])
def two(request: pytest.FixtureRequest) -> Two:
    return Two(xrc=request.param)


def received(node: Node) -> list[tuple[int, int, int]]:
    return [(wc.wr_id, wc.status, wc.qp_num) for wc in node.wcs if wc.opcode >= 128 or wc.status]


@pytest.mark.parametrize("xrc", [False, True], ids=["basic", "xrc"])
@pytest.mark.parametrize("block", range(8))
def test_every_message_arrives_once_whatever_is_lost_and_moved(block: int, xrc: bool) -> None:
    for seed in range(block * 25 * SCALE, (block + 1) * 25 * SCALE):
        schedule(seed, xrc=xrc)


def test_two_messages_begun_at_once_use_a_request_each(two: Two) -> None:
    with two as w:
        w.fill(3, 8192)
        w.send(0, 1, 8000)
        w.send(1, 2, 8000)
        w.go()
        assert [s for _, s in w.a.done()] == [0, 0]
        assert sorted(received(w.b)) == sorted((i, 0, q.num) for i, q in zip((0, 1), w.dst, strict=True))


def test_an_empty_queue_is_not_ready_and_no_request_is_lost(two: Two) -> None:
    with two as w:
        for i in range(4):
            w.send(i % 2, i, 100)
        w.go(5 * MS)
        assert w.a.wcs == []
        assert w.b.engine.counters()["rnr_naks_tx"] > 0
        w.fill(4)
        w.go(1 * S)
        assert sorted(i for i, s in w.a.done() if s == 0) == [0, 1, 2, 3]
        assert sorted(i for i, s, _ in received(w.b) if s == 0) == [0, 1, 2, 3]


def test_the_limit_is_told_once_also_after_a_move() -> None:
    with Two() as w:
        w.settle()
        w.fill(4)
        w.srq.modify(limit=3)
        number = w.stop(w.b)
        assert [s.limit for s in dumps.parse(w.b.engine.dump()).srqs] == [3]
        w.go(20 * MS)
        w.resume(w.b, number)
        w.send(0, 1, 10)
        w.go(1 * S)
        assert [e for e in w.events() if e.type == Event.SRQ_LIMIT_REACHED] == []
        w.send(1, 2, 10)
        w.go()
        told = [(e.engine, e.srq) for e in w.events() if e.type == Event.SRQ_LIMIT_REACHED]
        assert told == [(1, w.srq.index)]
        w.send(0, 3, 10)
        w.go()
        assert [e for e in w.events() if e.type == Event.SRQ_LIMIT_REACHED] == []


def test_a_limit_above_the_size_is_refused_and_a_size_below_what_is_queued() -> None:
    with Two(depth=8) as w:
        for wrong in ({"limit": 9}, {"max_wr": 4, "limit": 5}):
            with pytest.raises(VerbsError, match="EINVAL"):
                w.srq.modify(**wrong)
        w.fill(8)
        with pytest.raises(VerbsError, match="ENOMEM"):
            w.fill(1)
        with pytest.raises(VerbsError, match="EINVAL"):
            w.srq.modify(max_wr=7)


def test_what_a_broken_qp_has_taken_is_flushed_and_the_rest_stays() -> None:
    with Two(link=Link(delay=100_000)) as w:
        w.fill(3, 8192)
        last = w.rule(Action.DROP, 2)  # SEND LAST: the message stays unfinished
        w.send(0, 1, 8000)
        w.go(2 * MS)
        assert w.hits(last) > 0
        w.dst[0].modify(QpState.ERR)
        w.clear_rules()
        w.send(1, 2, 8000)
        w.go(20 * MS)
        assert received(w.b) == [(0, WcStatus.WR_FLUSH_ERR, w.dst[0].num), (1, 0, w.dst[1].num)]
        assert [(e.type, e.qp) for e in w.events() if e.type == Event.QP_LAST_WQE_REACHED] == [
            (Event.QP_LAST_WQE_REACHED, w.dst[0].index)
        ]


def test_an_xrc_queue_that_goes_away_in_the_middle_of_a_message_ends_its_qp() -> None:
    with Two(xrc=True, link=Link(delay=100_000)) as w:
        w.fill(1, 8192)
        last = w.rule(Action.DELAY, 0xA2, delay=5 * MS)
        w.send(0, 1, 8000)
        w.go(2 * MS)
        assert w.hits(last) > 0
        w.srq.free()
        w.go(100 * MS)
        assert w.a.done() == [(1, WcStatus.REM_INV_REQ_ERR)]
        assert received(w.b) == []
        assert w.dst[0].state() is QpState.ERR


def test_an_xrc_read_under_way_when_its_queue_goes_away_is_refused() -> None:
    with Two(xrc=True, link=Link(delay=100_000, ps_per_byte=1000)) as w:
        remote = w.b.remote(w.b.space(60_000))
        w.src[0].post_send(Wr(1, (w.a.space(60_000),), WrOpcode.RDMA_READ, 2, srqn=w.srq.num, **remote))
        w.go(120_000)
        w.srq.free()
        w.go(1 * S)
        assert w.a.done()[0][1] in (0, WcStatus.REM_ACCESS_ERR, WcStatus.REM_INV_REQ_ERR)


def test_a_stopped_xrc_end_holds_peers_that_do_not_know_the_extension() -> None:
    with Two(xrc=True, link=Link(strip=1)) as w:
        w.fill(8)
        w.send(0, 1, 4000)
        w.go()
        number = w.stop(w.b)
        w.send(0, 2, 3000)
        w.send(1, 3, 3000)
        w.go(1 * S)
        assert w.standins.answered > 0
        w.resume(w.b, number)
        w.go(3 * S)
        assert sorted(w.a.done()) == [(1, 0), (2, 0), (3, 0)]


def test_the_dump_names_queues_domains_and_who_uses_them() -> None:
    with Two(xrc=True) as w:
        w.fill(5)
        w.send(0, 1, 100)
        w.go()
        dump = dumps.parse(w.b.engine.dump())
        (srq,), (domain,) = dump.srqs, dump.xrcds
        assert (srq.num, srq.depth, srq.fill, srq.total, srq.xrcd) == (w.srq.num, 16, 4, 1, domain.handle)
        assert srq.cq == dump.cqs[0].handle
        assert domain.refs == 3
        targets = [q for q in dump.qps if q.type == QpType.XRC_RECV]
        parts = [(q.xrcd, q.pd, q.send_cq, q.recv_cq, q.srq) for q in targets]
        assert parts == [(domain.handle, 0, 0, 0, 0)] * 2
        senders = [q for q in dumps.parse(w.a.engine.dump()).qps if q.type == QpType.XRC_SEND]
        assert len(senders) == 2
        assert all(q.pd and q.send_cq and not q.recv_cq for q in senders)


@pytest.mark.parametrize("seed", range(6))
def test_hostile_xrc_packets_break_their_own_connection_at_worst(seed: int) -> None:
    """A mad peer: any opcode of the service, any queue number, any length, in sequence and out of it."""
    rng = random.Random(seed)
    from migroce import wire

    with Two(xrc=True) as w:
        w.fill(8, 512)
        foreign = w.b.engine.srq(w.b.pd, 4, xrcd=w.b.engine.xrcd(), cq=w.b.cq)
        foreign.post(Wr(99, (w.b.space(64),)))
        for _ in range(300):
            opcode = 0xA0 + rng.randrange(32)
            if opcode not in wire.OPINFO:
                continue
            size = rng.choice((0, 1, 600, 1024))
            srqn = rng.choice((w.srq.num, w.srq.num, w.srq.num, foreign.num, rng.getrandbits(24)))
            payload = bytes(size) if wire.OPINFO[opcode].mask & wire.H_PAYLOAD else b""
            packet = wire.Packet(
                opcode, w.dst[0].num, rng.randrange(4), payload=payload, pad=-len(payload) & 3, xrc_srqn=srqn,
                reth=wire.Reth(rng.getrandbits(64), rng.choice((w.b.mr.rkey, 7)), rng.getrandbits(20)),
                aeth=wire.Aeth(rng.getrandbits(8), 1), imm=1, ieth=5, atomic_orig=1,
                atomic=wire.AtomicEth(w.b.mr.addr, w.b.mr.rkey, 1, 2),
                feth=wire.Feth(rng.getrandbits(4), rng.getrandbits(2)),
            )  # fmt: skip
            flow = wire.Flow(w.a.engine.gid, w.b.engine.gid, 0xC000)
            w.inject(w.a.engine.gid, w.b.engine.gid, wire.build(packet, flow)[:-4])
            w.go(MS // 10)
        assert [e.qp for e in w.events() if e.type != Event.COMM_EST] in ([], [w.dst[0].index])
        assert not [wc for wc in w.b.wcs if wc.wr_id == 99]
        w.fill(2)
        w.send(1, 5, 300)
        w.go(1 * S)
        assert (5, 0) in w.a.done()


def test_a_run_with_a_full_queue_uses_every_request_in_order() -> None:
    with Shared(4711, xrc=True, senders=3, qps=3, queues=2, messages=30, depth=64) as w:
        w.finish()
        w.check_dump()


# ---- with windows, with datagrams ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2])
def test_a_window_of_type_1_serves_xrc_and_one_of_type_2_the_qp_that_bound_it_alone(kind: int) -> None:
    """An XRC target has no send queue, so that none of type 2 can be its own."""
    with Two(xrc=True) as w:
        for node in w.nodes:
            node.qp.connect(node.path)
        w.settle()
        at = w.b.put(b"through XRC")
        mw = w.b.engine.mw(w.b.pd, kind)
        w.b.qp.post_send(bind(100, mw, w.b.mr, at.addr, at.length))
        w.go(MS)
        assert w.b.done() == [(100, 0)]
        into = w.a.space(at.length)
        read = Wr(1, (into,), WrOpcode.RDMA_READ, 2, 0, at.addr, mw.rkey, srqn=w.srq.num)
        w.src[0].post_send(read)
        w.go(1 * S)
        if kind == 1:
            assert (w.a.done(), w.a.get(into)) == ([(1, 0)], b"through XRC")
        else:
            assert w.a.done() == [(1, WcStatus.REM_ACCESS_ERR)]
            w.a.qp.post_send(read._replace(wr_id=2))
            w.go(1 * S)
            assert (w.a.done()[1:], w.a.get(into)) == ([(2, 0)], b"through XRC")


def test_datagrams_to_several_qps_take_from_one_queue_and_wait_there_during_a_move() -> None:
    with Datagrams() as w:
        a, b = w.a, w.b
        srq = b.engine.srq(b.pd, 16)
        qps = []
        for _ in range(2):
            qp = b.engine.qp_of(QpType.UD, pd=b.pd, send_cq=b.cq, recv_cq=b.cq, srq=srq)
            qp.connect(b.path)
            qps.append(qp)
        into = [b.space(200) for _ in range(6)]
        for i, sge in enumerate(into):
            srq.post(Wr(i, (sge,)))
        srq.modify(limit=3)
        for i in range(3):
            w.send(a, i, b"message %d" % i, remote_qpn=qps[i % 2].num)
        w.go()
        assert [(x.wr_id, x.status, x.qp_num) for x in b.wcs] == [(i, 0, qps[i % 2].num) for i in range(3)]
        number = w.stop(b)
        w.go(20 * MS)
        w.resume(b, number, "10.0.9.9")
        handle = a.engine.ah(a.pd, gid("10.0.9.9"))
        for i in range(3, 6):
            w.send(a, i, b"message %d" % i, remote_qpn=qps[i % 2].num, ah=handle)
        w.go()
        assert a.done() == [(i, 0) for i in range(6)]
        assert [(x.wr_id, x.status, x.qp_num) for x in b.wcs[3:]] == [
            (i, 0, qps[i % 2].num) for i in range(3, 6)
        ]
        assert [b.get(sge)[40:49] for sge in into] == [b"message %d" % i for i in range(6)]
        limits = [e for e in w.events() if e.type == Event.SRQ_LIMIT_REACHED]
        assert len(limits) == 1
        w.send(a, 9, b"nobody waits", remote_qpn=qps[0].num, ah=handle)
        w.go()
        assert b.engine.counters()["rx_dropped"] == 1
