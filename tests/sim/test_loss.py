# SPDX-License-Identifier: BSD-3-Clause
"""Promises about a network that loses, repeats and reorders, and about giving up in time."""

from __future__ import annotations

import pytest

from migroce.wire import parse

from .pair import Pair
from .records import MS, NEVER, US, Action, Link, S
from .verbs import QpState, WcStatus, WrOpcode

ACK, READ_RESP = 17, (13, 16)
RNR, RNR_MASK = 0x20, 0x60
SEND_ONLY, READ_REQ, WRITE_ONLY = 4, 12, 10
TOKEN, TOKEN_ACK = 0xC2, 0xC3


def timeout_ns(field: int) -> int:
    """The local ACK timeout of a QP attribute (IBA 9.7.6.1.3)."""
    return 4096 << field


@pytest.mark.parametrize("op", [SEND_ONLY, ACK])
@pytest.mark.parametrize("losses", [1, 2, 3])
def test_a_lost_tail_is_mended_in_milliseconds(op: int, losses: int) -> None:
    """Programs ask for 67 ms; nobody should wait that long for one lost packet."""
    with Pair(timeout=14) as w:
        w.settle()
        into = w.b.recv(1, 8)
        w.rule(Action.DROP, op, count=losses)
        w.a.send(1, b"tail")
        w.go(15 * MS << losses)
        assert w.a.done() == [(1, 0)]
        assert w.b.done() == [(1, 0)]
        assert w.b.get(into)[:4] == b"tail"


@pytest.mark.parametrize("op", range(17))
@pytest.mark.parametrize("skip", [0, 1])
def test_each_kind_of_packet_may_get_lost(op: int, skip: int) -> None:
    data = bytes(range(256)) * 16
    with Pair() as w:
        w.settle()
        w.rule(Action.DROP, op, skip=skip, count=2)
        into = w.b.recvs(4, 5000)
        target, source = w.b.space(4096), w.b.put(data)
        w.a.send(1, data)
        w.a.write(2, data, target, w.b)
        got = w.a.read(3, 4096, source, w.b)
        w.a.send(4, b"only")
        w.a.write(5, b"only", target, w.b)
        few = w.a.read(6, 4, source, w.b)
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(1, 7)]
        assert w.b.get(into[0])[:4096] == data
        assert w.b.get(target) == b"only" + data[4:]
        assert w.a.get(got) == data
        assert w.a.get(few) == data[:4]


@pytest.mark.parametrize("strip", [0, 1])
@pytest.mark.parametrize("last", ["READ", "atomic"])
def test_an_acknowledgement_never_names_a_read_or_atomic(last: str, strip: int) -> None:
    """rdma_rxe takes one for the answer and completes the request without its data."""
    with Pair(link=Link(strip=strip)) as w:
        w.go(5 * S)
        target, source = w.b.space(8), w.b.put(b"source!!")
        w.rule(Action.DROP, (13, 18), src=1, count=6)  # the answer, then acknowledgements of duplicates
        w.rule(Action.CAPTURE, ACK, src=1)
        w.a.write(1, b"first", target, w.b)
        into = w.a.space(8)
        opcode = WrOpcode.RDMA_READ if last == "READ" else WrOpcode.ATOMIC_FETCH_AND_ADD
        w.a.post(2, opcode, [into], **w.b.remote(source))
        w.go(5 * S)
        assert w.a.done() == [(1, 0), (2, 0)]
        assert w.a.get(into) == b"source!!"
        psns = {int.from_bytes(p.data[9:12], "big") for p in w.captured()}
        assert psns == {w.a.path.sq_psn}, "the WRITE's only"
        assert w.b.engine.counters()["duplicates"] > 0


