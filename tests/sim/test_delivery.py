# SPDX-License-Identifier: BSD-3-Clause
"""Promises about ordinary traffic: what arrives, what completes, when programs are notified."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest

from .pair import Pair
from .records import MS, US, Action, Caps, CqMode, Link, S, Sge, VerbsError, Wr
from .runner import run
from .schedule import Connection, Host, Kind, Op, Schedule, Side
from .verbs import Event, QpState, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode

MTUS = (256, 512, 1024, 2048, 4096)


def _both_ways(ops: tuple[Op, ...], *, mtu: int = 1024, psn: int = 0, depth: int = 16) -> Schedule:
    return Schedule(
        (Host("10.0.0.1"), Host("10.0.0.2")),
        (Connection(Side(0, ops, psn, depth, depth), Side(1, ops, psn ^ 0x800000, depth, depth), mtu),),
    )


@pytest.mark.parametrize("mtu", MTUS)
def test_every_operation_and_size_arrives_without_a_packet_sent_twice(mtu: int) -> None:
    sizes = (0, 1, 2, 3, 4, 5, mtu - 1, mtu, mtu + 1, 3 * mtu, 3 * mtu + 7)
    ops = tuple(Op(kind, kind.size(size), sges=1 + i % 4) for kind in Kind for i, size in enumerate(sizes))
    result = run(_both_ways(ops, mtu=mtu, depth=64))
    for c in result.counters:
        for name in ("retransmits", "timeouts", "duplicates", "seq_naks_tx", "rnr_naks_tx", "rx_icrc"):
            assert c[name] == 0, name


@pytest.mark.parametrize("start", range(0xFFFFFA, 0x1000000))
def test_psns_wrap_in_the_middle_of_a_message(start: int) -> None:
    ops = tuple(Op(kind, kind.size(5000), signaled=False) for kind in Kind)
    run(_both_ways(ops, psn=start))


def test_long_messages_arrive() -> None:
    ops = (Op(Kind.WRITE, 1_500_000), Op(Kind.READ, 1_500_000), Op(Kind.SEND, 1_500_000))
    run(_both_ways(ops, mtu=4096))


def test_immediate_data_and_the_kind_of_receive_are_told() -> None:
    with Pair() as w:
        w.b.recvs(3, 64)
        target = w.b.space(64)
        w.a.send(1, b"plain")
        w.a.post(2, WrOpcode.SEND_WITH_IMM, [w.a.put(b"imm")], imm=0xDEADBEEF)
        w.a.post(3, WrOpcode.RDMA_WRITE_WITH_IMM, [w.a.put(b"written")], imm=0x01020304, **w.b.remote(target))
        w.go()
        assert [(wc.opcode, wc.byte_len, wc.imm, wc.flags) for wc in w.b.wcs] == [
            (WcOpcode.RECV, 5, 0, 0),
            (WcOpcode.RECV, 3, 0xDEADBEEF, WcFlag.WITH_IMM),
            (WcOpcode.RECV_RDMA_WITH_IMM, 7, 0x01020304, WcFlag.WITH_IMM),
        ]
        assert w.b.get(target)[:7] == b"written"
        assert w.a.done() == [(1, 0), (2, 0), (3, 0)]


def test_unsignalled_requests_do_not_complete_and_free_their_place_with_a_later_one() -> None:
    with Pair(caps=Caps(send_wr=4)) as w:
        w.b.recvs(8, 8)
        for i in range(3):
            w.a.send(i, b"x", flags=0)
        w.a.send(3, b"y")
        w.go()
        assert w.a.done() == [(3, 0)]
        for i in range(4, 8):
            w.a.send(i, b"x")
        w.go()
        assert [i for i, _ in w.a.done()] == [3, 4, 5, 6, 7]


def test_sq_sig_all_makes_every_request_complete() -> None:
    with Pair(sig_all=True) as w:
        w.b.recvs(3, 8)
        for i in range(3):
            w.a.send(i, b"x", flags=0)
        w.go()
        assert w.a.done() == [(0, 0), (1, 0), (2, 0)]


def test_a_full_queue_refuses_and_what_was_in_the_list_before_is_posted() -> None:
    with Pair(caps=Caps(send_wr=4, recv_wr=2)) as w:
        sge = w.a.put(b"data")
        with pytest.raises(VerbsError) as refusal:
            w.a.qp.post_send(*(Wr(i, (sge,), WrOpcode.SEND, SendFlag.SIGNALED) for i in range(6)))
        assert (refusal.value.errno, refusal.value.posted) == (errno.ENOMEM, 4)
        w.b.recvs(2, 8)
        with pytest.raises(VerbsError) as refusal:
            w.b.recv(9, 8)
        assert refusal.value.errno == errno.ENOMEM
        w.go(20 * MS)
        w.b.recvs(2, 8)
        w.go()
        assert w.a.done() == [(i, 0) for i in range(4)]


@pytest.mark.parametrize(
    "wr",
    [
        Wr(2, (), opcode=77),
        Wr(2, (), WrOpcode.RDMA_READ, SendFlag.INLINE),
        Wr(2, [Sge(0, 1, 0)] * 5, WrOpcode.SEND),
    ],
    ids=["unknown opcode", "inline READ", "too many SGEs"],
)
def test_a_bad_request_in_a_list_is_named_and_those_before_it_are_sent(wr: Wr) -> None:
    with Pair() as w:
        w.b.recvs(4, 8)
        good = Wr(1, (w.a.put(b"ok"),), WrOpcode.SEND, SendFlag.SIGNALED)
        with pytest.raises(VerbsError) as refusal:
            w.a.qp.post_send(good, wr, good)
        assert refusal.value.posted == 1
        w.go()
        assert w.a.done() == [(1, 0)]
        assert len(w.b.wcs) == 1


def test_inline_data_is_taken_at_once_and_more_than_granted_is_refused() -> None:
    with Pair(caps=Caps(inline=32)) as w:
        into = w.b.recv(0, 64)
        sge = w.a.put(b"0123456789abcdef")
        w.a.post(1, WrOpcode.SEND, [sge], flags=SendFlag.SIGNALED | SendFlag.INLINE)
        w.a.engine.memory[sge.addr - w.a.engine.base :][:16] = bytes(16)
        w.go()
        assert w.b.get(into)[:16] == b"0123456789abcdef"
        size = w.a.qp.caps.inline + 1
        with pytest.raises(VerbsError):
            w.a.post(2, WrOpcode.SEND, [w.a.put(bytes(size))], flags=SendFlag.INLINE)


def test_a_fenced_request_waits_for_the_reads_before_it() -> None:
    """The READ's answer is lost once: without the fence it would see what comes behind it."""
    for fence, seen in ((SendFlag.FENCE, b"old"), (SendFlag(0), b"new")):
        with Pair() as w:
            source = w.b.put(b"old")
            w.rule(Action.DROP, 16, count=1)
            into = w.a.read(1, 3, source, w.b)
            w.a.write(2, b"new", source, w.b, flags=SendFlag.SIGNALED | fence)
            w.go()
            assert w.a.done() == [(1, 0), (2, 0)]
            assert w.a.get(into) == seen
            assert w.b.get(source) == b"new"


