# SPDX-License-Identifier: BSD-3-Clause
"""What a stopped container answers: the sans-I/O stand-in, its ICRCs computed independently."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest

from migroce import dump as d
from migroce import wire as w
from migroce.agent.standin import Reply, StandIn

US, PEER, NEW, OTHER = (d.gid_bytes(a) for a in ("10.0.1.7", "10.0.1.3", "10.0.1.9", "10.0.1.66"))
US6, PEER6 = d.gid_bytes("fe80::7"), d.gid_bytes("fe80::3")
QPN, PEER_QPN, EPSN = 0x40011, 0x123456, 0xFFFFFE
TOKEN = bytes(range(16))
SPORT = 0xC123


def make(**fields: Any) -> StandIn:
    values: dict[str, Any] = {"peer_qpn": PEER_QPN, "local_gid": US, "peer_gid": PEER, "epsn": EPSN,
                              "msn": 77, "token": TOKEN, "epoch": 4, "path_mtu": 4096}
    qp = d.make_qp(QPN, **(values | fields))
    resources = (d.ResourceRecord(QPN, w.Op.FETCH_ADD, EPSN - 3, EPSN - 3, 0, 0, 8, 0xABCDEF),
                 d.ResourceRecord(QPN, w.Op.READ_REQ, EPSN - 9, EPSN - 5, 0, 0, 8, 0))
    context = d.ContextRecord(US, 1 << 18, 1 << 18, 1, 4, 4096, 1)
    return StandIn([d.Dump(context, qps=(qp,), resources=resources)])


def packet(opcode: int, psn: int, *, capable: bool, payload: bytes = b"", src: bytes = PEER, dst: bytes = US,
           **more: Any) -> bytes:
    flow = w.Flow(src, dst, SPORT, ip_id=more.pop("ip_id", 0), df=more.pop("df", True))
    qpn = more.pop("qpn", QPN)
    return w.build(w.Packet(opcode, qpn, psn & w.PSN_MASK, payload=payload, pad=-len(payload) & 3,
                            capable=capable, **more), flow)


def ask(standin: StandIn, data: bytes, src: bytes = PEER, dst: bytes = US) -> list[Reply]:
    return standin.respond(data, src, SPORT, dst)


def icrc_by_hand(reply: Reply) -> bytes:
    """Straight from the annex: all of IPv4 and UDP with what may change set to ones."""
    body = bytearray(reply.data[:-4])
    body[4] = 0xFF
    udp_len = 8 + len(reply.data)
    udp = struct.pack(">HHHH", reply.src_port, reply.dst_port, udp_len, 0xFFFF)
    if reply.dst_gid[:12] == b"\0" * 10 + b"\xff\xff":
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0xFF, 20 + udp_len, 0, 0x4000, 0xFF, 17, 0xFFFF,
                         reply.src_gid[12:], reply.dst_gid[12:])
    else:
        ip = struct.pack(">IHBB16s16s", 0x6FFFFFFF, udp_len, 17, 0xFF, reply.src_gid, reply.dst_gid)
    return struct.pack("<I", zlib.crc32(b"\xff" * 8 + ip + udp + body))


def parse(replies: list[Reply], dst: bytes = PEER) -> w.Packet:
    assert len(replies) == 1
    reply = replies[0]
    assert (reply.dst_gid, reply.src_port, reply.dst_port) == (dst, 4791, 4791)
    assert reply.data[-4:] == icrc_by_hand(reply)
    got = w.parse(reply.data)
    assert got.dest_qpn == PEER_QPN
    assert got.capable
    return got


RETH = w.Reth(0x1000, 5, 64)
REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (w.Op.SEND_FIRST, {"payload": b"x" * 4096}),
    (w.Op.SEND_MIDDLE, {"payload": b"x" * 4096}),
    (w.Op.SEND_LAST_IMM, {"payload": b"x", "imm": 1}),
    (w.Op.SEND_ONLY, {"payload": b""}),
    (w.Op.WRITE_ONLY, {"payload": b"x" * 64, "reth": RETH}),
    (w.Op.READ_REQ, {"reth": RETH}),
    (w.Op.CMP_SWAP, {"atomic": w.AtomicEth(0x1000, 5, 1, 2)}),
    (w.Op.FLUSH, {"feth": w.Feth(1, 0), "reth": RETH}),
    (w.Op.ATOMIC_WRITE, {"reth": RETH, "payload": bytes(8)}),
]


def _op_name(value: object) -> str:
    return w.OPINFO[value].name if isinstance(value, int) else ""


@pytest.mark.parametrize(("opcode", "more"), REQUESTS, ids=_op_name)
@pytest.mark.parametrize("psn", [EPSN, EPSN + 5, EPSN - 20])
def test_a_capable_peer_is_told_stopped_for_its_psn(opcode: int, more: dict[str, Any], psn: int) -> None:
    got = parse(ask(make(), packet(opcode, psn, capable=True, **more)))
    assert (got.opcode, got.psn) == (w.Op.ACK, psn & w.PSN_MASK)
    assert got.aeth == w.Aeth(w.Syndrome.NAK_STOPPED, 77)


@pytest.mark.parametrize("kind", [2, 10], ids=["RC", "XRC target"])
def test_a_capable_peer_is_told_unasked_for_the_expected_psn(kind: int) -> None:
    got = parse(list(make(type=kind, peer_capable=1).announce()))
    assert (got.opcode & 0x1F, got.psn) == (w.Op.ACK, EPSN)
    assert got.aeth == w.Aeth(w.Syndrome.NAK_STOPPED, 77)


def test_nobody_else_is_told_unasked() -> None:
    """Not who does not speak the extension, who sends us no requests, or is pointed elsewhere."""
    for fields in ({}, {"type": 3}, {"type": 4}, {"type": 9}):
        assert list(make(**{"peer_capable": bool(fields), **fields}).announce()) == []
    moved = make(peer_capable=1)
    moved.moved(US)
    assert list(moved.announce()) == []


@pytest.mark.parametrize(("opcode", "more"), REQUESTS, ids=_op_name)
def test_another_peer_is_told_not_ready_for_the_expected_psn(opcode: int, more: dict[str, Any]) -> None:
    got = parse(ask(make(), packet(opcode, EPSN, capable=False, **more)))
    assert (got.opcode, got.psn) == (w.Op.ACK, EPSN)
    assert got.aeth is not None
    assert got.aeth.syndrome & 0x60 == w.Syndrome.RNR_NAK
    assert w.rnr_timer_ns(got.aeth.syndrome) >= 160_000_000


@pytest.mark.parametrize("capable", [True, False])
def test_an_xrc_target_answers_in_its_own_service_only(capable: bool) -> None:
    standin = make(type=10)
    got = parse(ask(standin, packet(0xA0 + w.Op.SEND_ONLY, EPSN, capable=capable, xrc_srqn=5)))
    assert (got.opcode, got.psn) == (0xA0 + w.Op.ACK, EPSN)
    assert got.aeth is not None
    assert (got.aeth.syndrome == w.Syndrome.NAK_STOPPED) == capable
    atomic = packet(0xA0 + w.Op.FETCH_ADD, EPSN - 3, capable=False, xrc_srqn=5,
                    atomic=w.AtomicEth(0x1000, 5, 1, 0))
    got = parse(ask(standin, atomic))
    assert (got.opcode, got.atomic_orig) == (0xA0 + w.Op.ATOMIC_ACK, 0xABCDEF)
    assert ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=capable)) == []
    assert ask(make(), packet(0xA0 + w.Op.SEND_ONLY, EPSN, capable=capable, xrc_srqn=5)) == []


def test_not_ready_is_said_once_a_round_with_growing_patience() -> None:
    """A window of packets in flight must not eat up the peer's RNR retries."""
    standin = make()
    waits = []
    for _ in range(4):
        for ahead in range(8):
            replies = ask(standin, packet(w.Op.SEND_ONLY, EPSN + ahead, capable=False))
            if ahead == 0:
                aeth = parse(replies).aeth
                assert aeth is not None
                waits.append(w.rnr_timer_ns(aeth.syndrome))
            else:
                assert not replies
    assert waits == sorted(waits)
    assert waits[-1] == 655_360_000