def _answers_to_duplicates(count: int) -> list[tuple[int, int]]:
    """What answers the first `count` of WRITE, atomic, WRITE, READ: opcode, PSN from the first request's."""
    with Pair(link=Link(strip=1), engine={"batch_window": 20 * US}) as w:
        w.go(5 * S)
        target, word = w.b.space(8), w.b.put(b"source!!")
        w.rule(Action.DUP, src=0, delay=5 * MS, count=count)
        w.a.write(1, b"first", target, w.b)
        w.a.post(2, WrOpcode.ATOMIC_FETCH_AND_ADD, [w.a.space(8)], **w.b.remote(word))
        w.a.write(3, b"third", target, w.b)
        w.a.read(4, 5, target, w.b)
        w.go(1 * MS)
        assert w.a.done() == [(i, 0) for i in range(1, 5)]
        w.rule(Action.CAPTURE, src=1)
        w.go(5 * S)
        assert w.b.engine.counters()["duplicates"] == count
        answers = [parse(p.data) for p in w.captured()]
        return [(p.opcode, p.psn - w.a.path.sq_psn & 0xFFFFFF) for p in answers]


def test_a_duplicates_acknowledgement_does_not_overtake_answers_that_will_be_asked_for_again() -> None:
    """It would say that the atomic's answer is lost; rdma_rxe goes back once more for that."""
    assert _answers_to_duplicates(1) == [(ACK, 0)]


def test_what_comes_again_together_is_acknowledged_by_the_last_answer() -> None:
    """An old ACK where rdma_rxe has a part of a READ's answer ends the READ: SUCCESS, without its data."""
    assert _answers_to_duplicates(2) == [(18, 1)]
    assert _answers_to_duplicates(3) == [(18, 1), (ACK, 2)]
    assert _answers_to_duplicates(4) == [(18, 1), (16, 3)]


def _answers_beside_a_long_read(*copies: str, strip: int = 1) -> list[tuple[int, int]]:
    """What answers copies of W, R, S: a WRITE, a READ of three packets, another WRITE, executed before."""
    with Pair(link=Link(strip=strip), engine={"batch_window": 20 * US}) as w:
        w.go(5 * S)
        target = w.b.space(3000)
        w.rule(Action.CAPTURE, (WRITE_ONLY, READ_REQ), src=0)
        w.a.write(1, b"first", target, w.b)
        w.a.read(2, 3000, target, w.b)
        w.a.write(3, b"third", target, w.b)
        w.go(1 * S)
        assert w.a.done() == [(i, 0) for i in range(1, 4)]
        requests = w.captured()
        packets = dict(zip("WRS", requests, strict=True))
        w.clear_rules()
        w.rule(Action.CAPTURE, src=1)
        for together in copies:
            for name in together:
                packet = packets[name]
                w.inject(packet.src, packet.dst, packet.data, icrc=False, sport=packet.sport, sender=0)
            w.go(1 * S)
        answers = [parse(p.data) for p in w.captured()[len(requests):]]
        return [(p.opcode, p.psn - w.a.path.sq_psn & 0xFFFFFF) for p in answers]


READ_ANSWER = [(13, 1), (14, 2), (15, 3)]


def test_a_requester_that_may_have_half_a_read_gets_no_ack_of_what_was_before_it() -> None:
    """It ends the READ in rdma_rxe: SUCCESS, without its last bytes. The READ comes again, too."""
    assert _answers_beside_a_long_read("W") == []
    assert _answers_beside_a_long_read("WR") == READ_ANSWER
    assert _answers_beside_a_long_read("W", "R") == READ_ANSWER
    assert _answers_beside_a_long_read("WRS") == [*READ_ANSWER, (ACK, 4)]


def test_a_requester_that_repeats_only_what_was_before_the_read_gets_its_ack() -> None:
    """Its repetition of the READ was lost, or it waits for the ACK before it goes on."""
    assert _answers_beside_a_long_read("W", "W") == [(ACK, 0)]
    assert _answers_beside_a_long_read("W", "W", "W") == [(ACK, 0), (ACK, 0)]
    assert _answers_beside_a_long_read("WR", "W", "W") == [*READ_ANSWER, (ACK, 0)]


def test_what_was_behind_the_read_and_comes_again_is_acknowledged_at_once() -> None:
    assert _answers_beside_a_long_read("S") == [(ACK, 4)]


def test_a_peer_that_knows_the_extension_need_not_repeat_a_request_twice() -> None:
    assert _answers_beside_a_long_read("W", strip=0) == [(ACK, 0)]


