# SPDX-License-Identifier: BSD-3-Clause
"""UC: whole messages in order or nothing, no answer on the wire, moves at any instant."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from .pair import Node, Pair, no_write
from .records import MS, US, Action, Caps, Link, Sge, VerbsError, Wr
from .verbs import Event, QpState, QpType, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode

SEND_FIRST, SEND_MIDDLE, SEND_LAST, SEND_ONLY, WRITE_FIRST, WRITE_MIDDLE = 0x20, 0x21, 0x22, 0x24, 0x26, 0x27
UC = (0x20, 0x3F)


class Uc(Pair):
    """Two connected UC QPs that know each other."""

    def __init__(self, *, settle: bool = True, **more: Any):
        super().__init__(kind=QpType.UC, **more)
        if settle:
            self.settle()


def test_every_operation() -> None:
    """SEND and WRITE, with and without immediate, of one packet and of many."""
    with Uc(mtu=256) as p:
        into = p.b.recvs(5, 1500)
        region = p.b.space(4000)
        long = random.Random(1).randbytes(1400)
        p.a.send(1, b"short")
        p.a.send(2, long)
        p.a.post(3, WrOpcode.SEND_WITH_IMM, [p.a.put(long[:700]), p.a.put(long[700:])], imm=77)
        p.a.write(4, long, region, p.b)
        behind = p.b.remote(region._replace(addr=region.addr + 2000))
        p.a.post(5, WrOpcode.RDMA_WRITE_WITH_IMM, [p.a.put(long[:300])], imm=78, **behind)
        p.a.send(6, b"", flags=SendFlag.SIGNALED | SendFlag.SOLICITED)
        p.go()
        assert p.a.done() == [(i, 0) for i in range(1, 7)]
        assert [(wc.opcode, wc.byte_len, wc.imm, wc.src_qp) for wc in p.b.wcs] == [
            (WcOpcode.RECV, 5, 0, p.a.qp.num), (WcOpcode.RECV, 1400, 0, p.a.qp.num),
            (WcOpcode.RECV, 1400, 77, p.a.qp.num), (WcOpcode.RECV_RDMA_WITH_IMM, 300, 78, p.a.qp.num),
            (WcOpcode.RECV, 0, 0, p.a.qp.num),
        ]  # fmt: skip
        assert not any(wc.flags & WcFlag.GRH for wc in p.b.wcs)
        assert p.b.get(into[1])[:1400] == long == p.b.get(into[2])[:1400] == p.b.get(region)[:1400]
        assert p.b.get(region)[2000:2300] == long[:300]


def test_nothing_is_answered() -> None:
    """No acknowledgement, no NAK, no retry: requests alone are on the wire."""
    with Uc(mtu=256) as p:
        p.rule(Action.CAPTURE)
        p.a.send(1, b"nobody receives this" * 50)
        p.a.write(2, b"x" * 600, p.b.space(600)._replace(addr=12345), p.b)
        p.go(20 * MS)
        ops = [d.data[0] for d in p.captured()]
        assert len(ops) == 4 + 3
        assert all(0x20 <= op < 0x2C for op in ops)
        assert all(not d.data[8] & 0x80 for d in p.captured())
        assert p.a.done() == [(1, 0), (2, 0)]
        assert not p.b.wcs
        assert p.b.qp.state() is QpState.RTS


def test_read_is_refused() -> None:
    """UC has no READ: EINVAL."""
    with Uc() as p, pytest.raises(VerbsError) as e:
        p.a.read(1, 8, p.b.space(8), p.b)
    assert e.value.errno == errno.EINVAL


@pytest.mark.parametrize("lost", [SEND_FIRST, SEND_MIDDLE, SEND_LAST])
def test_a_lost_packet_costs_its_message(lost: int) -> None:
    """The message is dropped without a word, its receive request serves the next one (IBA 9.8.3)."""
    with Uc(mtu=256) as p:
        into = p.b.recvs(2, 2000)
        p.rule(Action.DROP, lost, count=1)
        data = [bytes([i]) * 1000 for i in range(3)]
        for i in range(3):
            p.a.send(i, data[i])
        p.go()
        assert p.a.done() == [(0, 0), (1, 0), (2, 0)]
        assert [(wc.wr_id, wc.status, wc.byte_len) for wc in p.b.wcs] == [(0, 0, 1000), (1, 0, 1000)]
        assert p.b.get(into[0])[:1000] == data[1]
        assert p.b.get(into[1])[:1000] == data[2]
        # A lost LAST shows when the next message begins.
        assert p.b.engine.counters()["rx_dropped"] >= (0 if lost == SEND_FIRST else 1)


def test_a_write_broken_off() -> None:
    """What came before the lost packet is in memory, nothing behind it, and no completion."""
    with Uc(mtu=256) as p:
        p.b.recv(7, 100)
        region = p.b.space(1024)
        p.rule(Action.DROP, WRITE_MIDDLE, count=1, skip=1)
        p.a.post(1, WrOpcode.RDMA_WRITE_WITH_IMM, [p.a.put(b"w" * 1024)], imm=9, **p.b.remote(region))
        p.go()
        assert p.a.done() == [(1, 0)]
        assert not p.b.wcs
        assert p.b.get(region) == b"w" * 512 + bytes(512)
        p.a.send(2, b"next")
        p.go()
        assert p.b.done() == [(7, 0)]


def test_protection() -> None:
    """WRITEs that are not allowed do nothing; the connection goes on."""
    with Uc() as p:
        region = p.b.space(64)
        out = region._replace(addr=p.b.engine.base + (1 << 20) - 4)
        for i, more in enumerate(({"rkey": 1}, {"remote_addr": out.addr})):
            p.a.write(i, b"x" * 64, region, p.b, **more)
        p.go()
        assert p.b.get(region) == bytes(64)
        p.echo()
    with Uc(access=no_write()) as p:
        region = p.b.space(64)
        p.a.write(1, b"x" * 64, region, p.b)
        p.go()
        assert p.b.get(region) == bytes(64)
        assert p.b.qp.state() is QpState.RTS


def test_no_or_short_receive() -> None:
    """Without a receive request, or with one that is too short, a message is lost, the request is not."""
    with Uc(mtu=256) as p:
        p.a.send(1, b"x" * 600)
        p.go()
        p.b.recv(7, 500)
        p.a.send(2, b"y" * 600)
        p.a.send(3, b"z" * 500)
        p.go()
        assert p.b.done() == [(7, 0)]
        assert p.b.wcs[0].byte_len == 500


def test_send_queue_error_state() -> None:
    """A bad request ends sending until it is mended; receiving goes on."""
    with Uc() as p:
        p.a.recv(70, 100)
        p.b.recv(71, 100)
        bad = p.a.put(b"x")
        p.a.post(1, WrOpcode.SEND, [Sge(bad.addr, 1, bad.lkey ^ 5)])
        p.a.send(2, b"flushed")
        p.go()
        p.b.send(3, b"heard")
        p.go()
        assert p.a.qp.state() is QpState.SQE
        assert p.a.done() == [(1, WcStatus.LOC_PROT_ERR), (2, WcStatus.WR_FLUSH_ERR), (70, 0)]
        p.a.qp.modify(QpState.RTS)
        p.a.send(4, b"mended")
        p.go()
        assert p.b.done()[-1] == (71, 0)


def test_a_bad_receive_is_fatal() -> None:
    """A receive request without memory fails, and the QP with it."""
    with Uc() as p:
        sge = p.b.space(200)
        p.b.qp.post_recv(Wr(7, (Sge(sge.addr, 200, sge.lkey ^ 1),)))
        p.a.send(1, b"x")
        p.go()
        assert p.b.done() == [(7, WcStatus.LOC_PROT_ERR)]
        assert p.b.qp.state() is QpState.ERR
        assert Event.QP_FATAL in [e.type for e in p.events()]


def test_drained() -> None:
    """SQD holds new messages back; the event comes as soon as the last one is out."""
    with Uc() as p:
        p.b.recvs(2, 100)
        p.a.send(1, b"x")
        p.go()
        p.a.qp.modify(QpState.SQD)
        p.a.send(2, b"held")
        p.go()
        assert p.a.done() == [(1, 0)]
        p.a.qp.modify(QpState.RTS)
        p.go()
        assert p.a.done() == [(1, 0), (2, 0)]
        assert len(p.b.wcs) == 2


def test_whole_in_order_at_most_once() -> None:
    """Under loss, copies, damage and delays: each message once or not at all, in order, unharmed."""
    arrived = 0
    for seed in range(25):
        rng = random.Random(seed)
        link = Link(
            jitter=20 * US, loss=rng.choice((0, 20_000, 100_000)), corrupt=20_000, dup=50_000,
            reorder=rng.choice((0, 50_000)), reorder_by=100 * US,
        )  # fmt: skip
        with Uc(seed=seed, link=link, caps=Caps(128, 128), mtu=256, settle=False, arena=1 << 21) as p:
            sizes = [rng.choice((0, 1, rng.randint(0, 256), rng.randint(0, 3000))) for _ in range(80)]
            sent = [n.to_bytes(2, "big") + rng.randbytes(size) for n, size in enumerate(sizes)]
            into = p.b.recvs(80, 3100)
            for i, data in enumerate(sent):
                p.a.send(1000 + i, data)
                if rng.random() < 0.3:
                    p.go(100 * US)
            p.go()
            assert p.a.done() == [(1000 + i, 0) for i in range(80)]
            got = [p.b.get(into[wc.wr_id])[: wc.byte_len] for wc in p.b.wcs]
            assert [wc.wr_id for wc in p.b.wcs] == list(range(len(got)))
            numbers = [int.from_bytes(data[:2], "big") for data in got]
            assert numbers == sorted(set(numbers))
            assert got == [sent[n] for n in numbers]
            arrived += len(got)
    assert 700 < arrived < 2000


@pytest.mark.parametrize("address", [None, "10.7.7.7"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_move(side: str, address: str | None) -> None:
    """What is posted while stopped goes out after the resume; both find each other at a new address."""
    with Uc() as p:
        mover: Node = getattr(p, side)
        p.rule(Action.CAPTURE, UC)
        n = p.stop(mover)
        into = p.b.recv(7, 2000) if mover is p.a else p.a.recv(7, 2000)
        mover.send(1, b"posted while stopped" * 60)
        p.go()
        assert not p.captured()
        assert not mover.wcs
        other = p.b if mover is p.a else p.a
        other.send(2, b"lost")  # nobody is told, nothing waits
        p.go()
        assert other.done() == [(2, 0)]
        p.resume(mover, n, address, clock=123 * MS)
        p.go()
        assert mover.done() == [(1, 0)]
        assert other.done()[-1] == (7, 0)
        assert other.get(into)[:1200] == b"posted while stopped" * 60
        assert other.dump().peer_gid == mover.engine.gid
        for i in range(3):
            p.echo(i)


def test_the_standin_answers_uc_requests_with_nothing() -> None:
    """A UC request to a stopped end gets no NAK; only a moved one points to its new address."""
    with Uc() as p:
        p.rule(Action.CAPTURE, dst=p.a.engine.index)
        n = p.stop(p.b)
        before = len(p.captured())
        for i in range(5):
            p.a.send(i, b"into the void")
        p.go()
        assert len(p.captured()) == before
        assert p.a.dump().mstate == 0
        p.resume(p.b, n)
        p.go()
        p.echo()


def test_a_queue_that_runs_dry_is_told_until_something_is_posted() -> None:
    """When its last request is complete, not before: the rest of a long message must be received."""
    with Uc(mtu=256, link=Link(ps_per_byte=6_500_000)) as p:
        p.b.recvs(2, 600)
        p.a.send(0, b"one")
        p.go(5 * MS)
        assert not p.b.engine.dry()
        p.a.send(1, b"2" * 600)  # packets of 2 ms each
        p.go(4 * MS)
        assert not p.b.engine.dry()
        assert p.b.done() == [(0, 0)]
        p.go(20 * MS)
        assert p.b.engine.dry()
        assert p.b.done() == [(0, 0), (1, 0)]
        p.b.recv(2, 600)
        assert not p.b.engine.dry()
        assert not p.a.engine.dry()


def test_a_reliable_queue_that_runs_dry_is_nothing_to_tell() -> None:
    """Its peer is told to wait."""
    with Pair() as p:
        p.b.recv(0, 100)
        p.a.send(0, b"only one")
        p.go(5 * MS)
        assert p.b.done() == [(0, 0)]
        assert not p.b.engine.dry()


def test_the_sender_keeps_step_with_a_peer_that_tells() -> None:
    """It does not run more than 1024 packets ahead, so that a slow peer's socket does not overflow."""
    with Uc(mtu=256, arena=1 << 22, link=Link(delay=500 * US)) as p:
        p.b.recvs(12, 65536)
        before = p.stats().sent
        for i in range(12):
            p.a.send(i, b"k" * 65536)
        p.go(400 * US)
        assert p.stats().sent - before == 1024
        p.go(100 * MS)
        assert p.a.done() == p.b.done() == [(i, 0) for i in range(12)]


