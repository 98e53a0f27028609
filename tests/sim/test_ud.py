# SPDX-License-Identifier: BSD-3-Clause
"""UD: what arrives and what does not, its header bytes, Q_Keys, multicast, moves."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest

from migroce import wire
from migroce.dump import parse as parse_dump

from .pair import Node, Pair
from .records import MS, US, Action, Caps, Link, Sge, VerbsError, Wr, gid
from .verbs import Event, QpState, QpType, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode

QKEY = 0x11111111
GRH = 40
UD_SEND = 0x64


class Datagrams(Pair):
    """Two UD QPs that know each other's address."""

    def __init__(self, **more: Any):
        super().__init__(kind=QpType.UD, **({"qkey": QKEY} | more))
        self.ah = {
            id(me): me.engine.ah(me.pd, peer.engine.gid, tclass=0x20, hop_limit=9)
            for me, peer in ((self.a, self.b), (self.b, self.a))
        }

    def send(self, me: Node, wr_id: int, data: bytes, **more: Any) -> None:
        """To the other one unless told otherwise."""
        peer = self.b if me is self.a else self.a
        me.post(
            wr_id, WrOpcode.SEND, [me.put(data)],
            **({"ah": self.ah[id(me)], "remote_qpn": peer.qp.num, "remote_qkey": QKEY} | more),
        )  # fmt: skip


def test_a_datagram_arrives_with_its_network_header() -> None:
    """40 bytes ahead of the data, the last 20 an IPv4 header; the completion tells who sent it."""
    with Datagrams() as p:
        into = p.b.recv(7, 1000 + GRH)
        p.send(p.a, 1, b"x" * 999)
        p.go()
        assert p.a.done() == [(1, WcStatus.SUCCESS)]
        (wc,) = p.b.wcs
        assert (wc.wr_id, wc.status, wc.opcode, wc.byte_len) == (7, 0, WcOpcode.RECV, 999 + GRH)
        assert wc.src_qp == p.a.qp.num
        assert wc.flags == WcFlag.GRH
        got = p.b.get(into)
        assert got[GRH : GRH + 999] == b"x" * 999
        ip = got[20:40]
        assert not any(got[:20])
        assert ip[0] == 0x45
        assert ip[1] == 0x20
        assert ip[8] == 9
        assert ip[9] == 17
        assert ip[12:16] == p.a.engine.gid[12:]
        assert ip[16:20] == p.b.engine.gid[12:]
        assert int.from_bytes(ip[2:4], "big") == 20 + 8 + 12 + 8 + 999 + 1 + 4
        total = sum(int.from_bytes(ip[i : i + 2], "big") for i in range(0, 20, 2))
        assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_ipv6_header() -> None:
    """Over IPv6 the 40 bytes are an IPv6 header."""
    with Datagrams() as p:
        for i, node in enumerate(p.nodes):
            node.engine.free()
            node.engine = e = p.engine(f"fd00::{i + 1}", seed=9 + i)
            node.pd = e.pd()
            node.mr = e.mr(node.pd, 0, 1 << 20)
            node.cq = e.cq(64)
            node.qp = e.qp(node.pd, node.cq, node.cq, kind=QpType.UD)
            node.qp.connect(node.path)
        into = p.b.recv(7, 200)
        ah = p.a.engine.ah(p.a.pd, p.b.engine.gid, tclass=0x55, hop_limit=3)
        p.send(p.a, 1, b"y" * 10, ah=ah)
        end = p.now + 200 * MS
        p.run(end)
        (wc,) = [wc for wc in p.wcs() if wc.wr_id == 7]
        assert wc.byte_len == 50
        assert wc.src_qp == p.a.qp.num
        got = p.b.get(into)
        assert got[0] == 0x65
        assert got[1] == 0x50
        assert got[6] == 17
        assert got[7] == 3
        assert got[8:24] == p.a.engine.gid
        assert got[24:40] == p.b.engine.gid
        assert got[40:50] == b"y" * 10