def test_a_late_duplicate_write_does_not_undo_a_newer_one() -> None:
    with Pair() as w:
        target = w.b.space(8)
        w.rule(Action.DUP, WRITE_ONLY, count=1, delay=20 * MS)
        w.a.write(1, b"first", target, w.b)
        w.a.write(2, b"again", target, w.b)
        w.go()
        assert w.b.engine.counters()["duplicates"] == 1
        assert w.b.get(target)[:5] == b"again"
        assert w.a.done() == [(1, 0), (2, 0)]


@pytest.mark.parametrize("op", [SEND_ONLY, WRITE_ONLY, READ_REQ, ACK, 16])
def test_duplicates_of_everything_change_nothing(op: int) -> None:
    with Pair() as w:
        w.rule(Action.DUP, op, delay=50 * US)
        into = w.b.recvs(20, 8)
        target, source = w.b.space(8), w.b.put(b"source!!")
        results = []
        for i in range(5):
            w.a.send(10 * i, bytes([i] * 8))
            w.a.write(10 * i + 1, bytes([i] * 8), target, w.b)
            results.append(w.a.read(10 * i + 2, 8, source, w.b))
        w.go()
        assert [i for i, _ in w.a.done()] == [10 * i + k for i in range(5) for k in range(3)]
        assert len(w.b.wcs) == 5
        assert [w.b.get(sge) for sge in into[:5]] == [bytes([i] * 8) for i in range(5)]
        assert all(w.a.get(r) == b"source!!" for r in results)
    with Pair() as w:
        w.echo()


def test_a_damaged_packet_is_counted_and_comes_again() -> None:
    with Pair(link=Link(corrupt=300_000, fair=2)) as w:
        for i in range(20):
            w.echo(i)
        counted = sum(node.engine.counters()["rx_icrc"] for node in w.nodes)
        assert 0 < counted <= w.stats().corrupted


def test_a_lost_nak_is_not_the_end() -> None:
    with Pair() as w:
        w.settle()
        w.b.recvs(3, 8)
        w.rule(Action.DROP, SEND_ONLY, count=1)
        w.rule(Action.DROP, ACK, syndrome=0x60, count=1)
        for i in range(3):
            w.a.send(i, b"x")
        w.go()
        assert w.a.done() == [(0, 0), (1, 0), (2, 0)]


# ---- receiver not ready -----------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "wait"), [(1, 10 * US), (12, 640 * US), (20, 10_240 * US)])
def test_a_late_receive_delays_the_message_by_the_timer_asked_for(field: int, wait: int) -> None:
    with Pair(min_rnr_timer=field, link=Link(ps_per_byte=0)) as w:
        w.settle()
        start = w.now
        w.a.send(1, b"early")
        w.run_for(15 * US)  # the message has come and found nothing
        into = w.b.recv(1, 8)
        w.go()
        assert w.b.get(into)[:5] == b"early"
        assert start + wait <= w.b.wcs[0].t <= start + 2 * wait + 100 * US
        assert w.b.engine.counters()["rnr_naks_tx"] == 1


@pytest.mark.parametrize("retries", range(7))
def test_rnr_retries_run_out_after_as_many_as_were_asked_for(retries: int) -> None:
    with Pair(rnr_retry=retries, min_rnr_timer=10) as w:
        w.settle()
        w.a.send(1, b"x")
        w.a.send(2, b"y")
        w.go()
        assert w.a.done() == [(1, WcStatus.RNR_RETRY_EXC_ERR), (2, WcStatus.WR_FLUSH_ERR)]
        assert w.b.engine.counters()["rnr_naks_tx"] == retries + 1
        assert w.a.qp.state() is QpState.ERR
        assert w.b.qp.state() is QpState.RTS


def test_rnr_retry_7_waits_for_ever() -> None:
    with Pair(rnr_retry=7, retry_cnt=1, timeout=8, min_rnr_timer=20) as w:
        w.a.send(1, b"patient")
        w.go(120 * S)
        assert w.a.wcs == []
        w.b.recv(1, 8)
        w.go(1 * S)
        assert w.a.done() == [(1, 0)]


