# SPDX-License-Identifier: BSD-3-Clause
"""The invariant CRC of RoCEv2 (IBA 7.8.1, annex A17.3.3), and GIDs. See :mod:`migroce.wire`.

CRC-32 of Ethernet over 64 one-bits, the IP and UDP headers and the packet, with what routers may
change (TOS, flow label, TTL, checksums, BTH byte 4) replaced by ones.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

ROCE_PORT: Final = 4791
ICRC_LEN: Final = 4
MAX_LEN: Final = 65507
"""Longest UDP payload over IPv4, bytes."""

_BTH_LEN: Final = 12
_ICRC: Final = struct.Struct("<I")
_V4_PREFIX: Final = bytes(10) + b"\xff\xff"
_ONES_CRC: Final = zlib.crc32(b"\xff" * 8)
_PSEUDO4: Final = struct.Struct(">HHHHHH4s4sHHHH")
_PSEUDO6: Final = struct.Struct(">4sHH16s16sHHHH")


@dataclass(frozen=True, slots=True)
class Flow:
    """What the ICRC covers of the IP and UDP headers. ``src`` and ``dst`` are GIDs."""

    src: bytes
    dst: bytes
    sport: int
    dport: int = ROCE_PORT
    ip_id: int = 0
    df: bool = True


def gid_from_ip(address: str) -> bytes:
    """The GID of an address; IPv4 is mapped into ::ffff:0:0/96. Raises ValueError."""
    ip = ipaddress.ip_address(address)
    return _V4_PREFIX + ip.packed if ip.version == 4 else ip.packed


def ip_from_gid(gid: bytes) -> str:
    """The address of a GID, as :func:`gid_from_ip` takes it. Raises ValueError."""
    if gid_is_v4(gid):
        return str(ipaddress.IPv4Address(gid[12:]))
    return str(ipaddress.IPv6Address(gid))


def gid_is_v4(gid: bytes) -> bool:
    """Whether a GID is an IPv4-mapped one."""
    return len(gid) == 16 and gid[:12] == _V4_PREFIX


def icrc(flow: Flow, body: bytes) -> int:
    """ICRC of a packet given up to it (:func:`migroce.wire.build_body`); stored little-endian."""
    udp_len = 8 + len(body) + ICRC_LEN
    if gid_is_v4(flow.dst):
        head = _PSEUDO4.pack(0x45FF, 20 + udp_len, flow.ip_id, 0x4000 if flow.df else 0, 0xFF11, 0xFFFF,
                             flow.src[12:], flow.dst[12:],
                             flow.sport, flow.dport, udp_len, 0xFFFF)  # fmt: skip
    else:
        head = _PSEUDO6.pack(b"\x6f\xff\xff\xff", udp_len, 0x11FF, flow.src, flow.dst,
                             flow.sport, flow.dport, udp_len, 0xFFFF)  # fmt: skip
    crc = zlib.crc32(head + body[:4] + b"\xff", _ONES_CRC)
    return zlib.crc32(memoryview(body)[5:], crc)


_POLY: Final = 0xEDB88320
_ONE: Final = 0x80000000  # x^0: the CRC is reflected, bit 31 - k of a value is the coefficient of x^k


def _gf2_mul(a: int, b: int) -> int:
    """a * b modulo the CRC's polynomial."""
    product = 0
    while b:
        if b & _ONE:
            product ^= a
        b = b << 1 & 0xFFFFFFFF
        a = a >> 1 ^ _POLY if a & 1 else a >> 1
    return product


@lru_cache(maxsize=1024)
def _back(n_bytes: int) -> int:
    """x^(-8 * n_bytes) modulo the CRC's polynomial, which is primitive: x^(2^32 - 1) is 1."""
    exponent = -8 * n_bytes % 0xFFFFFFFF
    power, result = _ONE >> 1, _ONE
    while exponent:
        if exponent & 1:
            result = _gf2_mul(result, power)
        power = _gf2_mul(power, power)
        exponent >>= 1
    return result


def check_icrc(flow: Flow, buf: bytes) -> int | None:
    """The IP id with which a received UDP payload is intact (0 for IPv6), None when it is damaged.

    ``flow.ip_id`` is the id expected. Sockets do not show the real one, so over IPv4 any is accepted:
    CRCs of packets that differ in the id alone differ by id * x^(32 + 8n), n bytes behind the id, and
    taken back by that power the difference has a degree below 16 (native/wire/icrc.c).
    """
    if not _BTH_LEN + ICRC_LEN <= len(buf) <= MAX_LEN:
        return None
    diff: int = icrc(flow, buf[:-ICRC_LEN]) ^ _ICRC.unpack_from(buf, len(buf) - ICRC_LEN)[0]
    is_v4 = gid_is_v4(flow.dst)
    if not diff:
        return flow.ip_id if is_v4 else 0
    if not is_v4:
        return None
    diff = _gf2_mul(diff, _back(14 + 8 + len(buf)))  # rest of IP, UDP, packet less ICRC, and 4 for x^32
    if diff & 0xFFFF:
        return None
    return flow.ip_id ^ ((diff >> 8 & 0xFF00) | diff >> 24)