def test_not_ready_is_said_when_the_expected_packet_itself_was_lost() -> None:
    got = parse(ask(make(), packet(w.Op.SEND_ONLY, EPSN + 3, capable=False)))
    assert got.psn == EPSN


def test_a_duplicate_is_acknowledged_again() -> None:
    for op, more in (REQUESTS[2], REQUESTS[3], REQUESTS[4]):
        got = parse(ask(make(), packet(op, EPSN - 2, capable=False, **more)))
        assert (got.opcode, got.psn, got.aeth) == (w.Op.ACK, EPSN - 1, w.Aeth(0x1F, 77))
    assert not ask(make(), packet(w.Op.SEND_FIRST, EPSN - 4, capable=False, payload=b"x" * 8))
    assert ask(make(), packet(w.Op.SEND_FIRST, EPSN - 4, capable=False, payload=b"x" * 8, ackreq=True))


def test_an_acknowledgement_goes_no_further_than_the_next_read_or_atomic() -> None:
    """Beyond it the peer would take the answer for lost and go back, at the cost of a retry."""
    for psn, named in ((EPSN - 10, EPSN - 10), (EPSN - 4, EPSN - 4), (EPSN - 2, EPSN - 1)):
        assert parse(ask(make(), packet(w.Op.SEND_ONLY, psn, capable=False))).psn == named