# ---- giving up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [8, 11, 14, 16])
@pytest.mark.parametrize("retry_cnt", [0, 1, 3, 7])
def test_a_peer_that_is_gone_is_given_up_in_the_time_iba_asks_for(timeout: int, retry_cnt: int) -> None:
    """IBA 9.7.6.1.3: each of retry_cnt + 1 tries lasts between one and four timeouts."""
    with Pair(timeout=timeout, retry_cnt=retry_cnt) as w:
        w.settle()
        w.a.recvs(2, 8)
        w.b.engine.attach(False)
        start = w.now
        for i in range(3):
            w.a.send(i, b"anybody there?", flags=0)
        least = (retry_cnt + 1) * timeout_ns(timeout)
        w.go(least - 1)
        assert w.a.wcs == []
        assert w.a.qp.state() is QpState.RTS
        w.go(4 * least)
        sends = [(wc.wr_id, wc.status) for wc in w.a.wcs if wc.opcode != 128]
        assert w.a.wcs[0][:2] == (w.a.wcs[0].t, 0)
        assert w.a.wcs[0].status == WcStatus.RETRY_EXC_ERR
        assert start + least <= w.a.wcs[0].t <= start + 4 * least
        assert sends[1:3] == [(1, WcStatus.WR_FLUSH_ERR), (2, WcStatus.WR_FLUSH_ERR)]
        assert len(w.a.wcs) == 5, "two receives are flushed too"
        assert w.a.qp.state() is QpState.ERR
        assert w.a.engine.deadline() == NEVER


def test_a_timeout_of_0_never_gives_up() -> None:
    with Pair(timeout=0, retry_cnt=1) as w:
        w.settle()
        into = w.b.recv(1, 8)
        w.link(Link(down=1))
        w.a.send(1, b"still")
        w.go(300 * S)
        assert w.a.wcs == []
        w.link(Link())
        w.go(5 * S)
        assert w.a.done() == [(1, 0)]
        assert w.b.get(into)[:5] == b"still"


def test_progress_resets_the_retries() -> None:
    """Each packet of a long message is lost twice: three tries suffice for any number of them."""
    with Pair(timeout=8, retry_cnt=3, link=Link(loss=900_000, fair=2)) as w:
        into = w.b.recv(1, 40_000)
        data = bytes(i * 7 & 0xFF for i in range(40_000))
        w.a.send(1, data)
        w.go(10 * S)
        assert w.a.done() == [(1, 0)]
        assert w.b.get(into) == data


