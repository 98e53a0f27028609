# SPDX-License-Identifier: BSD-3-Clause
"""Both codecs against what the kernel's driver really sent (tests/data/rxe-pcaps)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from wire_native import Native
from wire_pcap import CAPTURES, roce_packets

from migroce import wire

FILES = sorted(CAPTURES.glob("*.pcap"))


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def capture(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_the_captures_are_there_and_cover_every_service() -> None:
    opcodes = {pkt.payload[0] for path in FILES for pkt in roce_packets(path)}
    assert len(FILES) == 30
    assert {op & wire.SVC_MASK for op in opcodes} == {wire.SVC_RC, wire.SVC_UC, wire.SVC_UD}
    assert {wire.Op.READ_REQ, wire.Op.CMP_SWAP, wire.Op.FETCH_ADD, wire.Op.ATOMIC_ACK, wire.Op.ACK} <= opcodes


def test_every_captured_packet_decodes_and_encodes_byte_for_byte(capture: Path, native: Native) -> None:
    packets = roce_packets(capture)
    assert packets
    for captured in packets:
        pkt = wire.parse(captured.payload)
        assert native.parse(captured.payload) == pkt
        assert wire.build(pkt, captured.flow) == captured.payload
        body = native.build_body(pkt)
        assert body + native.icrc(captured.flow, body).to_bytes(4, "little") == captured.payload


def test_every_captured_icrc_checks_and_shows_the_ip_id_nobody_told_us(capture: Path, native: Native) -> None:
    for captured in roce_packets(capture):
        real = captured.flow.ip_id
        for expected in (
            {real, 0, real ^ 0xFFFF, (real + 1) & 0xFFFF} if wire.gid_is_v4(captured.flow.dst) else {0}
        ):
            flow = replace(captured.flow, ip_id=expected)
            assert native.check_icrc(flow, captured.payload) == real
            assert wire.check_icrc(flow, captured.payload) == real


def test_a_captured_packet_from_another_address_or_port_is_refused(capture: Path, native: Native) -> None:
    captured = roce_packets(capture)[0]
    other = bytearray(captured.flow.src)
    other[15] ^= 1
    for flow in (
        replace(captured.flow, src=bytes(other)),
        replace(captured.flow, sport=captured.flow.sport ^ 1),
        replace(captured.flow, dport=captured.flow.dport ^ 0x8000),
    ):
        assert native.check_icrc(flow, captured.payload) is None
        assert wire.check_icrc(flow, captured.payload) is None