def test_immediate_inline_and_lists() -> None:
    """Immediate data, inline data, several pieces; a solicited one wakes who waits for that."""
    with Datagrams() as p:
        into = p.b.recvs(3, 300)
        more = {"ah": p.ah[id(p.a)], "remote_qpn": p.b.qp.num, "remote_qkey": QKEY}
        p.a.post(1, WrOpcode.SEND_WITH_IMM, [p.a.put(b"imm" * 9)], imm=0xFEEDBEEF, **more)
        inline = p.a.put(b"inline")
        p.a.post(2, WrOpcode.SEND, [inline], flags=SendFlag.SIGNALED | SendFlag.INLINE, **more)
        p.a.post(3, WrOpcode.SEND, [p.a.put(b"one"), p.a.put(b"two"), p.a.put(b"three")], **more)
        p.go()
        assert [wc.wr_id for wc in p.b.wcs] == [0, 1, 2]
        assert p.b.wcs[0].imm == 0xFEEDBEEF
        assert p.b.wcs[0].flags == WcFlag.GRH | WcFlag.WITH_IMM
        data = [p.b.get(s)[GRH : wc.byte_len] for s, wc in zip(into, p.b.wcs, strict=True)]
        assert data == [b"imm" * 9, b"inline", b"onetwothree"]


def test_wrong_keys_are_silently_dropped() -> None:
    """Another Q_Key is not for us; a controlled one stands for the sender's own (IBA 10.2.5)."""
    with Datagrams() as p:
        p.b.recvs(4, 200)
        p.send(p.a, 1, b"no", remote_qkey=QKEY + 1)
        p.send(p.a, 2, b"yes", remote_qkey=0x80000001)
        p.go()
        assert p.a.done() == [(1, 0), (2, 0)]
        assert [wc.byte_len for wc in p.b.wcs] == [GRH + 3]
        assert p.b.engine.counters()["rx_bad_qkey"] == 1


def test_nothing_to_receive_into() -> None:
    """Without a receive request, or with one that is too short, a datagram is lost; the request is not."""
    with Datagrams() as p:
        p.send(p.a, 1, b"lost")
        p.go()
        into = p.b.recv(7, GRH + 5)
        p.send(p.a, 2, b"too long")
        p.go()
        assert not p.b.wcs
        p.send(p.a, 3, b"fits.")
        p.go()
        assert p.a.done() == [(1, 0), (2, 0), (3, 0)]
        assert [(wc.wr_id, wc.status, wc.byte_len) for wc in p.b.wcs] == [(7, 0, GRH + 5)]
        assert p.b.get(into)[GRH:] == b"fits."
        assert p.b.engine.counters()["rx_dropped"] == 2


def test_longer_than_the_port_mtu() -> None:
    """No packet, no error (IBA C10-93.1.1); what fits exactly arrives."""
    with Datagrams(engine={"max_mtu": 1024}) as p:
        p.b.recvs(2, 4096)
        p.send(p.a, 1, b"x" * 1025)
        p.send(p.a, 2, b"x" * 1024)
        p.go()
        assert p.a.done() == [(1, 0), (2, 0)]
        assert [wc.byte_len for wc in p.b.wcs] == [GRH + 1024]


def test_what_cannot_be_posted() -> None:
    """No address handle, an operation that UD has not: EINVAL."""
    with Datagrams() as p:
        for wr in (
            Wr(1, (p.a.put(b"x"),), remote_qpn=5),
            Wr(2, (p.a.put(b"x"),), WrOpcode.RDMA_WRITE, ah=p.ah[id(p.a)]),
            Wr(3, (p.a.put(b"x"),), ah=p.ah[id(p.a)], remote_qpn=1 << 24),
        ):
            with pytest.raises(VerbsError) as e:
                p.a.qp.post_send(wr)
            assert e.value.errno == errno.EINVAL
        with pytest.raises(VerbsError):
            p.a.engine.ah(p.a.pd, gid("fd00::1"))  # from IPv4 to IPv6


def test_a_bad_send_ends_sending_only() -> None:
    """The send queue error state: requests are flushed, datagrams still arrive, RTS mends it."""
    with Datagrams() as p:
        p.a.recv(70, 200)
        bad = p.a.put(b"x")
        p.send(p.a, 1, b"fine")
        p.a.post(
            2, WrOpcode.SEND, [Sge(bad.addr, 1, bad.lkey ^ 0x77)], ah=p.ah[id(p.a)], remote_qpn=p.b.qp.num,
            remote_qkey=QKEY,
        )  # fmt: skip
        p.go()
        assert p.a.qp.state() is QpState.SQE
        p.send(p.a, 3, b"flushed")
        p.send(p.b, 4, b"still heard")
        p.go()
        assert p.a.done() == [(1, 0), (2, WcStatus.LOC_PROT_ERR), (3, WcStatus.WR_FLUSH_ERR), (70, 0)]
        p.a.qp.modify(QpState.RTS)
        p.b.recv(71, 200)
        p.send(p.a, 5, b"again")
        p.go()
        assert (5, 0) in p.a.done()
        assert p.b.done()[-1] == (71, 0)