def test_a_broken_network_that_heals_in_time_is_never_noticed() -> None:
    with Pair(timeout=12, retry_cnt=7) as w:
        w.settle()
        w.link(Link(down=1))
        w.b.recv(1, 8)
        w.a.send(1, b"wait")
        w.go(13 * timeout_ns(12) // 2)
        w.link(Link())
        w.go(1 * S)
        assert w.a.done() == [(1, 0)]


def test_a_dead_qp_is_silent_and_flushes_what_is_posted() -> None:
    with Pair(timeout=8, retry_cnt=0) as w:
        w.settle()
        w.b.engine.attach(False)
        w.a.send(1, b"x")
        w.go(1 * S)
        sent = w.stats().sent
        w.a.send(2, b"late", flags=0)
        w.a.recv(3, 8)
        w.go(10 * S)
        assert w.a.done() == [
            (1, WcStatus.RETRY_EXC_ERR),
            (2, WcStatus.WR_FLUSH_ERR),
            (3, WcStatus.WR_FLUSH_ERR),
        ]
        assert w.stats().sent == sent


def _sent(w: Pair, op: int) -> list[int]:
    """PSNs of a's packets of this kind, relative to its first; captured by a rule before."""
    first = w.a.path.sq_psn
    psns = [int.from_bytes(p.data[9:12], "big") for p in w.captured() if p.data[0] == op]
    return [(psn - first) & 0xFFFFFF for psn in psns]


def _waits_for_a_lost_ack(w: Pair) -> None:
    """When the ACK of a SEND of a's is lost, it is repeated after the whole timeout (14), not before."""
    w.b.recv(1, 8)
    w.rule(Action.DROP, ACK, src=1, count=1)
    w.a.send(1, b"tail")
    w.go(timeout_ns(14) - 1 * MS)
    assert w.a.engine.counters()["retransmits"] == 0
    w.go(2 * MS)


def test_a_peer_without_the_extension_gets_the_standards_time() -> None:
    """A slow peer is not drowned in repetitions."""
    with Pair(link=Link(strip=1), timeout=14) as w:
        w.go(5 * S)
        _waits_for_a_lost_ack(w)
        assert w.a.engine.counters()["retransmits"] == 1
        assert w.a.done() == [(1, 0)]


def test_the_capability_bit_alone_makes_no_peer_of_ours() -> None:
    """It is reserved, and no ICRC covers it: a network may set it in the packets of any peer."""
    with Pair(timeout=14) as w:
        w.rule(Action.DROP, (TOKEN, TOKEN_ACK))
        w.go(5 * S)
        _waits_for_a_lost_ack(w)
        assert w.a.done() == [(1, 0)]


def test_a_peer_that_turns_out_to_be_ours_is_not_waited_for_so_long() -> None:
    """What was sent before it was ready comes again soon after its announcement."""
    with Pair(connect=False, timeout=14) as w:
        w.a.qp.connect(w.a.path)
        w.a.send(1, b"early")
        w.go(1 * MS)
        w.b.qp.connect(w.b.path, QpState.RTS)
        w.b.recv(1, 8)
        w.go(15 * MS)
        assert w.a.done() == [(1, 0)]


def test_empty_requests_wait_for_data_of_a_peer_without_the_extension() -> None:
    """rdma_rxe refuses a repeated READ when what it executed last was empty."""
    with Pair(link=Link(strip=1), timeout=14) as w:
        w.go(5 * S)
        source = w.b.put(b"source!!")
        w.rule(Action.CAPTURE, (READ_REQ, READ_REQ), src=0)
        w.rule(Action.CAPTURE, (WRITE_ONLY, WRITE_ONLY), src=0)
        w.rule(Action.DROP, (13, 16), src=1, count=1)
        got = w.a.read(1, 8, source, w.b)
        w.a.write(2, b"", source, w.b)
        w.go(10 * MS)
        assert _sent(w, WRITE_ONLY) == []
        w.go(1 * S)
        assert w.a.done() == [(1, 0), (2, 0)]
        assert _sent(w, READ_REQ) == [0, 0]
        assert _sent(w, WRITE_ONLY) == [1]
        assert w.a.get(got) == b"source!!"


@pytest.mark.parametrize("later", [False, True])
def test_an_empty_read_needs_no_answer_of_its_own(later: bool) -> None:
    """rdma_rxe does not answer a repeated one; an acknowledgement of what follows does."""
    with Pair(link=Link(strip=1)) as w:
        w.go(5 * S)
        source = w.b.space(8)
        w.rule(Action.DROP, (13, 16), src=1)  # never
        if later:
            w.rule(Action.DROP, ACK, src=1, count=1)  # the first one, too
        w.a.read(1, 0, source, w.b)
        w.a.write(2, b"follows", source, w.b)
        w.go(5 * S)
        assert w.a.done() == [(1, 0), (2, 0)]
        assert w.b.get(source)[:7] == b"follows"


def test_what_follows_an_empty_read_may_be_a_long_one_however_small_the_window() -> None:
    """Nothing else can tell that the empty one, whose answer was lost, has been executed."""
    with Pair(link=Link(strip=1), timeout=14) as w:
        w.go(5 * S)
        source = w.b.put(bytes(range(200)) * 100)
        for n in range(6):
            w.rule(Action.DROP, WRITE_ONLY, count=1)
            w.a.write(n, b"lost once", w.b.space(16), w.b)
            w.go(1 * S)
        w.rule(Action.DROP, 16, src=1)
        w.a.read(7, 0, source, w.b)
        got = w.a.read(8, 20000, source, w.b)
        w.go(30 * S)
        assert w.a.done()[6:] == [(7, 0), (8, 0)]
        assert w.a.get(got) == bytes(range(200)) * 100


def test_a_peer_without_the_extension_is_not_asked_again() -> None:
    """An announcement that comes between a READ's answers would break rdma_rxe's QP."""
    with Pair(link=Link(strip=1)) as w:
        source = w.b.put(bytes(200) * 100)
        w.rule(Action.CAPTURE, ACK, src=1)
        w.a.read(1, 20000, source, w.b)
        w.go(5 * S)
        assert w.a.done() == [(1, 0)]
        assert w.captured() == []