def test_a_peer_that_falls_silent_delays_the_sender_once() -> None:
    """Without a word from it (it is stopped, it receives nothing, its reports are lost) sending goes on."""
    with Uc(mtu=256, arena=1 << 22) as p:
        p.b.recvs(12, 65536)
        p.rule(Action.DROP, 17, src=p.b.engine.index)
        for i in range(12):
            p.a.send(i, b"s" * 65536)
        p.go(490 * MS)
        assert p.b.done() == [(i, 0) for i in range(4)]  # 1024 packets
        p.go(20 * MS)
        assert p.a.done() == [(i, 0) for i in range(12)]
        assert p.b.done() == [(i, 0) for i in range(12)]


def test_a_peer_that_is_heard_again_is_waited_for_again() -> None:
    with Uc(mtu=256, arena=1 << 22, link=Link(delay=500 * US)) as p:
        p.b.recvs(13, 65536)
        p.rule(Action.DROP, 17, src=p.b.engine.index)
        for i in range(5):
            p.a.send(i, b"s" * 65536)
        p.go(600 * MS)
        assert p.a.done() == [(i, 0) for i in range(5)]
        p.clear_rules()
        p.a.send(5, b"h" * 65536)
        p.go(5 * MS)
        before = p.stats().sent
        for i in range(6, 13):
            p.a.send(i, b"s" * 65536)
        p.go(400 * US)
        assert p.stats().sent - before == 1024
        p.go(100 * MS)
        assert p.b.done() == [(i, 0) for i in range(13)]


