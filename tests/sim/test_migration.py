# SPDX-License-Identifier: BSD-3-Clause
"""Promises about stop, stand-in and resume: docs/protocol.md, one clause each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migroce import dump as dumps
from migroce.wire import Op, parse

from .pair import Pair
from .records import MS, NEVER, Action, Caps, Link, S, Wr
from .verbs import QpState, QpType, SendFlag, WcStatus, WrOpcode
from .world import Qp

RESUME, RESUME_ACK, TOKEN, TOKEN_ACK = 0xC0, 0xC1, 0xC2, 0xC3
CONTROL = (0xC0, 0xFF)
NEW = "10.0.9.9"


# ---- getting to know each other -----------------------------------------------------------------


def test_an_idle_connection_learns_capability_and_tokens_and_then_is_silent() -> None:
    with Pair() as w:
        w.go(10 * MS)
        a, b = w.a.dump(), w.b.dump()
        assert (a.peer_capable, b.peer_capable, a.token_acked, b.token_acked) == (1, 1, 1, 1)
        assert (a.peer_token, b.peer_token) == (b.token, a.token)
        sent = w.stats().sent
        w.go(60 * S)
        assert w.stats().sent == sent
        assert [n.engine.deadline() for n in w.nodes] == [NEVER, NEVER]


@pytest.mark.parametrize("op", [17, TOKEN, TOKEN_ACK])
def test_lost_introductions_are_repeated(op: int) -> None:
    with Pair() as w:
        w.rule(Action.DROP, op, count=6)
        w.settle(3 * S)


def test_an_end_in_rtr_only_is_known_too() -> None:
    with Pair(b_state=QpState.RTR) as w:
        w.settle()
        assert w.a.dump().have_peer_token == 1
        assert w.b.dump().have_peer_token == 1


def test_nothing_of_the_extension_is_sent_to_a_peer_that_is_not_known_to_speak_it() -> None:
    with Pair(link=Link(strip=1)) as w:
        rule = w.rule(Action.CAPTURE, CONTROL)
        w.echo()
        number = w.stop(w.b)
        w.a.send(5, b"for later")
        w.go(1 * S)
        into = w.b.recv(6, 16)
        w.resume(w.b, number)
        w.go(3 * S)
        assert w.b.get(into)[:9] == b"for later"
        w.echo(1)
        assert w.hits(rule) == 0
        assert w.standins.answered > 0


def test_ready_to_stop_only_when_the_peer_has_our_token() -> None:
    with Pair() as w:
        rule = w.rule(Action.DROP, TOKEN, src=0)
        w.go(200 * MS)
        assert w.hits(rule) > 3
        assert not w.a.engine.stop_ready()
        assert w.b.engine.stop_ready()
        w.clear_rules()
        w.go(1 * S)
        assert w.a.engine.stop_ready()


# ---- stop -------------------------------------------------------------------------------------------


def test_a_stopped_engine_is_silent_and_deaf_but_takes_requests() -> None:
    with Pair() as w:
        w.settle()
        w.a.engine.stop()
        w.a.engine.stop()
        into = w.b.recvs(2, 16)
        w.a.send(1, b"while stopped")
        mine = w.a.recv(9, 16)
        w.b.send(2, b"into the void")
        before = w.a.engine.counters()
        w.go(5 * MS)
        assert w.a.engine.deadline() == NEVER
        assert w.a.engine.counters() == before
        assert w.a.wcs == []
        assert w.a.qp.state() is QpState.RTS
        w.a.engine.resume(clock_offset=5 * S)
        w.go(1 * S)
        assert w.b.get(into[0])[:13] == b"while stopped"
        assert w.a.get(mine)[:13] == b"into the void"
        assert w.a.done() == [(9, 0), (1, 0)] or w.a.done() == [(1, 0), (9, 0)]


def test_the_dump_tells_where_everything_stands() -> None:
    with Pair(min_rnr_timer=31) as w:
        w.settle()
        w.a.recvs(3, 8)
        w.b.recvs(1, 8)
        w.a.send(1, bytes(5))
        w.a.send(2, bytes(3000))
        w.a.send(3, bytes(5))
        w.go(5 * MS)
        w.a.engine.stop()
        q, p = w.a.dump(), w.b.dump()
        assert q.mstate == dumps.MSTATES.index("stopped")
        assert (q.una_psn, q.sq_fill, q.rq_fill) == (0xFFFFF1, 2, 3)
        assert p.epsn == q.una_psn
        assert (q.peer_qpn, p.peer_qpn) == (w.b.qp.num, w.a.qp.num)
        assert q.path_mtu == 1024
        d = dumps.parse(w.a.engine.dump())
        assert d.stopped
        assert [(m.lkey, m.length) for m in d.mrs] == [(w.a.mr.lkey, 1 << 20)]
        assert not dumps.parse(w.b.engine.dump()).stopped


def test_a_paused_peer_waits_far_beyond_its_retries_and_says_rts() -> None:
    with Pair(timeout=8, retry_cnt=1) as w:
        w.settle()
        into = w.b.recv(1, 16)
        number = w.stop(w.b)
        w.a.send(1, b"hello")
        w.go(120 * S)
        assert w.a.wcs == []
        assert w.a.dump().mstate == dumps.MSTATES.index("paused")
        assert w.a.qp.state() is QpState.RTS
        sent = w.stats().sent
        w.go(10 * S)
        assert w.stats().sent - sent <= 110, "probes are slow"
        w.resume(w.b, number)
        w.go(50 * MS)
        assert w.a.done() == [(1, 0)]
        assert w.b.get(into)[:5] == b"hello"


def _second_pair(w: Pair) -> tuple[Qp, Qp]:
    """Another QP on each node, connected with each other."""
    a, b = (n.engine.qp(n.pd, n.cq, n.cq, Caps(), False, QpType.RC) for n in w.nodes)
    a.connect(replace(w.a.path, dest_qpn=b.num))
    b.connect(replace(w.b.path, dest_qpn=a.num))
    return a, b


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_qp_that_could_ask_nobody_waits_with_the_others_to_that_peer(comes_back: bool) -> None:
    with Pair(timeout=8, retry_cnt=1) as w:
        a, b = _second_pair(w)
        w.settle()
        into = w.b.space(16)
        w.b.recv(1, 16)
        b.post_recv(Wr(2, (into,)))
        w.standins.announcing = False  # as if it had been lost, for one of them
        number = w.stop(w.b)
        w.a.send(1, b"told")
        w.go(1 * S)
        w.standins.off(number)  # it has lost its network
        a.post_send(Wr(2, (w.a.put(b"not told"),), WrOpcode.SEND, flags=SendFlag.SIGNALED))
        w.go(50 * S)
        assert w.a.wcs == []
        if comes_back:
            w.resume(w.b, number)
            w.go(1 * S)
            assert sorted(w.a.done()) == [(1, 0), (2, 0)]
            assert w.b.get(into)[:8] == b"not told"
        else:
            w.go(100 * S)
            assert sorted(w.a.done()) == [(n, WcStatus.RETRY_EXC_ERR) for n in (1, 2)]


def test_a_peer_nobody_answers_for_is_given_up_after_two_minutes_and_its_retries() -> None:
    with Pair(timeout=10, retry_cnt=3) as w:
        w.settle()
        number = w.stop(w.b)
        w.a.send(1, b"hello")
        w.go(1 * S)
        w.standins.off(number)
        w.go(119 * S)
        assert w.a.wcs == []
        w.go(10 * S)
        assert w.a.done() == [(1, WcStatus.RETRY_EXC_ERR)]


# ---- resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [None, NEW])
@pytest.mark.parametrize("who", ["a", "b"])
@pytest.mark.parametrize("b_state", [QpState.RTS, QpState.RTR])
def test_an_idle_connection_moves_and_works(address: str | None, who: str, b_state: QpState) -> None:
    with Pair(b_state=b_state) as w:
        w.settle()
        node = getattr(w, who)
        number = w.stop(node)
        w.go(500 * MS)
        w.resume(node, number, address, clock=7)
        w.go(500 * MS)
        if b_state is QpState.RTR:
            w.b.qp.modify(QpState.RTS, w.b.path)
        w.echo()


@pytest.mark.parametrize("address", [None, NEW])
@pytest.mark.parametrize("op", [RESUME, RESUME_ACK])
@pytest.mark.parametrize("losses", [1, 3, 8])
def test_a_lost_resume_is_repeated(op: int, losses: int, address: str | None) -> None:
    with Pair() as w:
        w.settle()
        number = w.stop(w.b)
        w.go(20 * MS)
        rule = w.rule(Action.DROP, op, count=losses)
        w.resume(w.b, number, address)
        w.go(1 * S)
        assert w.hits(rule) == losses
        assert w.b.dump().mstate == 0
        w.echo()


def test_a_resume_goes_out_at_once_and_a_paused_peer_goes_on_within_a_round_trip() -> None:
    with Pair(link=Link(delay=30_000, ps_per_byte=0)) as w:
        w.settle()
        w.b.recv(1, 16)
        number = w.stop(w.b)
        w.a.send(1, b"now")
        w.go(400 * MS)
        start = w.now
        w.resume(w.b, number)
        w.go(1 * MS)
        assert w.a.done() == [(1, 0)]
        assert w.a.wcs[0].t - start <= 3 * 30_000


def test_a_probe_wakes_the_peer_when_every_resume_is_lost() -> None:
    with Pair() as w:
        w.settle()
        into = w.b.recv(1, 16)
        number = w.stop(w.b)
        w.a.send(1, b"probe")
        w.go(300 * MS)
        w.rule(Action.DROP, CONTROL)
        w.resume(w.b, number)
        w.go(300 * MS)
        assert w.a.done() == [(1, 0)]
        assert w.b.get(into)[:5] == b"probe"


@pytest.mark.parametrize("jump", [-1, 1])
def test_the_clock_may_jump_at_a_move(jump: int) -> None:
    with Pair(engine={"clock_offset": 10**15}) as w:
        w.settle()
        w.b.recv(1, 16)
        w.a.send(1, b"unanswered")
        number = w.stop(w.a)
        w.go(10 * MS)
        w.resume(w.a, number, clock=10**15 + jump * 9 * 10**14)
        w.go(20 * MS)
        assert w.a.done() == [(1, 0)]
        w.echo()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("addresses", [(None, None), (NEW, None), (None, NEW), (NEW, "10.0.8.8")])
@pytest.mark.parametrize("gap", [0, 10, 3000, 200_000])
def test_both_ends_may_be_moved_at_the_same_time(
    addresses: tuple[str | None, str | None], first: int, gap: int
) -> None:
    with Pair() as w:
        w.settle()
        into = w.b.recv(1, 3000)
        w.a.send(1, bytes(range(200)) * 10)
        numbers = [w.stop(node) for node in w.nodes]
        w.go(30 * MS)
        for i in (first, 1 - first):
            w.resume(w.nodes[i], numbers[i], addresses[i])
            w.go(gap * MS)
        w.go(1 * S)
        assert w.a.done() == [(1, 0)]
        assert w.b.get(into)[:2000] == bytes(range(200)) * 10
        w.echo()
        assert w.a.dump().peer_gid == w.b.engine.gid
        assert w.b.dump().peer_gid == w.a.engine.gid


def test_a_late_nak_stopped_does_not_outlive_the_acknowledgement_of_the_resume() -> None:
    with Pair() as w:
        w.settle()
        w.b.recv(1, 16)
        w.rule(Action.DROP, 4, count=1)
        w.a.send(1, b"x")
        number = w.stop(w.a)
        w.go(1 * MS)
        w.rule(Action.DROP, RESUME, count=2)
        w.resume(w.a, number)
        w.inject(w.b.engine.gid, w.a.engine.gid, _nak_stopped(w, 0xFFFFF0))
        w.go(8 * MS)
        assert w.a.engine.counters()["nak_stopped_rx"] == 1
        assert w.a.done() == [(1, 0)]


def test_a_connection_made_while_stopped_works_after_the_resume() -> None:
    with Pair(connect=False) as w:
        w.a.qp.connect(w.a.path)
        w.go(5 * MS)
        w.b.engine.stop()
        w.b.engine.attach(False)
        w.b.qp.connect(w.b.path)
        w.go(100 * MS)
        w.b.engine.attach(True)
        w.b.engine.resume(clock_offset=77 * S)
        w.settle()
        w.echo()


def test_a_qp_may_go_away_while_stopped() -> None:
    with Pair(timeout=8, retry_cnt=1) as w:
        w.settle()
        w.a.send(1, b"x")
        number = w.stop(w.b)
        w.go(50 * MS)
        w.b.qp.free()
        w.resume(w.b, number)
        w.go(180 * S)
        assert w.a.done() == [(1, WcStatus.RETRY_EXC_ERR)]
        assert [n.engine.deadline() for n in w.nodes] == [NEVER, NEVER]


def test_ten_moves_of_each_end_under_traffic() -> None:
    with Pair(link=Link(loss=50_000, reorder=50_000, reorder_by=100_000, fair=2), arena=1 << 22) as w:
        w.settle()
        for i in range(10):
            for node in w.nodes:
                w.b.recv(100 + i, 20_000)
                w.a.send(i, bytes([i]) * 20_000)
                number = w.stop(node)
                w.go(7 * MS)
                w.resume(node, number, f"10.{i + 1}.0.{node.engine.index + 1}" if i % 2 else None)
                w.go(1 * S)
                w.echo(i)
        assert [s for _, s in w.a.done()] == [0] * len(w.a.wcs)


def test_an_undone_stop_costs_nothing() -> None:
    with Pair() as w:
        w.settle()
        w.b.recvs(5, 16)
        for i in range(5):
            w.a.send(i, b"x")
            w.a.engine.stop()
            w.a.engine.resume()
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(5)]


def test_a_read_whose_answer_was_under_way_is_answered_again_after_the_move() -> None:
    with Pair(link=Link(delay=200_000, ps_per_byte=1000)) as w:
        w.settle()
        data = bytes(i * 13 & 0xFF for i in range(300_000))
        source = w.b.put(data)
        into = w.a.read(1, 300_000, source, w.b)
        w.go(1 * MS)
        number = w.stop(w.b)
        w.go(50 * MS)
        w.resume(w.b, number)
        w.go(2 * S)
        assert w.a.done() == [(1, 0)]
        assert w.a.get(into) == data


def test_many_qps_of_an_engine_move_together() -> None:
    with Pair(arena=1 << 22) as w:
        w.settle()
        pairs = []
        for _ in range(64):
            x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
            x.connect(w.a.path.__class__(y.engine.gid, y.num))
            y.connect(w.a.path.__class__(x.engine.gid, x.num))
            pairs.append((x, y))
        w.settle()
        number = w.stop(w.b)
        w.go(50 * MS)
        w.resume(w.b, number, NEW)
        w.go(1 * S)
        d = dumps.parse(w.a.engine.dump())
        assert len(d.qps) == 65
        assert {q.peer_gid for q in d.qps} == {w.b.engine.gid}
        assert {q.mstate for q in d.qps} == {0}


# ---- who may redirect a connection ----------------------------------------------------------------------


def _nak_stopped(w: Pair, psn: int) -> bytes:
    """A NAK stopped for a, as b's stand-in sends it (without its ICRC)."""
    bth = bytes((17, 0x40, 0xFF, 0xFF, 1)) + w.a.qp.num.to_bytes(3, "big") + psn.to_bytes(4, "big")
    return bth + bytes((0x7F, 0, 0, 0))


