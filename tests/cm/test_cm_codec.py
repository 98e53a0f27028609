# SPDX-License-Identifier: BSD-3-Clause
"""CM messages: exactly what the kernel's rdma_cm sends, whatever else is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cm_native import ATTRS, MAD_LEN, Native, address
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wire"))
from wire_pcap import CAPTURES, roce_packets

from migroce import wire

UD_SEND_ONLY = 0x64


def captured() -> list[bytes]:
    """The datagrams of rping between two kernels."""
    packets = [wire.parse(p.payload) for p in roce_packets(CAPTURES / "rxe-cm-rping.pcap")]
    return [p.payload for p in packets if p.opcode == UD_SEND_ONLY and p.dest_qpn == 1]


def test_the_kernels_messages_are_encoded_byte_for_byte(native: Native) -> None:
    mads = captured()
    seen = []
    for mad in mads:
        msg = native.parse(mad)
        assert msg is not None
        seen.append(ATTRS[msg.attr - 0x10])
        assert native.build(msg) == mad
    assert seen == ["REQ", "REP", "RTU", "DREQ", "DREP"]


def test_the_kernels_request_says_what_tshark_says(native: Native) -> None:
    req = native.parse(captured()[0])
    assert req is not None
    assert (req.local_id, req.service_id, req.ca_guid) == (0x13D95A22, 0x1061C06, 0x007800FFFE000001)
    assert (req.qpn, req.psn, req.path_mtu, req.pkey) == (0x4A, 0x5900C6, 5, 0xFFFF)
    assert (req.responder_resources, req.initiator_depth) == (1, 1)
    assert (req.remote_timeout, req.local_timeout, req.max_cm_retries) == (20, 20, 15)
    assert (req.retry_count, req.rnr_retry_count, req.primary.ack_timeout) == (7, 7, 17)
    header = native.ffi.new("struct mg_ip_hdr *")
    assert native.lib.mg_ip_hdr_parse(req.private_data, header) == 0
    assert (header.version, header.sport) == (4, 0xEBF0)
    assert bytes(header.src)[12:] == bytes([10, 78, 0, 1])
    assert bytes(header.dst)[12:] == bytes([10, 78, 0, 2])
    again = native.ffi.new("uint8_t[36]")
    native.lib.mg_ip_hdr_build(header, again)
    assert bytes(again) == bytes(req.private_data)[:36]


def _header(attr: int) -> bytes:
    return bytes([1, 7, 2, 3]) + bytes(12) + attr.to_bytes(2, "big") + bytes(6)


@given(st.integers(0x10, 0x18), st.binary(min_size=8, max_size=8), st.binary(min_size=232, max_size=232))
def test_what_parses_is_the_same_after_building(native: Native, attr: int, tid: bytes, body: bytes) -> None:
    """All but reserved bits: building what was parsed is a fixed point that parses to the same."""
    mad = bytearray(_header(attr) + body)
    mad[8:16] = tid
    msg = native.parse(bytes(mad))
    assert msg is not None
    built = native.build(msg)
    again = native.parse(built)
    assert again is not None
    assert native.build(again) == built
    assert bytes(native.ffi.buffer(again)) == bytes(native.ffi.buffer(msg))
    kept = native.lib.mg_cm_private_len(attr)
    at = {0x10: 140, 0x11: 10, 0x12: 84, 0x13: 36, 0x14: 8, 0x15: 12, 0x16: 8, 0x17: 16, 0x18: 96}[attr]
    assert built[24 + at : 24 + at + kept] == body[at : at + kept]


@given(st.binary(max_size=300))
def test_other_bytes_are_refused(native: Native, data: bytes) -> None:
    assert native.parse(data) is None or (len(data) == MAD_LEN and data[:4] == bytes([1, 7, 2, 3]))


@pytest.mark.parametrize("length", [0, 1, 23, 24, 255, 257, 512])
def test_a_datagram_of_another_length_is_refused(native: Native, length: int) -> None:
    assert native.parse((_header(0x10) + bytes(600))[:length]) is None


@pytest.mark.parametrize("where", range(4))
def test_another_class_version_or_method_is_refused(native: Native, where: int) -> None:
    mad = bytearray(_header(0x10) + bytes(232))
    assert native.parse(bytes(mad)) is not None
    mad[where] ^= 0x40
    assert native.parse(bytes(mad)) is None


@pytest.mark.parametrize("attr", [0, 1, 0x0F, 0x19, 0x1A, 0x110, 0xFFFF])
def test_alternate_paths_and_unknown_attributes_are_refused(native: Native, attr: int) -> None:
    assert native.parse(_header(attr) + bytes(232)) is None


@pytest.mark.parametrize(("byte", "value"), [(0, 1), (0, 0x10), (1, 0x00), (1, 0x50)])
def test_an_ip_header_of_another_version_is_refused(native: Native, byte: int, value: int) -> None:
    data = bytearray(b"\x00\x40" + bytes(34))
    data[byte] = value
    assert native.lib.mg_ip_hdr_parse(native.ffi.new("uint8_t[]", bytes(data)),
                                      native.ffi.new("struct mg_ip_hdr *")) == -74


def test_an_ipv4_address_is_written_as_the_kernel_does(native: Native) -> None:
    """Zeros before it, not ::ffff: (annex A11)."""
    header = native.ffi.new("struct mg_ip_hdr *", {"version": 4, "sport": 1})
    native.ffi.memmove(header.src, address(9), 16)
    out = native.ffi.new("uint8_t[36]")
    native.lib.mg_ip_hdr_build(header, out)
    assert bytes(out)[4:20] == bytes(12) + bytes([10, 0, 0, 9])
