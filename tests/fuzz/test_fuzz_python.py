# SPDX-License-Identifier: BSD-3-Clause
"""What the agent and the CLI read from elsewhere never makes them raise anything but their own error."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from wire_strategies import bytes16, packets, u24, u32, u64

from migroce import control, dump, wire
from migroce.agent.standin import StandIn

OURS = wire.gid_from_ip("10.0.1.7")
PEER = wire.gid_from_ip("10.0.1.3")
ELSEWHERE = wire.gid_from_ip("10.0.1.9")
QPN = 0x40005
END_RECORD_LEN = 16


@st.composite
def qps(draw: st.DrawFn, qpn: int = QPN) -> dump.QpRecord:
    """An RC QP between OURS and PEER, everything else arbitrary."""
    fields: dict[str, Any] = {
        name: draw(u24) for name in ("peer_qpn", "una_psn", "next_psn", "epsn", "msn")
    } | {
        name: draw(u32)
        for name in ("epoch", "peer_epoch", "sport", "mstate", "sq_fill", "rq_fill", "timeout")
    }
    fields |= {name: draw(st.integers(0, 1)) for name in ("peer_capable", "have_peer_token", "token_acked")}
    return dump.make_qp(
        qpn, local_gid=OURS, peer_gid=PEER, token=draw(bytes16), peer_token=draw(bytes16),
        state=draw(st.sampled_from((0, 1, 2, 3, 3, 3, 4, 6))), tx_bytes=draw(u64), **fields,
    )  # fmt: skip


@st.composite
def dumps(draw: st.DrawFn) -> dump.Dump:
    """A consistent dump."""
    context = dump.ContextRecord(OURS, 0x40000, 0x40000, 1, draw(u32), 4096)
    resource = st.builds(
        dump.ResourceRecord, st.just(QPN), st.sampled_from((12, 19, 20)), u24, u24, u64, u32, u32, u64
    )
    return dump.Dump(
        context, (dump.PdRecord(1, 2),), (dump.MrRecord(4096, 4096, 4096, 7, 7, 15, 1),),
        (dump.CqRecord(2, 64, draw(u32), draw(st.integers(0, 3)), 9),), (draw(qps()), draw(qps(QPN + 1))),
        tuple(draw(st.lists(resource, max_size=3))), {"tx_packets": draw(u64)}, draw(st.booleans()),
    )  # fmt: skip


def resealed(data: bytes) -> bytes:
    """The same with length and CRC made right, so that a reader looks further."""
    if len(data) < 32 + END_RECORD_LEN:
        return data
    body = data[:16] + struct.pack("<Q", len(data)) + data[24:-END_RECORD_LEN]
    return body + struct.pack("<HHIII", 0xFFFF, 1, 8, zlib.crc32(body), 0)


edits = st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6)


def edited(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    """`data` overwritten here and there."""
    out = bytearray(data)
    for at, new in changes:
        at %= len(out)
        out[at : at + len(new)] = new[: len(out) - at]
    return bytes(out)


def accepted(data: bytes) -> dump.Dump | None:
    """What the parser makes of it; None when it says why not."""
    try:
        return dump.parse(data)
    except dump.DumpError:
        return None


@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_no_dump(data: bytes) -> None:
    assert accepted(data) is None
    assert accepted(dump.MAGIC + data) is None


@given(original=dumps())
def test_a_dump_survives_writing_and_reading(original: dump.Dump) -> None:
    again = accepted(dump.build(original))
    assert again is not None
    assert again.qps == original.qps
    assert again.resources == original.resources
    assert dump.build(again) == dump.build(original)


@settings(max_examples=400)
@given(original=dumps(), changes=edits, cut=st.integers(0, 64), reseal=st.booleans())
def test_a_damaged_dump_is_refused_or_makes_sense(
    original: dump.Dump, changes: list[tuple[int, bytes]], cut: int, reseal: bool
) -> None:
    whole = dump.build(original)
    data = edited(whole, changes)[: len(whole) - cut]
    result = accepted(resealed(data) if reseal else data)
    if not reseal and data != whole:
        assert result is None, "the CRC notices"
    if result is not None:
        json.dumps(result.to_json())
        assert accepted(dump.build(result)) is not None
        StandIn([result]).respond(bytes(64), PEER, 4791, OURS)


messages = st.one_of(
    st.builds(control.Hello, bytes16, u32, st.integers(0, 2), u32, u32, u32,
              st.text("abcdefghij_-/", max_size=15), bytes16),
    st.builds(control.Welcome, u32, u32, u32, u32, u32, u32, bytes16),
    st.builds(control.Stop, u32, u32), st.builds(control.Stopped, u32, u32, u64),
    st.builds(control.Resumed, u32, u32), st.builds(control.DumpReq), st.builds(control.DumpReply, u32, u64),
)  # fmt: skip


@given(msg=messages, request=u32)
def test_a_message_survives_encoding(msg: control.Message, request: int) -> None:
    assert control.decode(control.encode(msg, request)) == (request, msg)


@given(msg=messages, changes=edits, tail=st.binary(max_size=16), cut=st.integers(0, 80))
def test_a_damaged_message_is_refused_or_makes_sense(
    msg: control.Message, changes: list[tuple[int, bytes]], tail: bytes, cut: int
) -> None:
    data = edited(control.encode(msg, 1), changes) + tail
    try:
        request, result = control.decode(data[: len(data) - cut])
    except control.ControlError:
        return
    if result is not None:
        assert control.decode(control.encode(result, request)) == (request, result)


@settings(max_examples=300)
@given(
    state=dumps(), pkt=packets(max_payload=64), src=st.sampled_from((PEER, PEER, ELSEWHERE)),
    port=st.integers(1, 65535), flip=st.none() | st.integers(0, 2**16),
    moved=st.booleans(), aim=st.booleans(), know=st.booleans(),
)  # fmt: skip
def test_the_stand_in_answers_only_intact_packets_and_only_the_peer(
    state: dump.Dump,
    pkt: wire.Packet,
    src: bytes,
    port: int,
    flip: int | None,
    moved: bool,
    aim: bool,
    know: bool,
) -> None:
    qp = state.qps[0]
    values = {name: getattr(pkt, name) for name in pkt.__slots__}
    if aim:
        values |= {"dest_qpn": qp.qpn, "pkey": 0xFFFF}
    if aim and know and pkt.meh is not None:
        values["meh"] = wire.Meh(qp.peer_qpn, pkt.meh.epoch, pkt.meh.psn, qp.peer_token, pkt.meh.gid)
    data = bytearray(wire.build(wire.Packet(**values), wire.Flow(src, OURS, port)))
    if flip is not None:
        data[flip // 8 % len(data)] ^= 1 << flip % 8
    stand_in = StandIn([state])
    if moved:
        stand_in.moved(ELSEWHERE)
    replies = stand_in.respond(bytes(data), src, port, OURS)
    assert len(replies) <= 1
    for reply in replies:
        assert flip is None or flip // 8 % len(data) == 4, "BTH byte 4 is all that may change"
        flow = wire.Flow(reply.src_gid, reply.dst_gid, reply.src_port, reply.dst_port)
        assert wire.check_icrc(flow, reply.data) == 0
        answer = wire.parse(reply.data)
        assert answer.capable
        assert reply.src_gid == OURS
        record = next(q for q in state.qps if q.peer_qpn == answer.dest_qpn)
        assert record.connected
        if src == ELSEWHERE or reply.dst_gid != PEER:
            assert pkt.opcode == wire.Op.RESUME
            assert record.have_peer_token
        if answer.opcode == wire.Op.RESUME:
            assert moved
            assert answer.meh is not None
            assert answer.meh.gid == ELSEWHERE
            assert answer.meh.token == record.token