def _stolen_resume(w: Pair) -> bytes:
    """A true RESUME of b's, as somebody on its way has seen it (without its ICRC)."""
    rule = w.rule(Action.CAPTURE, RESUME, src=1)
    number = w.stop(w.b)
    w.go(5 * MS)
    w.resume(w.b, number)
    w.go(500 * MS)
    assert w.hits(rule)
    return w.captured()[0].data[:-4]


def test_a_resume_with_a_wrong_token_changes_nothing() -> None:
    with Pair() as w:
        w.settle()
        true = _stolen_resume(w)
        refused = w.a.engine.counters()["resumes_refused"]
        for bit in range(128):
            forged = bytearray(true)
            forged[23] += 1  # a newer epoch
            forged[28 + bit // 8] ^= 1 << bit % 8
            forged[44:60] = b"\0" * 10 + b"\xff\xff\x0a\x06\x06\x06"
            w.inject(w.b.engine.gid, w.a.engine.gid, bytes(forged))
        w.go(100 * MS)
        assert w.a.engine.counters()["resumes_refused"] == refused + 128
        assert w.a.dump().peer_gid == w.b.engine.gid
        w.echo()


def test_a_replayed_resume_changes_nothing_after_the_next_move() -> None:
    with Pair() as w:
        w.settle()
        old = _stolen_resume(w)
        assert parse(old + b"1234").opcode == Op.RESUME
        w.clear_rules()
        number = w.stop(w.b)
        w.go(5 * MS)
        w.resume(w.b, number, NEW)
        w.go(500 * MS)
        for source in (w.b.engine.gid, w.a.engine.gid):
            w.inject(source, w.a.engine.gid, old)
        w.go(100 * MS)
        assert w.a.engine.counters()["resumes_refused"] == 2
        assert w.a.dump().peer_gid == w.b.engine.gid
        w.echo()


def test_a_second_token_is_not_taken() -> None:
    with Pair() as w:
        rule = w.rule(Action.CAPTURE, TOKEN, src=1)
        w.settle()
        assert w.hits(rule)
        token = bytearray(w.captured()[0].data[:-4])
        before = w.a.dump().peer_token
        assert bytes(token[28:44]) == before
        token[28] ^= 0xFF
        w.inject(w.b.engine.gid, w.a.engine.gid, bytes(token))
        w.go(100 * MS)
        assert w.a.dump().peer_token == before


def test_a_token_from_another_address_is_not_taken() -> None:
    with Pair() as w:
        w.rule(Action.STEAL, TOKEN, src=1)
        w.go(30 * MS)
        token = bytearray(w.captured()[0].data[:-4])
        w.inject(b"\0" * 10 + b"\xff\xff\x0a\x06\x06\x06", w.a.engine.gid, bytes(token))
        w.go(1 * MS)
        assert w.a.dump().have_peer_token == 0
        assert w.a.engine.counters()["rx_bad_source"] == 1


def test_a_forged_nak_stopped_delays_at_most_a_probe() -> None:
    """Whoever can send as the peer can do worse with a plain NAK; it must not stick, though."""
    with Pair(link=Link(delay=1 * MS)) as w:
        w.settle()
        w.b.recvs(2, 16)
        w.a.send(1, b"x")
        w.inject(w.b.engine.gid, w.a.engine.gid, _nak_stopped(w, 0xFFFFF0))
        w.run_for(1)
        assert w.a.engine.counters()["nak_stopped_rx"] == 1
        w.go(40 * MS)
        assert w.a.done() == [(1, 0)]