def test_an_acknowledgement_never_names_a_read_or_atomic() -> None:
    """rdma_rxe would complete it without its data."""
    context = d.ContextRecord(US, 1 << 18, 1 << 18, 1, 4, 4096, 1)

    def acked(epsn: int, psn: int, *resources: tuple[int, int, int]) -> int:
        send = packet(w.Op.SEND_ONLY, psn, capable=False)
        qp = d.make_qp(QPN, peer_qpn=PEER_QPN, local_gid=US, peer_gid=PEER, epsn=epsn, path_mtu=4096)
        records = tuple(d.ResourceRecord(QPN, op, first, last, 0, 0, 8, 0) for op, first, last in resources)
        return parse(ask(StandIn([d.Dump(context, qps=(qp,), resources=records)]), send)).psn

    read, atomic = w.Op.READ_REQ, w.Op.FETCH_ADD
    assert acked(2, -9, (read, 1, 1)) == 0
    assert acked(2, -9, (read, 0xFFFFFE, 0), (atomic, 1, 1)) == 0xFFFFFD
    assert acked(2, 0, (read, 0xFFFFFE, 0xFFFFFF), (atomic, 1, 1)) == 0
    assert acked(2, -9, (read, 3, 1), (read, 2, 2)) in range(1 << 24), "records that lie end"


def test_a_duplicate_atomic_gets_its_recorded_result() -> None:
    add = packet(w.Op.FETCH_ADD, EPSN - 3, capable=False, atomic=w.AtomicEth(0x1000, 5, 1))
    got = parse(ask(make(), add))
    assert (got.opcode, got.psn, got.atomic_orig) == (w.Op.ATOMIC_ACK, EPSN - 3, 0xABCDEF)
    assert not ask(make(), packet(w.Op.FETCH_ADD, EPSN - 4, capable=False, atomic=w.AtomicEth(0x1000, 5, 1)))


def test_a_duplicate_read_is_told_to_wait_for_its_own_psn() -> None:
    got = parse(ask(make(), packet(w.Op.READ_REQ, EPSN - 9, capable=False, reth=RETH)))
    assert got.psn == EPSN - 9
    assert got.aeth is not None
    assert got.aeth.syndrome & 0x60 == w.Syndrome.RNR_NAK


def test_what_follows_a_read_that_waits_is_not_answered() -> None:
    """It comes again behind the READ; an answer beyond it would tell the peer that the READ's is lost."""
    standin = make()
    add: dict[str, Any] = {"atomic": w.AtomicEth(0x1000, 5, 1)}
    behind: list[tuple[int, int, dict[str, Any]]] = [
        (w.Op.READ_REQ, -7, {"reth": RETH}), (w.Op.SEND_ONLY, -4, {}), (w.Op.FETCH_ADD, -3, add),
        (w.Op.SEND_ONLY, 0, {}),
    ]  # fmt: skip
    for _ in range(3):
        got = parse(ask(standin, packet(w.Op.READ_REQ, EPSN - 9, capable=False, reth=RETH)))
        assert got.psn == EPSN - 9
        for op, at, more in behind:
            assert not ask(standin, packet(op, EPSN + at, capable=False, **more))
    assert ask(standin, packet(w.Op.SEND_ONLY, EPSN - 10, capable=False))


def test_a_read_asked_for_from_its_middle_is_told_to_wait_as_well() -> None:
    """A copy from its beginning may have come before: a peer that is not answered gives up."""
    standin = make()
    ask(standin, packet(w.Op.READ_REQ, EPSN - 9, capable=False, reth=RETH))
    middle = packet(w.Op.READ_REQ, EPSN - 7, capable=False, reth=RETH)
    ask(standin, middle)  # may belong to the same round
    assert parse(ask(standin, middle)).psn == EPSN - 7


