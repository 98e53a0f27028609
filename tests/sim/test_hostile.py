# SPDX-License-Identifier: BSD-3-Clause
"""Promises about packets nobody of ours has sent: garbage, strangers, wrong versions."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migroce.wire import H_AETH, H_ATOMIC, H_RETH, OPINFO, Op, Packet, build_body

from .pair import Pair, gid
from .records import MS, Action, Datagram, Link, Path, S, Sge, Wr
from .test_schedules import PROFILE
from .verbs import QpState, QpType, SendFlag, WrOpcode

STRANGER = b"\0" * 10 + b"\xff\xff\x0a\x06\x06\x06"


def _echo_under(w: Pair, attack: list[tuple[bytes, bytes, bool]]) -> None:
    """Traffic while `attack` (source, bytes, add an ICRC) comes in at both ends: nothing must change."""
    for source, data, icrc in attack:
        for node in w.nodes:
            if data and len(data) >= (12 if icrc else 1):
                w.inject(source or node.path.dgid, node.engine.gid, data, icrc=icrc)
    w.echo()
    for source, data, icrc in attack[:4]:
        if len(data) >= 12:
            w.inject(source or w.b.engine.gid, w.a.engine.gid, data, icrc=icrc)
    w.echo(1)


@PROFILE
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8))
def test_garbage_is_dropped(blobs: list[bytes]) -> None:
    with Pair() as w:
        w.settle()
        _echo_under(w, [(b"", blob, False) for blob in blobs])
        assert w.a.engine.counters()["rx_icrc"] + w.b.engine.counters()["rx_icrc"] > 0 or not blobs


@settings(
    PROFILE, max_examples=max(20, PROFILE.max_examples // 2) if PROFILE.max_examples < 10_000 else 100_000
)
@given(st.integers(0, 255), st.binary(max_size=120), st.booleans(), st.booleans(), st.integers(0, 0xFFFFFF))
def test_packets_of_strangers_change_nothing(
    opcode: int, rest: bytes, known_qpn: bool, capable: bool, psn: int
) -> None:
    """Any opcode, any contents, a right ICRC, but another source address or QPN."""
    with Pair() as w:
        w.settle()
        qpn = w.a.qp.num if known_qpn else 0x123456
        source = STRANGER if known_qpn else b""
        bth = bytes((opcode, 0x40, 0xFF, 0xFF, int(capable))) + qpn.to_bytes(3, "big")
        data = bth + b"\x80" + psn.to_bytes(3, "big") + rest
        before = w.a.dump()
        _echo_under(w, [(source, data, True)])
        after = w.a.dump()
        assert (after.token, after.peer_token, after.peer_gid) == (
            before.token,
            before.peer_token,
            before.peer_gid,
        )


@pytest.mark.parametrize("opcode", sorted(OPINFO))
def test_a_header_cut_short_is_dropped_though_its_icrc_is_right(opcode: int) -> None:
    with Pair() as w:
        w.settle()
        psn = w.a.dump().epsn.to_bytes(3, "big")
        bth = bytes((opcode, 0x40, 0xFF, 0xFF, 1)) + w.a.qp.num.to_bytes(3, "big") + b"\x80" + psn
        for extra in range(OPINFO[opcode].hdr_len - 12):
            w.inject(w.b.engine.gid, w.a.engine.gid, bth + bytes(extra))
        w.echo()


@pytest.mark.parametrize("opcode", sorted(op for op in OPINFO if op >= 0x20 and op < 0xC0))
def test_packets_of_other_services_are_dropped(opcode: int) -> None:
    with Pair() as w:
        w.settle()
        psn = w.a.dump().epsn.to_bytes(3, "big")
        bth = bytes((opcode, 0x40, 0xFF, 0xFF, 1)) + w.a.qp.num.to_bytes(3, "big") + b"\x80" + psn
        w.inject(w.b.engine.gid, w.a.engine.gid, bth + bytes(OPINFO[opcode].hdr_len - 12 + 8))
        w.echo()


@pytest.mark.parametrize("seed", range(20))
def test_old_packets_replayed_at_random_change_nothing(seed: int) -> None:
    """Everything of a conversation is sent again later, in another order."""
    rng = random.Random(seed)
    with Pair() as w:
        w.settle()
        w.rule(Action.CAPTURE)
        target, source = w.b.space(3000), w.b.put(bytes(range(250)) * 12)
        for i in range(5):
            w.echo(i)
            w.a.write(10 + i, bytes([i]) * 3000, target, w.b)
            w.a.read(20 + i, 3000, source, w.b)
            w.go(5 * MS)
        old: list[Datagram] = w.captured()
        w.clear_rules()
        assert len(old) > 40
        for packet in rng.sample(old, len(old)):
            w.inject(packet.src, packet.dst, packet.data, icrc=False, sport=packet.sport)
            if rng.random() < 0.1:
                w.go(1 * MS)
        w.echo(99)
        assert w.b.get(target) == bytes([4]) * 3000
        assert [s for _, s in w.a.done()] == [0] * len(w.a.wcs)


_fuzzed = st.tuples(
    st.sampled_from(sorted(OPINFO)),
    st.integers(-3, 3),
    st.booleans(),
    st.sampled_from((0x1F, 0x20, 0x2C, 0x60, 0x61, 0x62, 0x63, 0x64, 0x7F, 0)),
    st.sampled_from((0, 1, 256, 1023, 1024, 1025, 4096)),
    st.integers(0, 3),
)


@PROFILE
@given(st.lists(_fuzzed, min_size=1, max_size=12))
def test_a_peer_gone_mad_breaks_its_own_connection_at_worst(
    packets: list[tuple[int, int, bool, int, int, int]],
) -> None:
    """Right addresses, QPN, ICRC and nearly right PSNs: memory that is not open stays as it is, the engine
    goes on, another connection of it too, and whatever was posted completes."""
    with Pair(timeout=8, retry_cnt=2, rnr_retry=2) as w:
        w.settle()
        x, y = (n.engine.qp(n.pd, n.cq, n.cq) for n in w.nodes)
        for me, peer in ((x, y), (y, x)):
            me.connect(replace(w.a.path, dgid=peer.engine.gid, dest_qpn=peer.num, rq_psn=0, sq_psn=0))
        w.settle()
        guard = w.a.space(4096)
        w.a.mr.free()
        small = w.a.engine.mr(w.a.pd, 1024, 1024)
        into = Sge(w.a.engine.base + 1024, 1024, small.lkey)
        w.a.qp.post_recv(Wr(1, (into,)), Wr(2, (into,)))
        w.a.post(3, WrOpcode.SEND, [into])
        w.a.post(4, WrOpcode.RDMA_READ, [into], remote_addr=w.b.engine.base, rkey=w.b.mr.rkey)
        before = bytes(w.a.engine.memory)
        w.link(Link(down=1), src=1)
        for opcode, off, mine, syndrome, length, pad in packets:
            q = w.a.dump()
            psn = ((q.una_psn if mine else q.epsn) + off) & 0xFFFFFF
            body = bytearray(OPINFO[opcode].hdr_len - 12 + length)
            if OPINFO[opcode].mask & H_RETH and len(body) >= 16:
                struct.pack_into(">QII", body, 0, into.addr + 8, small.rkey, length)
            elif OPINFO[opcode].mask & H_ATOMIC:
                struct.pack_into(">QI", body, 0, into.addr + 8 * (length & 1), small.rkey)
            elif OPINFO[opcode].mask & H_AETH and len(body) >= 4:
                body[0] = syndrome
            bth = struct.pack(">BBHII", opcode, pad << 4, 0xFFFF, 1 << 24 | w.a.qp.num, 1 << 31 | psn)
            w.inject(w.b.engine.gid, w.a.engine.gid, bth + bytes(body))
            w.go(1 * MS)
        w.link(Link())
        w.go(5 * S)
        after = bytes(w.a.engine.memory)
        assert after[:1024] == before[:1024]
        assert after[2048:] == before[2048:]
        assert w.a.get(guard) == bytes(4096)
        done = w.a.done()
        assert len(done) == len(set(done))
        assert [i for i, _ in done if i > 2] in ([3, 4], [3])
        if w.a.qp.state() is QpState.ERR:
            assert sorted(i for i, _ in done) == [1, 2, 3, 4]
        x.post_recv(Wr(9, (into,)))
        y.post_send(Wr(8, (w.b.put(b"fine"),), WrOpcode.SEND, SendFlag.SIGNALED))
        w.go(1 * S)
        assert (9, 0) in w.a.done()
        assert (8, 0) in w.b.done()


@pytest.mark.parametrize("kind", [QpType.RC, QpType.UC])
def test_a_connected_qp_takes_nothing_from_a_group(kind: QpType) -> None:
    """It comes from the peer, but not to the address that the QP was connected to."""
    with Pair(kind=kind) as w:
        member = w.b.engine.qp(w.b.pd, w.b.cq, w.b.cq, kind=QpType.UD)
        member.connect(Path(w.b.engine.gid, 0, qkey=1))
        member.mcast(gid("239.1.2.3"))
        w.b.recvs(2, 100)
        w.go()
        before = w.b.engine.counters()["rx_bad_source"]
        packet = Packet(Op.SEND_ONLY, w.b.qp.num, w.b.dump().epsn, payload=b"four")
        body = bytearray(build_body(packet))
        body[0] |= 0x20 if kind is QpType.UC else 0
        for to in (gid("239.1.2.3"), w.b.engine.gid):
            w.inject(w.a.engine.gid, to, bytes(body), sender=w.a.engine.index)
            w.go()
        assert w.b.engine.counters()["rx_bad_source"] == before + 1
        assert [wc.byte_len for wc in w.b.wcs] == [4]
