# SPDX-License-Identifier: BSD-3-Clause
"""Promises about the packets themselves: what other implementations see of us."""

from __future__ import annotations

import pytest

from migroce.wire import Packet, parse

from .pair import Pair
from .records import MS, US, Action, Caps, Link, S, Wr
from .verbs import SendFlag, WrOpcode

SOLICITED = SendFlag.SIGNALED | SendFlag.SOLICITED


def _talk(w: Pair) -> tuple[list[Packet], list[Packet]]:
    """Everything a and b send while a does each operation with three and with one packet."""
    w.settle()
    w.rule(Action.CAPTURE)
    w.b.recvs(4, 3000)
    at = w.b.space(2500)
    for size in (2500, 7):
        data = bytes(i & 0xFF for i in range(size))
        w.a.send(1, data, flags=SOLICITED)
        w.a.write(2, data, at, w.b)
        w.a.post(3, WrOpcode.RDMA_WRITE_WITH_IMM, [w.a.put(data)], imm=0xA1B2C3D4, **w.b.remote(at))
        w.a.read(4, size, at, w.b)
    w.go()
    packets = w.captured()
    return (
        [parse(p.data) for p in packets if p.sender == 0],
        [parse(p.data) for p in packets if p.sender == 1],
    )


def test_requests_look_as_iba_has_them() -> None:
    with Pair(caps=Caps(inline=0)) as w:
        requests, _ = _talk(w)
        at = requests[3].reth
        assert at is not None
        assert [p.opcode for p in requests] == [0, 1, 2, 6, 7, 8, 6, 7, 9, 12, 4, 10, 11, 12]
        psns = [(0xFFFFF0 + i) & 0xFFFFFF for i in (*range(10), *range(12, 16))]
        assert [p.psn for p in requests] == psns, "a READ takes a PSN for each packet of its answer"
        assert [i for i, p in enumerate(requests) if p.solicited] == [2, 10]
        assert all(p.ackreq for p in requests if p.opcode in (2, 8, 9, 12, 4, 10, 11))
        assert [p.reth.length for p in requests if p.reth] == [2500, 2500, 2500, 7, 7, 7]
        assert {p.reth.va for p in requests if p.reth} == {at.va}
        assert [p.imm for p in requests if p.imm is not None] == [0xA1B2C3D4] * 2
        assert [(len(p.payload), p.pad) for p in requests[:3]] == [(1024, 0), (1024, 0), (452, 0)]
        assert [(len(p.payload), p.pad) for p in requests[10:12]] == [(7, 1), (7, 1)]
        assert {(p.pkey, p.capable, p.dest_qpn) for p in requests} == {(0xFFFF, True, w.b.qp.num)}


def test_answers_look_as_iba_has_them() -> None:
    with Pair() as w:
        _, answers = _talk(w)
        data = [p for p in answers if p.opcode != 17]
        assert [p.opcode for p in data] == [13, 14, 15, 16]
        assert [p.psn for p in data] == [0xFFFFF9, 0xFFFFFA, 0xFFFFFB, 0xFFFFFF]
        assert [p.aeth.syndrome if p.aeth else None for p in data] == [0x1F, None, 0x1F, 0x1F]
        assert [p.aeth.msn for p in data if p.aeth] == [4, 4, 8]
        acks = [p for p in answers if p.opcode == 17]
        assert acks
        assert {p.aeth.syndrome for p in acks if p.aeth} == {0x1F}
        assert all(not p.ackreq and not p.solicited for p in answers)


def test_a_sequence_nak_names_the_packet_that_is_missing() -> None:
    with Pair() as w:
        w.settle()
        w.b.recvs(3, 8)
        w.rule(Action.DROP, 4, skip=1, count=1)
        w.rule(Action.CAPTURE, 17, syndrome=0x60)
        for i in range(3):
            w.a.send(i, b"x")
        w.go()
        naks = [parse(p.data) for p in w.captured()]
        assert [(p.psn, p.aeth.msn if p.aeth else None) for p in naks] == [(0xFFFFF1, 1)]
        assert w.a.done() == [(0, 0), (1, 0), (2, 0)]