def test_no_more_reads_are_out_than_max_rd_atomic() -> None:
    with Pair(max_rd_atomic=2, max_dest_rd_atomic=2, link=Link(delay=100 * US)) as w:
        source = w.b.put(bytes(range(64)))
        w.rule(Action.CAPTURE, 12)
        results = [w.a.read(i, 64, source, w.b) for i in range(6)]
        w.run_for(150 * US)
        assert len(w.captured()) == 2
        w.go()
        assert w.a.done() == [(i, 0) for i in range(6)]
        assert all(w.a.get(r) == bytes(range(64)) for r in results)


def test_a_write_of_nothing_needs_no_key() -> None:
    with Pair() as w:
        w.a.post(1, WrOpcode.RDMA_WRITE, (), remote_addr=0xBAD, rkey=0xBAD)
        w.a.post(2, WrOpcode.RDMA_READ, (), remote_addr=0xBAD, rkey=0xBAD)
        w.go()
        assert w.a.done() == [(1, 0), (2, 0)]


def test_posting_before_the_right_state_is_refused() -> None:
    with Pair(connect=False) as w:
        with pytest.raises(VerbsError) as refusal:
            w.b.recv(0, 8)
        assert refusal.value.errno == errno.EINVAL
        w.b.qp.modify(QpState.INIT, w.b.path)
        w.b.recv(0, 8)
        w.b.qp.modify(QpState.RTR, w.b.path)
        with pytest.raises(VerbsError) as refusal:
            w.b.send(1, b"x")
        assert refusal.value.errno == errno.EINVAL