def test_both_move_at_once_to_other_addresses() -> None:
    """Each RESUME finds the other's stand-in at the old address first, which points on."""
    with Uc() as p:
        a, b = p.stop(p.a), p.stop(p.b)
        p.a.send(1, b"kept")
        p.b.recv(7, 100)
        p.go(5 * MS)
        p.resume(p.a, a, "10.7.7.7")
        p.go(3 * MS)
        p.resume(p.b, b, "10.8.8.8")
        p.go(2000 * MS)
        assert p.a.done() == [(1, 0)]
        assert p.b.done() == [(7, 0)]
        assert p.a.dump().peer_gid == p.b.engine.gid
        assert p.b.dump().peer_gid == p.a.engine.gid
        p.echo()


def test_moves_in_the_middle_of_a_stream() -> None:
    """Moves at any instant: what arrives is whole, in order, once; afterwards everything arrives."""
    for seed in range(12):
        rng = random.Random(seed)
        with Uc(seed=seed, caps=Caps(128, 128), mtu=256, arena=1 << 21, link=Link(loss=20_000)) as p:
            p.go(5 * MS)
            into = p.b.recvs(100, 3100)
            sent: list[bytes] = []

            def send(n: int, *, rng: random.Random = rng, p: Uc = p, sent: list[bytes] = sent) -> None:
                for _ in range(n):
                    sent.append(len(sent).to_bytes(2, "big") + rng.randbytes(rng.randint(0, 3000)))
                    p.a.send(5000 + len(sent), sent[-1])

            for move in range(3):
                send(rng.randint(1, 12))
                p.go(rng.randint(0, 40) * US)
                mover = rng.choice((p.a, p.b))
                n = p.stop(mover)
                send(rng.randint(0, 8))
                p.go(rng.randint(0, 3 * MS))
                p.resume(mover, n, rng.choice((None, f"10.0.{move + 3}.{seed + 1}")), rng.getrandbits(40))
                p.go(rng.randint(0, 300) * US)
            p.go(500 * MS)
            p.link(Link())
            before = len(p.b.wcs)
            send(10)
            p.go(500 * MS)
            got = [p.b.get(into[wc.wr_id])[: wc.byte_len] for wc in p.b.wcs]
            numbers = [int.from_bytes(data[:2], "big") for data in got]
            assert numbers == sorted(set(numbers))
            assert got == [sent[n] for n in numbers]
            assert len(got) - before == 10
            assert [wc.status for wc in p.a.wcs] == [0] * len(sent)