def test_a_bad_receive_is_fatal() -> None:
    """A receive request without memory fails, and the QP with it."""
    with Datagrams() as p:
        sge = p.b.space(200)
        p.b.qp.post_recv(Wr(7, (Sge(sge.addr, 200, sge.lkey ^ 1),)))
        p.b.recv(8, 200)
        p.send(p.a, 1, b"x")
        p.go()
        assert p.b.done() == [(7, WcStatus.LOC_PROT_ERR), (8, WcStatus.WR_FLUSH_ERR)]
        assert p.b.qp.state() is QpState.ERR
        assert [e.type for e in p.events()] == [Event.QP_FATAL]


def test_reaching_several_and_oneself() -> None:
    """One QP sends by several handles, also to a QP of its own process and to itself."""
    with Datagrams() as p:
        other = p.a.engine.qp(p.a.pd, p.a.cq, p.a.cq, kind=QpType.UD)
        other.connect(p.a.path)
        own = p.a.engine.ah(p.a.pd, p.a.engine.gid)
        sge = p.a.space(100)
        other.post_recv(Wr(50, (sge,)))
        mine = p.a.recv(51, 100)
        theirs = p.b.recv(52, 100)
        p.send(p.a, 1, b"other", ah=own, remote_qpn=other.num)
        p.send(p.a, 2, b"self", ah=own, remote_qpn=p.a.qp.num)
        p.send(p.a, 3, b"peer")
        p.go()
        assert sorted(p.a.done()) == [(1, 0), (2, 0), (3, 0), (50, 0), (51, 0)]
        assert p.a.get(sge)[40:45] == b"other"
        assert p.a.get(mine)[40:44] == b"self"
        assert p.b.get(theirs)[40:44] == b"peer"


@pytest.mark.parametrize("group", ["239.1.2.3", "ff0e::1:2"])
def test_multicast(group: str) -> None:
    """Every attached QP gets a copy, the sender too; nobody else does."""
    v6 = ":" in group
    with Pair(connect=False) as w:
        nodes = []
        for i in range(3):
            e = w.engine(f"fd00::{i + 7}" if v6 else f"10.0.0.{i + 7}", seed=i + 1)
            pd, cq = e.pd(), e.cq(64)
            qp = e.qp(pd, cq, cq, kind=QpType.UD)
            node = Node(e, pd, cq, e.mr(pd, 0, 1 << 20), qp, w.a.path)
            node.path = type(w.a.path)(e.gid, 0, qkey=QKEY)
            qp.connect(node.path)
            nodes.append(node)
        twin = nodes[1].engine.qp(nodes[1].pd, nodes[1].cq, nodes[1].cq, kind=QpType.UD)
        twin.connect(nodes[1].path)
        for qp in (nodes[0].qp, nodes[1].qp, twin):
            qp.mcast(gid(group))
            qp.mcast(gid(group))  # twice is once
        into = [node.recv(10 + i, 100) for i, node in enumerate(nodes)]
        extra = nodes[1].space(100)
        twin.post_recv(Wr(20, (extra,)))
        ah = nodes[0].engine.ah(nodes[0].pd, gid(group))
        send = {"ah": ah, "remote_qpn": 0xFFFFFF, "remote_qkey": QKEY}
        nodes[0].post(1, WrOpcode.SEND, [nodes[0].put(b"to all")], **send)
        w.run_for(50 * MS)
        got = sorted((wc.engine - 2, wc.wr_id) for wc in w.wcs())
        assert got == [(0, 1), (0, 10), (1, 11), (1, 20)]
        for node, sge in ((nodes[0], into[0]), (nodes[1], into[1]), (nodes[1], extra)):
            assert node.get(sge)[GRH : GRH + 6] == b"to all"
            assert node.get(sge)[24:40] == gid(group) if v6 else node.get(sge)[36:40] == gid(group)[12:]
        with pytest.raises(VerbsError) as e2:
            twin.free()
        assert e2.value.errno == errno.EBUSY
        twin.mcast(gid(group), on=False)
        twin.free()
        with pytest.raises(VerbsError):
            nodes[2].qp.mcast(gid(group), on=False)
        with pytest.raises(VerbsError):
            nodes[2].qp.mcast(nodes[0].engine.gid)


