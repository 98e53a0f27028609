# SPDX-License-Identifier: BSD-3-Clause
"""The codec in C and the codec in Python are one codec, and both keep the standard."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wire_native import HDR_MAX, Native
from wire_strategies import packets

from migroce import wire

FLOW = wire.Flow(wire.gid_from_ip("10.0.1.7"), wire.gid_from_ip("10.0.1.3"), 50000)


def _python_parse(buf: bytes) -> wire.Packet | None:
    try:
        return wire.parse(buf)
    except wire.WireError:
        return None


def test_both_opcode_tables_say_the_same(native: Native) -> None:
    assert native.opinfo() == dict(wire.OPINFO)
    assert max(info.hdr_len for info in wire.OPINFO.values()) <= HDR_MAX


def test_the_opcode_table_holds_every_opcode_of_the_services_we_speak() -> None:
    rc = [*range(0x15), 0x16, 0x17, 0x1C, 0x1D]
    expected = [*rc, *range(0x20, 0x2C), 0x64, 0x65, *(0xA0 + op for op in rc), 0xC0, 0xC1, 0xC2, 0xC3]
    assert sorted(wire.OPINFO) == expected


@given(pkt=packets())
def test_any_packet_survives_both_codecs(native: Native, pkt: wire.Packet) -> None:
    body = wire.build_body(pkt)
    assert native.build_body(pkt) == body
    assert wire.parse(body + bytes(4)) == pkt
    assert native.parse(body + bytes(4)) == pkt


@pytest.mark.parametrize("opcode", sorted(wire.OPINFO), ids=lambda op: wire.OPINFO[op].name.replace(" ", "_"))
def test_each_opcode_is_refused_one_byte_short(native: Native, opcode: int) -> None:
    whole = bytes([opcode]) + bytes(wire.OPINFO[opcode].hdr_len - 1) + bytes(4)
    assert native.parse(whole) == wire.parse(whole)
    assert native.parse(whole[:-1]) is None
    with pytest.raises(wire.WireError):
        wire.parse(whole[:-1])


@given(opcode=st.sampled_from(sorted(wire.OPINFO)), flags=st.integers(0, 255), rest=st.binary(max_size=90))
@example(opcode=4, flags=0x30, rest=bytes(14))
@example(opcode=17, flags=0, rest=bytes(19))
def test_any_bytes_are_taken_or_refused_by_both_alike(
    native: Native, opcode: int, flags: int, rest: bytes
) -> None:
    buf = bytes([opcode, flags]) + rest
    assert native.parse(buf) == _python_parse(buf)


@pytest.mark.parametrize("opcode", sorted(set(range(256)) - set(wire.OPINFO)))
def test_an_unknown_opcode_is_refused(native: Native, opcode: int) -> None:
    buf = bytes([opcode]) + bytes(99)
    assert native.parse(buf) is None
    with pytest.raises(wire.WireError, match="unknown opcode"):
        wire.parse(buf)


@pytest.mark.parametrize("version", range(1, 16))
def test_a_transport_header_version_other_than_0_is_refused(native: Native, version: int) -> None:
    buf = bytes([wire.Op.SEND_ONLY, version]) + bytes(14)
    assert native.parse(buf) is None
    with pytest.raises(wire.WireError, match="transport header version"):
        wire.parse(buf)


def test_pad_beyond_the_payload_is_refused(native: Native) -> None:
    for pad in range(4):
        for length in range(5):
            buf = bytes([wire.Op.SEND_ONLY, pad << 4]) + bytes(10 + length + 4)
            want = length >= pad
            assert (native.parse(buf) is not None) == want
            assert (_python_parse(buf) is not None) == want


def test_an_acknowledgement_with_a_payload_is_refused(native: Native) -> None:
    buf = wire.build_body(wire.Packet(wire.Op.ACK, 1, 2, aeth=wire.Aeth(0, 0))) + b"more" + bytes(4)
    assert native.parse(buf) is None
    with pytest.raises(wire.WireError, match="payload"):
        wire.parse(buf)


def test_what_a_later_version_appends_to_a_resume_is_tolerated(native: Native) -> None:
    meh = wire.Meh(1, 2, 3, bytes(16), bytes(16), version=2)
    buf = wire.build_body(wire.Packet(wire.Op.RESUME, 1, 0, meh=meh)) + b"appended" + bytes(4)
    for pkt in (wire.parse(buf), native.parse(buf)):
        assert pkt is not None
        assert pkt.meh == meh
        assert pkt.payload == b"appended"


def test_reserved_bits_are_ignored(native: Native) -> None:
    clean = wire.build(wire.Packet(wire.Op.SEND_ONLY, 0x123456, 0x654321), FLOW)
    dirty = bytearray(clean)
    dirty[4] |= 0x3E
    dirty[8] |= 0x7F
    assert wire.parse(bytes(dirty)) == wire.parse(clean) == native.parse(bytes(dirty))


@pytest.mark.parametrize(
    ("pkt", "why"),
    [
        (wire.Packet(wire.Op.READ_REQ, 1, 2), "needs RETH"),
        (wire.Packet(0x65, 1, 2, imm=1), "needs DETH"),
        (wire.Packet(wire.Op.ACK, 1, 2, aeth=wire.Aeth(0x1F, 0), payload=b"x"), "carries no payload"),
        (wire.Packet(wire.Op.SEND_ONLY, 1 << 24, 2), "out of range"),
        (wire.Packet(wire.Op.SEND_ONLY, 1, -1), "out of range"),
        (wire.Packet(wire.Op.SEND_ONLY, 1, 2, pad=4), "out of range"),
        (wire.Packet(wire.Op.SEND_ONLY_IMM, 1, 2, imm=1 << 32), "SEND_ONLY_IMM"),
        (wire.Packet(wire.Op.RESUME, 1, 2, meh=wire.Meh(1, 2, 3, b"", bytes(16))), "16 bytes"),
        (wire.Packet(0xFF, 1, 2), "unknown opcode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_packet_that_cannot_be_written_says_why(pkt: wire.Packet, why: str) -> None:
    with pytest.raises(wire.WireError, match=why):
        wire.build(pkt, FLOW)


def test_a_token_is_kept_out_of_logs() -> None:
    assert "secret" not in repr(wire.Meh(1, 2, 3, b"secret-secret-se", bytes(16)))


def test_rnr_timers_follow_the_standard(native: Native) -> None:
    assert wire.rnr_timer_ns(0) == 655_360_000
    assert wire.rnr_timer_ns(1) == 10_000
    assert wire.rnr_timer_ns(12) == 640_000
    assert wire.rnr_timer_ns(31) == 491_520_000
    assert [native.lib.mg_rnr_timer_ns(code) for code in range(32)] == [
        wire.rnr_timer_ns(c) for c in range(32)
    ]
    for code in range(32):
        ns = wire.rnr_timer_ns(code)
        for codec in (wire.rnr_timer_code, native.lib.mg_rnr_timer_field):
            assert codec(ns) == code
            assert codec(ns - 1) == code
            assert wire.rnr_timer_ns(codec(ns + 1)) > ns or code == 0
    assert native.lib.mg_rnr_timer_field(0) == wire.rnr_timer_code(0) == 1
    assert native.lib.mg_rnr_timer_field(2**64 - 1) == wire.rnr_timer_code(2**64 - 1) == 0


@pytest.mark.parametrize("address", ["10.0.1.7", "fe80::1", "2001:db8::7"])
def test_a_gid_is_its_address(address: str) -> None:
    assert wire.ip_from_gid(wire.gid_from_ip(address)) == address
