# SPDX-License-Identifier: BSD-3-Clause
"""The ICRC finds damage, and finds IP ids that no socket shows."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from wire_native import Native
from wire_strategies import flows, packets, payloads, u16

from migroce import wire

FLOW = wire.Flow(wire.gid_from_ip("10.0.1.7"), wire.gid_from_ip("10.0.1.3"), 50000, ip_id=0x1234)
V6 = wire.Flow(wire.gid_from_ip("fd00::1"), wire.gid_from_ip("fd00::2"), 50000)
MASKED_BYTE = 4


def _seal(native: Native, flow: wire.Flow, body: bytes) -> bytes:
    return body + native.icrc(flow, body).to_bytes(4, "little")


@given(flow=flows(), pkt=packets(max_payload=5000), data=st.data())
def test_the_icrc_does_not_depend_on_how_a_packet_is_cut_into_pieces(
    native: Native, flow: wire.Flow, pkt: wire.Packet, data: st.DataObject
) -> None:
    body = wire.build_body(pkt)
    cuts = data.draw(st.lists(st.integers(12, len(body)), max_size=16).map(lambda c: tuple(sorted(c))))
    assert native.icrc(flow, body, cuts) == wire.icrc(flow, body)


@given(flow=flows(), pkt=packets(), expected=u16)
def test_the_ip_id_is_found_whatever_was_expected(
    native: Native, flow: wire.Flow, pkt: wire.Packet, expected: int
) -> None:
    buf = wire.build(pkt, flow)
    guess = replace(flow, ip_id=expected)
    if wire.gid_is_v4(flow.dst):
        assert native.check_icrc(guess, buf) == flow.ip_id == wire.check_icrc(guess, buf)
    else:
        assert native.check_icrc(guess, buf) is not None
        assert wire.check_icrc(guess, buf) == 0


def test_the_ip_id_is_found_at_every_length_a_packet_can_have(native: Native) -> None:
    for length in [*range(12, 700), *range(700, wire.MAX_LEN - 4, 509), wire.MAX_LEN - 4]:
        buf = _seal(native, FLOW, bytes(length))
        assert native.check_icrc(replace(FLOW, ip_id=0xFEDC), buf) == FLOW.ip_id, length


def test_no_bytes_are_too_few_or_too_many_to_be_checked(native: Native) -> None:
    for length in (*range(16), wire.MAX_LEN + 1, 70000):
        assert native.check_icrc(FLOW, bytes(length)) is None
        assert wire.check_icrc(FLOW, bytes(length)) is None


@given(
    flow=flows(), pkt=packets(max_payload=4096), position=st.integers(0, 2**20),
    expected=st.one_of(st.none(), u16),
)  # fmt: skip
def test_a_flipped_bit_is_noticed(
    native: Native, flow: wire.Flow, pkt: wire.Packet, position: int, expected: int | None
) -> None:
    buf = bytearray(wire.build(pkt, flow))
    byte, bit = position // 8 % len(buf), position % 8
    buf[byte] ^= 1 << bit
    guess = flow if expected is None else replace(flow, ip_id=expected)
    for found in (native.check_icrc(guess, bytes(buf)), wire.check_icrc(guess, bytes(buf))):
        if byte == MASKED_BYTE:
            assert found == flow.ip_id if wire.gid_is_v4(flow.dst) else found is not None
        else:
            assert found is None


def test_every_single_bit_of_a_jumbo_packet_counts(native: Native) -> None:
    # Not chance: accepting any id leaves 2^16 wrong differences, and no single bit may be one of them.
    length = 9000
    for flow in (FLOW, V6):
        buf = bytearray(_seal(native, flow, bytes(range(256)) * (length // 256 + 1))[: length - 4])
        buf = bytearray(_seal(native, flow, bytes(buf)))
        c_flow, data = native.flow(flow), native.ffi.from_buffer("uint8_t[]", buf)
        check, null = native.lib.mg_icrc_check, native.ffi.NULL
        unnoticed = []
        for position in range(8 * length):
            data[position >> 3] ^= 1 << (position & 7)
            if check(c_flow, data, length, null):
                unnoticed.append(position)
            data[position >> 3] ^= 1 << (position & 7)
        assert unnoticed == list(range(8 * MASKED_BYTE, 8 * MASKED_BYTE + 8))


@given(flow=flows(), payload=payloads(4096), start=st.integers(0, 2**20), pattern=st.integers(1, 2**16 - 1))
def test_a_burst_of_up_to_16_bits_is_noticed_when_the_id_is_known_by_ipv6(
    native: Native, flow: wire.Flow, payload: bytes, start: int, pattern: int
) -> None:
    # CRC-32 finds every burst of up to 32 bits; over IPv6 nothing of that is given away.
    if wire.gid_is_v4(flow.dst):
        flow = V6
    buf = bytearray(wire.build(wire.Packet(wire.Op.SEND_ONLY, 1, 2, payload=payload), flow))
    first = 5 + start % (len(buf) - 6)
    buf[first] ^= pattern >> 8
    buf[first + 1] ^= pattern & 0xFF
    assert native.check_icrc(flow, bytes(buf)) is None


def test_the_dont_fragment_flag_is_covered(native: Native) -> None:
    buf = wire.build(wire.Packet(wire.Op.SEND_ONLY, 1, 2), FLOW)
    assert native.check_icrc(replace(FLOW, df=False), buf) is None
    assert wire.check_icrc(replace(FLOW, df=False), buf) is None