def test_hostile_packets() -> None:
    """Any opcode, PSN, length or key from the peer's address: nothing out of bounds, nothing stuck."""
    with Uc(mtu=256) as p:
        region = p.b.space(512)
        open_to_all = p.b.engine.mr(p.b.pd, region.addr - p.b.engine.base, 512)
        guard = p.b.space(600)
        p.b.recvs(50, 600)
        rng = random.Random(9)
        psn = 0xFFFFF0
        for _ in range(4000):
            op = rng.choice((0x20 + rng.randrange(12), rng.randrange(256)))
            psn = rng.choice((psn + 1, psn, rng.getrandbits(24), psn - 3)) & 0xFFFFFF
            reth = rng.choice((region.addr, region.addr + 400, 0)).to_bytes(8, "big")
            reth += rng.choice((open_to_all.rkey, 7)).to_bytes(4, "big")
            reth += rng.choice((0, 256, 512, 1 << 31)).to_bytes(4, "big")
            body = rng.choice((b"", reth)) + b"h" * rng.choice((0, 1, 4, 16, 256, 512))
            bth = bytes((op, 0, 0xFF, 0xFF, 0)) + p.b.qp.num.to_bytes(3, "big")
            bth += b"\0" + psn.to_bytes(3, "big")
            p.inject(p.a.engine.gid, p.b.engine.gid, bth + body)
        p.go()
        assert p.violation() is None
        assert p.b.get(guard) == bytes(600)
        assert all(wc.status == 0 and wc.byte_len <= 600 for wc in p.b.wcs)
        # The peer's PSN is far from where the junk left ours: sooner or later a message passes.
        p.b.recvs(60 - max(0, 50 - len(p.b.wcs)), 600)
        before = len(p.b.wcs)
        p.a.send(1, b"x")
        p.a.send(2, b"x")
        p.go()
        assert len(p.b.wcs) > before
