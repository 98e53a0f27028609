# SPDX-License-Identifier: BSD-3-Clause
"""RoCEv2 packets in Python: the same codec as ``native/wire``, for the agent's stand-in and for tests.

A packet is a UDP payload: BTH, the extended headers its opcode asks for, payload, 0-3 pad bytes and
the ICRC. :func:`parse` and :func:`build` go between bytes and :class:`Packet`; :func:`check_icrc`
tells whether bytes from a socket are intact. Numbers are in host order, lengths in bytes, addresses
are 16-byte GIDs (IPv4 as ::ffff:a.b.c.d). Everything is immutable and free of side effects.

The only error raised for anything the network can contain is :class:`WireError`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Final, TypeVar

from migroce.icrc import (
    ICRC_LEN,
    MAX_LEN,
    ROCE_PORT,
    Flow,
    check_icrc,
    gid_from_ip,
    gid_is_v4,
    icrc,
    ip_from_gid,
)

__all__ = [
    "BTH4_CAPABLE", "BTH_LEN", "ICRC_LEN", "MAX_LEN", "MEH_LEN", "MEH_VERSION", "OPINFO", "PKEY_DEFAULT",
    "PSN_MASK", "QPN_MASK", "ROCE_PORT", "Aeth", "AtomicEth", "Deth", "Feth", "Flow", "Meh", "Op", "OpInfo",
    "Packet", "Reth", "Syndrome", "WireError", "build", "build_body", "check_icrc", "gid_from_ip",
    "gid_is_v4", "icrc", "ip_from_gid", "parse", "rnr_timer_code", "rnr_timer_ns",
]  # fmt: skip

BTH_LEN: Final = 12
MEH_LEN: Final = 48
MEH_VERSION: Final = 1
PSN_MASK: Final = 0xFFFFFF
QPN_MASK: Final = 0xFFFFFF
PKEY_DEFAULT: Final = 0xFFFF

BTH4_CAPABLE: Final = 0x01
"""BTH byte 4: the sender speaks the migration extension (docs/protocol.md)."""

SVC_RC: Final = 0x00
SVC_UC: Final = 0x20
SVC_UD: Final = 0x60
SVC_XRC: Final = 0xA0
SVC_MIG: Final = 0xC0
SVC_MASK: Final = 0xE0

# Bits of OpInfo.mask, as in native/wire/wire.h. Plain integers: flag enums cost a microsecond per use.
H_RETH: Final = 1 << 0
H_AETH: Final = 1 << 1
H_ATOMIC: Final = 1 << 2
H_ATOMICACK: Final = 1 << 3
H_IMM: Final = 1 << 4
H_IETH: Final = 1 << 5
H_DETH: Final = 1 << 6
H_MEH: Final = 1 << 7
H_PAYLOAD: Final = 1 << 8
P_REQUEST: Final = 1 << 9
P_FIRST: Final = 1 << 10
P_MIDDLE: Final = 1 << 11
P_LAST: Final = 1 << 12
P_ONLY: Final = 1 << 13
P_SEND: Final = 1 << 14
P_WRITE: Final = 1 << 15
P_READ: Final = 1 << 16
P_ATOMIC: Final = 1 << 17
P_CONTROL: Final = 1 << 18
H_XRCETH: Final = 1 << 19
P_ANSWERED: Final = 1 << 20
H_FETH: Final = 1 << 21

_HDR_LENS: Final = (
    (H_RETH, 16), (H_AETH, 4), (H_ATOMIC, 28), (H_ATOMICACK, 8), (H_IMM, 4), (H_IETH, 4),
    (H_DETH, 8), (H_XRCETH, 4), (H_MEH, MEH_LEN), (H_FETH, 4),
)  # fmt: skip


_T = TypeVar("_T")


class WireError(ValueError):
    """Bytes that are no packet we know, or a packet that cannot be written."""


class Op(IntEnum):
    """Opcodes: those below 0x20 are to be added to a service (RC is 0), those above stand alone."""

    SEND_FIRST = 0
    SEND_MIDDLE = 1
    SEND_LAST = 2
    SEND_LAST_IMM = 3
    SEND_ONLY = 4
    SEND_ONLY_IMM = 5
    WRITE_FIRST = 6
    WRITE_MIDDLE = 7
    WRITE_LAST = 8
    WRITE_LAST_IMM = 9
    WRITE_ONLY = 10
    WRITE_ONLY_IMM = 11
    READ_REQ = 12
    READ_RESP_FIRST = 13
    READ_RESP_MIDDLE = 14
    READ_RESP_LAST = 15
    READ_RESP_ONLY = 16
    ACK = 17
    ATOMIC_ACK = 18
    CMP_SWAP = 19
    FETCH_ADD = 20
    SEND_LAST_INV = 22
    SEND_ONLY_INV = 23
    FLUSH = 28
    ATOMIC_WRITE = 29
    RESUME = 0xC0
    RESUME_ACK = 0xC1
    TOKEN = 0xC2
    TOKEN_ACK = 0xC3


class Syndrome(IntEnum):
    """AETH syndromes (IBA 9.7.5.1). An RNR NAK is RNR_NAK + the timer's code."""

    ACK = 0x1F
    RNR_NAK = 0x20
    NAK_PSN_SEQ = 0x60
    NAK_INVALID_REQ = 0x61
    NAK_REM_ACCESS = 0x62
    NAK_REM_OP = 0x63
    NAK_INV_RD = 0x64
    NAK_STOPPED = 0x7F