def test_a_stop_keeps_what_is_to_be_sent() -> None:
    """Sends posted while stopped go out after the resume, at the new address; nothing answers meanwhile."""
    with Datagrams() as p:
        p.b.recvs(8, 200)
        p.a.recvs(8, 200)
        p.go()
        n = p.stop(p.a)
        p.send(p.a, 1, b"while stopped")
        p.send(p.b, 2, b"lost")
        p.go()
        assert not p.b.wcs[1:]
        assert not [wc for wc in p.a.wcs if wc.wr_id < 8]
        dump = parse_dump(p.a.engine.dump())
        assert (dump.qps[0].type, dump.qps[0].sq_fill, dump.qps[0].rq_fill) == (4, 1, 8)
        p.resume(p.a, n, "10.9.9.9")
        p.go()
        assert (1, 0) in p.a.done()
        assert [wc.byte_len for wc in p.b.wcs if wc.src_qp == p.a.qp.num] == [GRH + len(b"while stopped")]
        p.send(p.a, 3, b"from there")
        p.send(p.b, 4, b"and back", ah=p.b.engine.ah(p.b.pd, gid("10.9.9.9")))
        p.go()
        assert (3, 0) in p.a.done()
        assert p.a.done()[-1] == (0, 0)


def test_at_most_once_and_unharmed() -> None:
    """Loss, duplicates and damage: what arrives is one of the messages sent, whole."""
    total = 0
    for seed in range(20):
        rng = random.Random(seed)
        link = Link(jitter=20 * US, loss=100_000, corrupt=50_000, reorder=100_000, reorder_by=50 * US)
        with Datagrams(seed=seed, link=link, caps=Caps(128, 128)) as p:
            sent = [rng.randbytes(rng.randint(0, 1500)) for _ in range(60)]
            into = p.b.recvs(60, 1600)
            for i, data in enumerate(sent):
                p.send(p.a, 1000 + i, data)
                if rng.random() < 0.2:
                    p.go(100 * US)
            p.go()
            assert p.a.done() == [(1000 + i, 0) for i in range(60)]
            got = [p.b.get(into[wc.wr_id])[GRH : wc.byte_len] for wc in p.b.wcs]
            assert all(wc.status == 0 for wc in p.b.wcs)
            left = list(sent)
            for data in got:
                left.remove(data)
            total += len(got)
    assert 500 < total < 1200


def test_hostile_datagrams() -> None:
    """Anything may be in a UD packet: only a whole, well addressed one with the right Q_Key arrives."""
    with Datagrams() as p:
        p.b.recvs(60, 5000)
        rng = random.Random(5)
        good = 0
        for _ in range(2000):
            op = rng.choice((UD_SEND, UD_SEND + 1, rng.randrange(256)))
            qkey = rng.choice((QKEY, rng.getrandbits(32)))
            qpn = rng.choice((p.b.qp.num, p.b.qp.num, 0xFFFFFF, rng.getrandbits(24)))
            body = rng.randbytes(rng.choice((0, 4, 8, rng.randint(0, 64), rng.randint(4000, 5000))))
            bth = bytes((op, rng.choice((0, 0x30, 0x83)), 0xFF, 0xFF, 0)) + qpn.to_bytes(3, "big")
            data = bth + rng.randbytes(4) + qkey.to_bytes(4, "big") + rng.randbytes(4) + body
            p.inject(p.a.engine.gid, p.b.engine.gid, data)
        p.go()
        assert p.violation() is None
        good = len(p.b.wcs)
        assert good
        assert all(wc.status == 0 and wc.byte_len >= GRH for wc in p.b.wcs)


def test_the_wire_is_the_standards() -> None:
    """Opcode, DETH, no AckReq, and an ICRC that an independent implementation agrees with."""
    with Datagrams() as p:
        p.rule(Action.CAPTURE, UD_SEND)
        p.send(p.a, 1, b"look")
        p.go()
        (d,) = p.captured()
        pkt = wire.parse(d.data)
        assert pkt.opcode == UD_SEND
        assert pkt.deth is not None
        assert not pkt.ackreq
        assert (pkt.deth.qkey, pkt.deth.src_qpn, pkt.dest_qpn) == (QKEY, p.a.qp.num, p.b.qp.num)
        assert (d.tclass, d.hop_limit) == (0x20, 9)
        assert wire.check_icrc(wire.Flow(d.src, d.dst, d.sport, df=True), d.data) is not None