def test_an_rnr_nak_carries_the_timer_that_was_asked_for() -> None:
    with Pair(min_rnr_timer=23) as w:
        w.settle()
        w.rule(Action.CAPTURE, 17, syndrome=0x20, syndrome_mask=0x60)
        w.a.send(1, b"x")
        w.go(1 * MS)
        (nak,) = (parse(p.data) for p in w.captured())
        assert nak.aeth is not None
        assert (nak.psn, nak.aeth.syndrome) == (0xFFFFF0, 0x20 | 23)


def test_the_flow_of_a_connection_is_one_and_looks_as_rxe_makes_it() -> None:
    with Pair(tclass=0x68, hop_limit=17) as w:
        w.rule(Action.CAPTURE)
        w.echo()
        packets = w.captured()
        flow = w.a.qp.num * w.b.qp.num
        flow ^= flow >> 20
        flow ^= flow >> 40
        flow &= 0xFFFFF
        sport = 0xC000 | ((flow & 0x3FFF) ^ (flow >> 14))
        assert {(p.sport, p.tclass, p.hop_limit) for p in packets} == {(sport, 0x68, 17)}


@pytest.mark.parametrize("n", [1, 8, 200])
def test_acknowledgements_are_few(n: int) -> None:
    """Requests that come together are acknowledged together."""
    with Pair(caps=Caps(send_wr=256, recv_wr=256), engine={"batch_window": 50 * US}) as w:
        w.settle()
        w.b.recvs(n, 8)
        rule = w.rule(Action.CAPTURE, 17, src=1)
        sge = w.a.put(b"x")
        for i in range(0, n, 40):
            w.a.qp.post_send(
                *(Wr(k, (sge,), WrOpcode.SEND, SendFlag.SIGNALED) for k in range(i, min(i + 40, n)))
            )
        w.go()
        assert w.a.done() == [(i, 0) for i in range(n)]
        assert w.hits(rule) <= 1 + n / 4


def test_a_network_without_faults_sees_nothing_twice_whatever_its_delay() -> None:
    for delay in (0, 10 * US, 1 * MS, 20 * MS):
        with Pair(link=Link(delay=delay), timeout=14, arena=1 << 22) as w:
            w.settle()
            at = w.b.space(300_000)
            for i in range(5):
                w.a.write(i, bytes([i]) * 300_000, at, w.b)
            w.go(20_000 * MS)
            assert w.a.done() == [(i, 0) for i in range(5)]
            assert w.a.engine.counters()["timeouts"] == 0
            if delay < MS:
                assert w.a.engine.counters()["retransmits"] == 0


@pytest.mark.parametrize(("strip", "most"), [(1, 128), (0, 512)], ids=["plain peer", "capable peer"])
def test_a_peer_of_another_kind_is_not_sent_more_than_rdma_rxe_would_send(strip: int, most: int) -> None:
    """In flight when acknowledgements stay away: its queue grows no longer than behind rdma_rxe."""
    with Pair(link=Link(strip=strip), arena=4 << 20, timeout=14) as w:
        w.go(5 * S)  # both ends have made up their minds
        at, data = w.b.space(1 << 20), bytes(1 << 20)
        for i in range(4):  # the window opens
            w.a.write(i, data[: 1 << 18], at, w.b)
            w.b.write(i, data[:1], w.a.space(1), w.a)
        w.go()
        w.rule(Action.DROP, 17, src=1)
        w.rule(Action.CAPTURE, (6, 8), src=0)
        w.a.write(9, data, at, w.b)
        w.go(3 * MS)
        psns = {parse(p.data).psn for p in w.captured()}
        assert len(psns) == most
