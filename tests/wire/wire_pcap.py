# SPDX-License-Identifier: BSD-3-Clause
"""Read RoCE packets out of captures, and write captures for tshark."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from migroce.icrc import ROCE_PORT, Flow, gid_is_v4

CAPTURES = Path(__file__).resolve().parents[1] / "data" / "rxe-pcaps"
_V4_PREFIX = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Captured:
    """A RoCE packet of a capture: UDP payload and what its ICRC covers besides."""

    flow: Flow
    payload: bytes


def frames(path: Path) -> Iterator[bytes]:
    """Ethernet frames of a pcap file; each must have been captured whole."""
    data = path.read_bytes()
    order = "<" if data[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    assert struct.unpack_from(order + "I", data, 20)[0] == 1, "Ethernet"
    pos = 24
    while pos < len(data):
        _, _, captured, length = struct.unpack_from(order + "IIII", data, pos)
        assert captured == length
        yield data[pos + 16 : pos + 16 + captured]
        pos += 16 + captured


def roce_packets(path: Path) -> list[Captured]:
    """Every RoCE packet of a capture, in order."""
    return [pkt for frame in frames(path) if (pkt := _roce(frame)) is not None]


def _roce(frame: bytes) -> Captured | None:
    ethertype = struct.unpack_from(">H", frame, 12)[0]
    ip = frame[14:]
    if ethertype == 0x0800 and ip[9] == 17:
        assert ip[0] == 0x45, "no IP options"
        total, ip_id, frag = struct.unpack_from(">HHH", ip, 2)
        assert frag & 0x3FFF == 0, "no fragment"
        udp, src, dst, df = ip[20:total], _V4_PREFIX + ip[12:16], _V4_PREFIX + ip[16:20], bool(frag & 0x4000)
    elif ethertype == 0x86DD and ip[6] == 17:
        udp, src, dst = ip[40 : 40 + struct.unpack_from(">H", ip, 4)[0]], ip[8:24], ip[24:40]
        ip_id, df = 0, True
    else:
        return None
    sport, dport, length = struct.unpack_from(">HHH", udp)
    assert length == len(udp)
    return Captured(Flow(src, dst, sport, dport, ip_id, df), udp[8:]) if dport == ROCE_PORT else None


def frame(flow: Flow, payload: bytes) -> bytes:
    """An Ethernet frame around a UDP payload, UDP checksum 0."""
    udp = struct.pack(">HHHH", flow.sport, flow.dport, 8 + len(payload), 0) + payload
    if not gid_is_v4(flow.dst):
        head = struct.pack(">IHBB", 0x60000000, len(udp), 17, 64) + flow.src + flow.dst
        return bytes(12) + b"\x86\xdd" + head + udp
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), flow.ip_id, 0x4000 if flow.df else 0, 64, 17, 0)
    return bytes(12) + b"\x08\x00" + head + flow.src[12:] + flow.dst[12:] + udp


def write_pcap(path: Path, packets: Iterable[bytes]) -> None:
    """A capture of Ethernet frames."""
    with path.open("wb") as f:
        f.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
        for i, data in enumerate(packets):
            f.write(struct.pack("<IIII", i, 0, len(data), len(data)) + data)