def test_a_query_tells_what_was_set_and_the_new_address_after_a_move() -> None:
    caps = Caps(33, 44, 3, 2, 77)
    settings: dict[str, Any] = {
        "mtu": 2048, "timeout": 9, "retry_cnt": 5, "rnr_retry": 3, "min_rnr_timer": 17, "max_rd_atomic": 6,
        "max_dest_rd_atomic": 8, "hop_limit": 9, "tclass": 0x50,
    }  # fmt: skip
    with Pair(caps=caps, **settings) as w:
        w.settle()
        path, granted = w.a.qp.query()
        assert (path, granted) == (w.a.path, w.a.qp.caps)
        assert all(getattr(granted, name) >= getattr(caps, name) for name in Caps.__slots__)
        number = w.stop(w.b)
        w.resume(w.b, number, "10.0.9.9")
        w.go()
        assert w.a.qp.query()[0] == replace(path, dgid=w.b.engine.gid)


# ---- completion queues --------------------------------------------------------------------------


def test_an_armed_cq_tells_once_until_it_is_armed_again() -> None:
    with Pair(mode=CqMode.EVENT) as w:
        w.b.recvs(5, 8)
        for i in range(5):
            w.a.send(i, b"x")
            w.go(10 * MS)
        assert w.b.cq.events() == 5
        assert len(w.b.wcs) == 5


def test_a_cq_armed_for_solicited_events_sleeps_through_the_others() -> None:
    with Pair(mode=CqMode.SOLICITED) as w:
        w.b.recvs(4, 8)
        w.a.send(1, b"x")
        w.a.send(2, b"x")
        w.go()
        assert (w.b.cq.events(), w.b.wcs) == (0, [])
        w.a.send(3, b"x", flags=SendFlag.SIGNALED | SendFlag.SOLICITED)
        w.go()
        assert w.b.cq.events() == 1
        assert len(w.b.wcs) == 3
        # An error is always solicited.
        w.b.qp.modify(QpState.ERR)
        w.go()
        assert w.b.cq.events() == 2
        assert w.b.wcs[-1].status == WcStatus.WR_FLUSH_ERR


def test_an_overrun_cq_says_so_once_and_ends_the_qps_that_need_it() -> None:
    with Pair(mode=CqMode.MANUAL, cqe=3) as w:
        w.b.recvs(6, 8)
        for i in range(6):
            w.a.send(i, b"x", flags=SendFlag.SIGNALED if i == 5 else 0)
        w.go()
        told = [(e.type, e.cq, e.qp) for e in w.events()]
        assert told == [(Event.CQ_ERR, w.b.cq.index, -1), (Event.QP_FATAL, -1, w.b.qp.index)]
        assert w.b.qp.state() is QpState.ERR
        assert [wc.wr_id for wc in w.b.cq.poll()] == [0, 1, 2]


def test_a_resized_cq_keeps_what_was_in_it() -> None:
    with Pair(mode=CqMode.MANUAL, cqe=4) as w:
        w.b.recvs(8, 8)
        for i in range(3):
            w.a.send(i, b"x")
        w.go()
        assert w.b.cq.poll(2)[1].wr_id == 1
        with pytest.raises(VerbsError):
            w.b.cq.resize(0)
        w.b.cq.resize(1)
        w.b.cq.resize(64)
        w.a.cq.resize(64)
        for i in range(3, 8):
            w.a.send(i, b"x")
        w.go()
        assert [wc.wr_id for wc in w.b.cq.poll()] == [2, 3, 4, 5, 6, 7]


def test_what_is_used_cannot_be_destroyed() -> None:
    with Pair() as w:
        with pytest.raises(VerbsError) as refusal:
            w.b.cq.free()
        assert refusal.value.errno == errno.EBUSY
        w.b.qp.free()
        w.b.cq.free()
        assert w.lib.mgs_pd_free(w.ptr, w.b.pd) == -errno.EBUSY
        w.b.mr.free()
        assert w.lib.mgs_pd_free(w.ptr, w.b.pd) == 0


def test_a_destroyed_qp_is_gone_though_packets_for_it_are_on_their_way() -> None:
    with Pair() as w:
        w.b.recvs(4, 8)
        for i in range(4):
            w.a.send(i, b"x")
        w.b.qp.free()
        w.go(2 * S)
        assert w.b.engine.counters()["rx_no_qp"] > 0
        assert w.a.done()[0] == (0, WcStatus.RETRY_EXC_ERR)