@pytest.mark.parametrize("capable", [True, False])
def test_responses_and_control_packets_are_dropped(capable: bool) -> None:
    meh = w.Meh(PEER_QPN, 1, 0, b"t" * 16, PEER)
    aeth = w.Aeth(0x1F, 0)
    for op, more in (
        (w.Op.ACK, {"aeth": aeth}),
        (w.Op.READ_RESP_ONLY, {"aeth": aeth, "payload": b"x" * 8}),
        (w.Op.ATOMIC_ACK, {"aeth": aeth, "atomic_orig": 1}),
        (w.Op.RESUME, {"meh": replace(meh, epoch=0)}),
        (w.Op.RESUME_ACK, {"meh": meh}),
        (w.Op.TOKEN, {"meh": meh}),
    ):
        assert not ask(make(), packet(op, EPSN, capable=capable, **more))


def test_nobody_but_the_peer_is_answered() -> None:
    standin = make()
    send = w.Op.SEND_ONLY
    assert not ask(standin, packet(send, EPSN, capable=True, src=OTHER), src=OTHER)
    assert not ask(standin, packet(send, EPSN, capable=True, dst=OTHER), dst=OTHER)
    assert not ask(standin, packet(send, EPSN, capable=True, qpn=QPN + 1))
    assert not ask(standin, packet(send, EPSN, capable=True, pkey=0x1234))
    assert not ask(standin, packet(send | 0x60, EPSN, capable=True, deth=w.Deth(1, 2)))
    for state in (0, 1, 6):
        assert not ask(make(state=state), packet(send, EPSN, capable=True))
    assert not ask(make(type=4), packet(send, EPSN, capable=True))


def test_damaged_packets_are_not_answered() -> None:
    good = packet(w.Op.SEND_ONLY, EPSN, capable=True, payload=b"data")
    for at in range(len(good)):
        if at == 4:
            continue  # masked in the ICRC
        bad = bytearray(good)
        bad[at] ^= 0x10
        assert not ask(make(), bytes(bad)), at
    for length in range(len(good)):
        assert not ask(make(), good[:length])


def test_any_ip_id_and_no_df_are_accepted() -> None:
    for more in ({"ip_id": 0x1234}, {"df": False}, {"ip_id": 7, "df": False}):
        assert ask(make(), packet(w.Op.SEND_ONLY, EPSN, capable=True, **more))


def test_ipv6_peers_are_answered() -> None:
    standin = make(local_gid=US6, peer_gid=PEER6)
    replies = ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=True, src=PEER6, dst=US6), src=PEER6, dst=US6)
    assert parse(replies, PEER6).psn == EPSN


def test_after_a_move_peers_are_pointed_to_the_new_address() -> None:
    standin = make()
    standin.moved(NEW)
    meh = w.Meh(PEER_QPN, 1, 0, b"t" * 16, PEER)
    for data in (
        packet(w.Op.SEND_ONLY, EPSN, capable=True),
        packet(w.Op.ACK, EPSN, capable=True, aeth=w.Aeth(0x1F, 0)),
        packet(w.Op.TOKEN, 0, capable=True, meh=meh),
    ):
        got = parse(ask(standin, data))
        assert got.opcode == w.Op.RESUME
        assert got.meh == w.Meh(QPN, 5, EPSN, TOKEN, NEW)
    assert not ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=False))


def test_a_peer_that_moves_meanwhile_is_answered_at_its_new_address() -> None:
    theirs = b"p" * 16
    standin = make(have_peer_token=1, peer_token=theirs, peer_epoch=2)
    for forged in (w.Meh(PEER_QPN, 3, 0, b"x" * 16, NEW), w.Meh(PEER_QPN + 1, 3, 0, theirs, NEW)):
        assert not ask(standin, packet(w.Op.RESUME, 0, capable=True, meh=forged, src=NEW), src=NEW)
        assert not ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=True, src=NEW), src=NEW)
    meh = w.Meh(PEER_QPN, 3, 0, theirs, NEW)
    heard = ask(standin, packet(w.Op.RESUME, 0, capable=True, meh=meh, src=NEW), src=NEW)
    assert parse(heard, NEW).opcode == w.Op.ACK
    assert parse(ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=True, src=NEW), src=NEW), NEW).psn == EPSN
    assert not ask(standin, packet(w.Op.SEND_ONLY, EPSN, capable=True))


def test_random_packets_never_raise() -> None:
    rng = random.Random(7)
    standin = make()
    seeds = [packet(op, EPSN, capable=True, **more) for op, more in REQUESTS]
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(0, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        ask(standin, bytes(data[: rng.randint(0, len(data))]))
    assert sum(standin.counts.values()) == 3000