@dataclass(frozen=True, slots=True)
class OpInfo:
    """What an opcode carries. ``hdr_len``: bytes from BTH to payload."""

    name: str
    mask: int
    hdr_len: int


def _opcodes() -> dict[int, OpInfo]:
    data, query = P_REQUEST | H_PAYLOAD, P_REQUEST | P_ONLY | P_ANSWERED
    send_write = {
        Op.SEND_FIRST: data | P_SEND | P_FIRST,
        Op.SEND_MIDDLE: data | P_SEND | P_MIDDLE,
        Op.SEND_LAST: data | P_SEND | P_LAST,
        Op.SEND_LAST_IMM: data | P_SEND | P_LAST | H_IMM,
        Op.SEND_ONLY: data | P_SEND | P_ONLY,
        Op.SEND_ONLY_IMM: data | P_SEND | P_ONLY | H_IMM,
        Op.WRITE_FIRST: data | P_WRITE | P_FIRST | H_RETH,
        Op.WRITE_MIDDLE: data | P_WRITE | P_MIDDLE,
        Op.WRITE_LAST: data | P_WRITE | P_LAST,
        Op.WRITE_LAST_IMM: data | P_WRITE | P_LAST | H_IMM,
        Op.WRITE_ONLY: data | P_WRITE | P_ONLY | H_RETH,
        Op.WRITE_ONLY_IMM: data | P_WRITE | P_ONLY | H_RETH | H_IMM,
    }
    acknowledged = send_write | {
        Op.READ_REQ: query | P_READ | H_RETH,
        Op.READ_RESP_FIRST: H_PAYLOAD | P_READ | P_FIRST | H_AETH,
        Op.READ_RESP_MIDDLE: H_PAYLOAD | P_READ | P_MIDDLE,
        Op.READ_RESP_LAST: H_PAYLOAD | P_READ | P_LAST | H_AETH,
        Op.READ_RESP_ONLY: H_PAYLOAD | P_READ | P_ONLY | H_AETH,
        Op.ACK: P_ONLY | H_AETH,
        Op.ATOMIC_ACK: P_ONLY | P_ATOMIC | H_AETH | H_ATOMICACK,
        Op.CMP_SWAP: query | P_ATOMIC | H_ATOMIC,
        Op.FETCH_ADD: query | P_ATOMIC | H_ATOMIC,
        Op.SEND_LAST_INV: data | P_SEND | P_LAST | H_IETH,
        Op.SEND_ONLY_INV: data | P_SEND | P_ONLY | H_IETH,
        Op.FLUSH: query | H_FETH | H_RETH,
        Op.ATOMIC_WRITE: query | H_PAYLOAD | H_RETH,
    }
    datagram = {op: send_write[op] | H_DETH for op in (Op.SEND_ONLY, Op.SEND_ONLY_IMM)}
    xrc = {op: mask | (H_XRCETH if mask & P_REQUEST else 0) for op, mask in acknowledged.items()}
    control = dict.fromkeys((Op.RESUME, Op.RESUME_ACK, Op.TOKEN, Op.TOKEN_ACK), P_CONTROL | H_MEH)
    table = {}
    for service, prefix, ops in (
        (SVC_RC, "RC", acknowledged), (SVC_UC, "UC", send_write), (SVC_UD, "UD", datagram),
        (SVC_XRC, "XRC", xrc), (0, "MIG", control),
    ):  # fmt: skip
        for op, mask in ops.items():
            hdr_len = BTH_LEN + sum(length for bit, length in _HDR_LENS if mask & bit)
            table[service + int(op)] = OpInfo(f"{prefix} {op.name}", mask, hdr_len)
    return table