def test_counters_count_payload_both_ways() -> None:
    with Pair() as w:
        w.b.recvs(1, 3000)
        at = w.b.space(2000)
        w.a.send(1, bytes(3000))
        w.a.write(2, bytes(2000), at, w.b)
        w.a.read(3, 1500, at, w.b)
        w.go()
        a, b = (node.engine.counters() for node in w.nodes)
        assert (a["tx_bytes"], a["rx_bytes"]) == (5000, 1500)
        assert (b["tx_bytes"], b["rx_bytes"]) == (1500, 5000)
        assert (a["tx_packets"], a["rx_packets"]) == (b["rx_packets"], b["tx_packets"])


@pytest.mark.parametrize("victims", [(0,), (1,), (2,), (0, 1), (0, 2), (2, 1)])
@pytest.mark.parametrize("reset", [False, True])
def test_a_qp_that_goes_away_with_an_answer_held_back_takes_no_other_with_it(
    victims: tuple[int, ...], reset: bool
) -> None:
    with Pair(engine={"batch_window": 1 * MS}) as w:
        w.settle()
        sge = w.a.put(b"x")
        pairs = []
        for _ in range(3):
            x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
            x.connect(replace(w.a.path, dgid=y.engine.gid, dest_qpn=y.num, rq_psn=0, sq_psn=0))
            y.connect(replace(w.a.path, dgid=x.engine.gid, dest_qpn=x.num, rq_psn=0, sq_psn=0))
            pairs.append((x, y))
        w.settle()
        for i, (x, y) in enumerate(pairs):
            y.post_recv(Wr(10 + i, (w.b.space(8),)))
            x.post_send(Wr(i, (sge,), WrOpcode.SEND, SendFlag.SIGNALED))
        w.run_for(1500 * US)
        assert w.b.engine.counters()["rx_packets"] > 3
        for v in victims:
            if reset:
                pairs[v][1].modify(QpState.RESET)
            else:
                pairs[v][1].free()
        w.go(5 * S)
        for i in range(3):
            assert ((i, 0) in w.a.done()) or i in victims


@pytest.mark.parametrize("when", range(0, 120, 7))
def test_a_reset_qp_serves_again_whatever_it_was_doing(when: int) -> None:
    """Reset in the middle of messages, READ answers, NAKs and RNR waits; old packets come in later."""
    link = Link(delay=20 * US, ps_per_byte=5000, loss=100_000, fair=2)
    with Pair(link=link, seed=when, min_rnr_timer=8) as w:
        w.settle()
        at = w.b.put(bytes(5000))
        w.b.recvs(1, 4000)
        for i in range(2):
            w.a.send(i, bytes(4000))
            w.a.write(i, bytes(3000), at, w.b)
            w.a.read(i, 5000, at, w.b)
        w.run_for(when * US)
        for node, psn in ((w.a, 0x10), (w.b, 0x20)):
            node.qp.modify(QpState.RESET)
            other = 0x30 - psn
            node.path = replace(node.path, rq_psn=(other + 0x700000) & 0xFFFFFF, sq_psn=psn + 0x700000)
            node.qp.connect(node.path)
        w.a.wcs.clear()
        w.b.wcs.clear()
        w.go(1 * MS)
        w.a.wcs.clear()
        w.b.wcs.clear()
        w.echo()
        assert (w.a.dump().msn, w.b.dump().msn) == (1, 1)


def test_a_window_grows_until_the_wire_is_full() -> None:
    with Pair(link=Link(delay=100 * US, ps_per_byte=200), mtu=4096, timeout=14) as w:
        w.settle()
        at, sge = w.b.space(200_000), w.a.put(bytes(200_000))
        start = w.now
        for i in range(60):
            w.a.post(i, WrOpcode.RDMA_WRITE, [sge], **w.b.remote(at))
        w.go(1 * S)
        assert len(w.a.wcs) == 60
        least = 60 * 200_000 * 200 // 1000
        assert w.a.wcs[-1].t - start < least * 1.25
        assert w.a.engine.counters()["retransmits"] == 0


def test_a_reset_qp_serves_again_and_old_packets_do_not_disturb_it() -> None:
    with Pair(link=Link(delay=300 * US)) as w:
        w.b.recvs(4, 8)
        for i in range(4):
            w.a.send(i, b"old")
        for node in (w.a, w.b):
            node.qp.modify(QpState.RESET)
            node.qp.connect(
                node.path.__class__(node.path.dgid, node.path.dest_qpn, rq_psn=0x500, sq_psn=0x500)
            )
        w.go()
        assert w.a.wcs == []
        assert w.b.wcs == []
        w.echo()