OPINFO: Final[Mapping[int, OpInfo]] = MappingProxyType(_opcodes())
"""Every opcode that :func:`parse` accepts."""


# ---- headers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reth:
    """RDMA extended transport header: remote address, key and length of a READ or WRITE."""

    va: int
    rkey: int
    length: int


@dataclass(frozen=True, slots=True)
class Aeth:
    """ACK extended transport header."""

    syndrome: int
    msn: int


@dataclass(frozen=True, slots=True)
class AtomicEth:
    """Remote address and operands of an atomic; FETCH_ADD uses ``swap_add`` only."""

    va: int
    rkey: int
    swap_add: int
    compare: int = 0


@dataclass(frozen=True, slots=True)
class Feth:
    """Flush extended transport header: type 1 global, 2 persistent; level 0 a range, 1 the region."""

    type: int
    level: int


@dataclass(frozen=True, slots=True)
class Deth:
    """Datagram extended transport header."""

    qkey: int
    src_qpn: int


@dataclass(frozen=True, slots=True)
class Meh:
    """The migration extension's header (docs/protocol.md)."""

    src_qpn: int
    epoch: int
    psn: int
    token: bytes = field(repr=False)  # a secret: keep it out of logs
    gid: bytes
    version: int = MEH_VERSION
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet without its ICRC. An extended header is None where the opcode has none.

    ``pad`` is the number of zero bytes behind the payload (``-len(payload) & 3`` in what we send).
    """

    opcode: int
    dest_qpn: int
    psn: int
    pkey: int = PKEY_DEFAULT
    solicited: bool = False
    migreq: bool = False
    ackreq: bool = False
    capable: bool = False
    fecn: bool = False
    becn: bool = False
    pad: int = 0
    deth: Deth | None = None
    xrc_srqn: int | None = None
    reth: Reth | None = None
    atomic: AtomicEth | None = None
    aeth: Aeth | None = None
    atomic_orig: int | None = None
    imm: int | None = None
    ieth: int | None = None
    meh: Meh | None = None
    payload: bytes = b""
    feth: Feth | None = None

    @property
    def info(self) -> OpInfo:
        """What the opcode carries; WireError when it is unknown."""
        return _opinfo(self.opcode)


def _opinfo(opcode: int) -> OpInfo:
    info = OPINFO.get(opcode)
    if info is None:
        raise WireError(f"unknown opcode {opcode:#04x}")
    return info


_BTH: Final = struct.Struct(">BBHII")
_RETH: Final = struct.Struct(">QII")
_ATOMIC: Final = struct.Struct(">QIQQ")
_DETH: Final = struct.Struct(">II")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_MEH: Final = struct.Struct(">BBHIII16s16s")
_ICRC: Final = struct.Struct("<I")


def parse(buf: bytes) -> Packet:
    """Decode a UDP payload (BTH .. ICRC). The ICRC is not looked at: see :func:`check_icrc`.

    Reserved bits are ignored. Raises WireError for whatever is not a packet of a known opcode.
    """
    end = len(buf) - ICRC_LEN
    if end < BTH_LEN:
        raise WireError(f"{len(buf)} bytes are too short for a packet")
    opcode, flags, pkey, qpn, psn = _BTH.unpack_from(buf)
    info = _opinfo(opcode)
    if flags & 0x0F:
        raise WireError(f"transport header version {flags & 0x0F}, not 0")
    mask, pos = info.mask, BTH_LEN
    pad = flags >> 4 & 3
    body = end - info.hdr_len
    if body < pad:
        raise WireError(f"{len(buf)} bytes are too short for {info.name} with {pad} pad bytes")
    if body and not mask & (H_PAYLOAD | P_CONTROL):
        raise WireError(f"{info.name} with {body} bytes of payload")

    deth = reth = atomic = aeth = meh = None
    xrc_srqn = atomic_orig = imm = ieth = feth = None
    if mask & H_DETH:
        qkey, src = _DETH.unpack_from(buf, pos)
        deth = Deth(qkey, src & QPN_MASK)
        pos += 8
    if mask & H_XRCETH:
        xrc_srqn = _U32.unpack_from(buf, pos)[0] & QPN_MASK
        pos += 4
    if mask & H_FETH:
        word = _U32.unpack_from(buf, pos)[0]
        feth = Feth(word & 0xF, word >> 4 & 3)
        pos += 4
    if mask & H_RETH:
        reth = Reth(*_RETH.unpack_from(buf, pos))
        pos += 16
    if mask & H_ATOMIC:
        atomic = AtomicEth(*_ATOMIC.unpack_from(buf, pos))
        pos += 28
    if mask & H_AETH:
        word = _U32.unpack_from(buf, pos)[0]
        aeth = Aeth(word >> 24, word & PSN_MASK)
        pos += 4
    if mask & H_ATOMICACK:
        atomic_orig = _U64.unpack_from(buf, pos)[0]
        pos += 8
    if mask & H_IMM:
        imm = _U32.unpack_from(buf, pos)[0]
        pos += 4
    if mask & H_IETH:
        ieth = _U32.unpack_from(buf, pos)[0]
        pos += 4
    if mask & H_MEH:
        version, meh_flags, _, src, epoch, meh_psn, token, gid = _MEH.unpack_from(buf, pos)
        meh = Meh(src & QPN_MASK, epoch, meh_psn & PSN_MASK, token, gid, version, meh_flags)
        pos += MEH_LEN
    return Packet(
        opcode, qpn & QPN_MASK, psn & PSN_MASK, pkey,
        bool(flags & 0x80), bool(flags & 0x40), bool(psn & 0x80000000), bool(qpn & BTH4_CAPABLE << 24),
        bool(qpn & 0x80000000), bool(qpn & 0x40000000), pad,
        deth, xrc_srqn, reth, atomic, aeth, atomic_orig, imm, ieth, meh, bytes(buf[pos : end - pad]),
        feth,
    )  # fmt: skip


def build_body(pkt: Packet) -> bytes:
    """Encode a packet up to, and without, its ICRC.

    Raises WireError for an unknown opcode, a header that the opcode needs and the packet lacks, and
    a number that does not fit its field.
    """
    info = _opinfo(pkt.opcode)
    mask = info.mask
    flags = pkt.solicited << 7 | pkt.migreq << 6 | pkt.pad << 4
    qpn = pkt.fecn << 31 | pkt.becn << 30 | (BTH4_CAPABLE << 24 if pkt.capable else 0)
    if not (0 <= pkt.pad <= 3 and 0 <= pkt.dest_qpn <= QPN_MASK and 0 <= pkt.psn <= PSN_MASK):
        raise WireError(f"pad {pkt.pad}, QPN {pkt.dest_qpn:#x} or PSN {pkt.psn:#x} is out of range")
    if (pkt.payload or pkt.pad) and not mask & (H_PAYLOAD | P_CONTROL):
        raise WireError(f"{info.name} carries no payload")
    try:
        parts = [_BTH.pack(pkt.opcode, flags, pkt.pkey, qpn | pkt.dest_qpn, pkt.ackreq << 31 | pkt.psn)]
        if mask & H_DETH and (deth := _need(pkt.deth, "DETH", info)):
            parts.append(_DETH.pack(deth.qkey, deth.src_qpn & QPN_MASK))
        if mask & H_XRCETH:
            parts.append(_U32.pack(_need(pkt.xrc_srqn, "XRCETH", info) & QPN_MASK))
        if mask & H_FETH and (feth := _need(pkt.feth, "FETH", info)):
            parts.append(_U32.pack((feth.level & 3) << 4 | feth.type & 0xF))
        if mask & H_RETH and (reth := _need(pkt.reth, "RETH", info)):
            parts.append(_RETH.pack(reth.va, reth.rkey, reth.length))
        if mask & H_ATOMIC and (atomic := _need(pkt.atomic, "AtomicETH", info)):
            parts.append(_ATOMIC.pack(atomic.va, atomic.rkey, atomic.swap_add, atomic.compare))
        if mask & H_AETH and (aeth := _need(pkt.aeth, "AETH", info)):
            parts.append(_U32.pack(aeth.syndrome << 24 | aeth.msn & PSN_MASK))
        if mask & H_ATOMICACK:
            parts.append(_U64.pack(_need(pkt.atomic_orig, "AtomicAckETH", info)))
        if mask & H_IMM:
            parts.append(_U32.pack(_need(pkt.imm, "ImmDt", info)))
        if mask & H_IETH:
            parts.append(_U32.pack(_need(pkt.ieth, "IETH", info)))
        if mask & H_MEH and (meh := _need(pkt.meh, "MEH", info)):
            if len(meh.token) != 16 or len(meh.gid) != 16:
                raise WireError("token and GID have 16 bytes each")
            parts.append(_MEH.pack(meh.version, meh.flags, 0, meh.src_qpn & QPN_MASK, meh.epoch,
                                   meh.psn & PSN_MASK, meh.token, meh.gid))  # fmt: skip
    except struct.error as e:
        raise WireError(f"{info.name}: {e}") from e
    parts += (pkt.payload, bytes(pkt.pad))
    return b"".join(parts)


def _need(value: _T | None, name: str, info: OpInfo) -> _T:
    if value is None:
        raise WireError(f"{info.name} needs {name}")
    return value


def build(pkt: Packet, flow: Flow) -> bytes:
    """Encode a packet as a UDP payload with its ICRC. Raises WireError as :func:`build_body`."""
    body = build_body(pkt)
    if len(body) + ICRC_LEN > MAX_LEN:
        raise WireError(f"{len(body)} bytes do not fit a UDP packet")
    return body + _ICRC.pack(icrc(flow, body))


# ---- AETH timers ----------------------------------------------------------------------------------

_RNR_10US: Final = (
    65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
    3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
)  # fmt: skip


def rnr_timer_ns(code: int) -> int:
    """Time in ns that an RNR NAK's 5-bit code asks for (IBA table 45). Code 0 is the longest."""
    return _RNR_10US[code & 31] * 10_000


def rnr_timer_code(ns: int) -> int:
    """The shortest RNR timer of at least `ns`, or the longest there is."""
    return next((code for code in range(1, 32) if rnr_timer_ns(code) >= ns), 0)
