# SPDX-License-Identifier: BSD-3-Clause
"""Reader (and, for tests, writer) of a context's dump: the mirror of native/transport/dump.h.

A dump is what a stopped process hands to the agent: every PD, MR, CQ and QP with PSNs, peers, queue
fill and the responder's replay record. It crosses machines and may come from a hostile process, so
`parse` trusts nothing: it returns a consistent `Dump` or raises `DumpError` with one clear sentence.

The format is append-only: longer records than known are read as far as known, unknown record types
are counted in `Dump.unknown` and skipped.

Records are named tuples (immutable, slotted and, at 4096 QPs, three times faster than frozen data
classes); integers are host integers, GIDs and tokens are 16 raw bytes.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAGIC = b"MGDUMP\r\n"
VERSION = 1
MAX_BYTES = 256 << 20
"""Longest dump accepted, bytes: far above 2^18 QPs with some MRs each would need in practice."""

FLAG_STOPPED = 1

_HEADER = struct.Struct("<8sIIQII")
_RECORD = struct.Struct("<HHI")
_END = struct.Struct("<II")
_END_TYPE = 0xFFFF

QP_TYPES = {2: "RC", 3: "UC", 4: "UD", 9: "XRC_SEND", 10: "XRC_RECV"}
QP_STATES = ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR", "UNKNOWN")
MSTATES = ("normal", "stopped", "paused", "resuming")
_MTUS = frozenset((256, 512, 1024, 2048, 4096))
ARMED = ("no", "next", "solicited")

# enum mg_counter of native/transport/engine.h, in its order. Later ones become "counter_<n>".
COUNTER_NAMES = (
    "tx_packets",
    "rx_packets",
    "tx_bytes",
    "rx_bytes",
    "retransmits",
    "timeouts",
    "rnr_naks_rx",
    "rnr_naks_tx",
    "seq_naks_rx",
    "seq_naks_tx",
    "duplicates",
    "rx_malformed",
    "rx_icrc",
    "rx_no_qp",
    "rx_bad_source",
    "nak_stopped_rx",
    "resumes_tx",
    "resumes_rx",
    "resumes_refused",
    "tx_errors",
)


class DumpError(Exception):
    """The bytes are not a usable dump. The message is one sentence: what is wrong, and why."""


def gid_text(gid: bytes) -> str:
    """A GID as users write it: dotted for an IPv4-mapped one, else IPv6 notation; "" when all zero."""
    if gid[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, gid[12:])
    return "" if not any(gid) else socket.inet_ntop(socket.AF_INET6, gid)


def gid_bytes(text: str) -> bytes:
    """The inverse of `gid_text`; ValueError when `text` is not an address."""
    if not text:
        return b"\0" * 16
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return b"\0" * 10 + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is neither an IPv4 nor an IPv6 address") from None


class ContextRecord(NamedTuple):
    """The device context: its address, id range and totals."""

    gid: bytes
    qpn_base: int
    qpn_count: int
    slot: int
    epoch: int
    max_path_mtu: int
    n_qp: int = 0
    n_mr: int = 0
    n_cq: int = 0
    n_pd: int = 0


class PdRecord(NamedTuple):
    """A protection domain."""

    handle: int
    refs: int


class MrRecord(NamedTuple):
    """A memory region; `addr`, `length` and `iova` in bytes of the process's address space."""

    addr: int
    length: int
    iova: int
    lkey: int
    rkey: int
    access: int
    pd: int


class CqRecord(NamedTuple):
    """A completion queue; `armed`: index into ARMED; `total`: completions ever."""

    handle: int
    depth: int
    fill: int
    armed: int
    total: int


class QpRecord(NamedTuple):
    """A queue pair. Handles are 0 for none; PSNs have 24 bits; `path_mtu` in bytes."""

    qpn: int
    type: int
    state: int
    mstate: int
    pd: int
    send_cq: int
    recv_cq: int
    srq: int
    peer_qpn: int
    path_mtu: int
    peer_capable: int
    have_peer_token: int
    token_acked: int
    epoch: int
    peer_epoch: int
    sport: int
    local_gid: bytes
    peer_gid: bytes
    token: bytes
    peer_token: bytes
    una_psn: int
    next_psn: int
    epsn: int
    msn: int
    sq_depth: int
    sq_fill: int
    rq_depth: int
    rq_fill: int
    retry_cnt: int
    rnr_retry: int
    timeout: int
    min_rnr_timer: int
    n_resources: int
    tclass_hop: int
    tx_packets: int
    rx_packets: int
    tx_bytes: int
    rx_bytes: int
    retransmits: int
    duplicates: int
    send_done: int
    recv_done: int

    @property
    def connected(self) -> bool:
        """Whether it can exchange packets: RTR, RTS or SQD with a peer."""
        return self.state in (2, 3, 4)

    def to_json(self, *, secrets: bool = False) -> dict[str, Any]:
        """As plain data; the connection's tokens only with `secrets`."""
        out: dict[str, Any] = self._asdict()
        out["type"] = QP_TYPES.get(self.type, str(self.type))
        out["state"] = QP_STATES[self.state]
        out["mstate"] = MSTATES[self.mstate] if self.mstate < len(MSTATES) else str(self.mstate)
        for name in ("local_gid", "peer_gid"):
            out[name] = gid_text(out[name])
        for name in ("token", "peer_token"):
            value = out.pop(name)
            if secrets:
                out[name] = value.hex()
        for name in ("peer_capable", "have_peer_token", "token_acked"):
            out[name] = bool(out[name])
        tclass_hop = out.pop("tclass_hop")
        out["tclass"], out["hop_limit"] = tclass_hop >> 8 & 0xFF, tclass_hop & 0xFF
        return out


class ResourceRecord(NamedTuple):
    """One entry of a responder's read/atomic replay record."""

    qpn: int
    opcode: int
    first_psn: int
    last_psn: int
    va: int
    rkey: int
    length: int
    atomic_orig: int


_CONTEXT = struct.Struct("<16s9I12x")
_PD = struct.Struct("<2I")
_MR = struct.Struct("<3Q4I")
_CQ = struct.Struct("<4IQ8x")
_QP = struct.Struct("<16I16s16s16s16s14I8Q8x")
_RESOURCE = struct.Struct("<4IQIIQ")

_T_CONTEXT, _T_PD, _T_MR, _T_CQ, _T_QP, _T_RESOURCE, _T_COUNTERS = range(1, 8)


@dataclass(frozen=True, slots=True)
class Dump:
    """A whole dump. `stopped` is False for a live snapshot; `unknown`: skipped records by type."""

    context: ContextRecord
    pds: tuple[PdRecord, ...] = ()
    mrs: tuple[MrRecord, ...] = ()
    cqs: tuple[CqRecord, ...] = ()
    qps: tuple[QpRecord, ...] = ()
    resources: tuple[ResourceRecord, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    stopped: bool = True
    unknown: Mapping[int, int] = field(default_factory=dict)

    def to_json(self, *, secrets: bool = False) -> dict[str, Any]:
        """As plain data for `json.dumps`; keys and names as in dump.h, enums as words."""
        ctx: dict[str, Any] = self.context._asdict()
        ctx["gid"] = gid_text(self.context.gid)
        cqs = [cq._asdict() for cq in self.cqs]
        for cq in cqs:
            cq["armed"] = ARMED[cq["armed"]] if cq["armed"] < len(ARMED) else str(cq["armed"])
        return {
            "format": VERSION,
            "stopped": self.stopped,
            "context": ctx,
            "pds": [pd._asdict() for pd in self.pds],
            "mrs": [mr._asdict() for mr in self.mrs],
            "cqs": cqs,
            "qps": [qp.to_json(secrets=secrets) for qp in self.qps],
            "resources": [r._asdict() for r in self.resources],
            "counters": dict(self.counters),
            "unknown_records": {str(kind): n for kind, n in self.unknown.items()},
        }


def parse(data: bytes | memoryview) -> Dump:
    """Read a dump. Raises DumpError; nothing in `data` can make it raise anything else."""
    total = len(data)
    header_len, n_records, flags = _check_header(data, total)
    contexts: list[ContextRecord] = []
    pds: list[PdRecord] = []
    mrs: list[MrRecord] = []
    cqs: list[CqRecord] = []
    qps: list[QpRecord] = []
    resources: list[ResourceRecord] = []
    counters: dict[str, int] = {}
    unknown: dict[int, int] = {}
    record_unpack, qp_unpack, qp_make = _RECORD.unpack_from, _QP.unpack_from, QpRecord._make
    pos, count = header_len, 0
    while True:
        if pos + 8 > total:
            raise DumpError(f"the dump is damaged: it ends at byte {total} without an end record")
        kind, version, length = record_unpack(data, pos)
        count += 1
        body = pos + 8
        if length & 7 or length > total - body:
            raise DumpError(f"the dump is damaged: record {count} at byte {pos} claims {length} bytes, "
                            f"{total - body} are left")
        if version == 0:
            raise DumpError(f"the dump is damaged: record {count} at byte {pos} has version 0")
        if kind == _T_QP:
            if length < 256:
                raise _short("QP", count, pos, length, 256)
            qps.append(qp_make(qp_unpack(data, body)))
        elif kind == _END_TYPE:
            _check_end(data, pos, length, total)
            break
        elif kind == _T_CONTEXT:
            contexts.append(ContextRecord._make(_fixed(_CONTEXT, "context", data, count, pos, length)))
        elif kind == _T_PD:
            pds.append(PdRecord._make(_fixed(_PD, "PD", data, count, pos, length)))
        elif kind == _T_MR:
            mrs.append(MrRecord._make(_fixed(_MR, "MR", data, count, pos, length)))
        elif kind == _T_CQ:
            cqs.append(CqRecord._make(_fixed(_CQ, "CQ", data, count, pos, length)))
        elif kind == _T_RESOURCE:
            resources.append(ResourceRecord._make(_fixed(_RESOURCE, "resource", data, count, pos, length)))
        elif kind == _T_COUNTERS:
            values = struct.unpack_from(f"<{min(length // 8, 1024)}Q", data, body)
            for i, value in enumerate(values):
                counters[COUNTER_NAMES[i] if i < len(COUNTER_NAMES) else f"counter_{i}"] = value
        else:
            unknown[kind] = unknown.get(kind, 0) + 1
        pos = body + length
    if count != n_records:
        raise DumpError(f"the dump is damaged: it has {count} records, its header says {n_records}")
    if len(contexts) != 1:
        raise DumpError(f"the dump is damaged: it describes {len(contexts)} contexts instead of one")
    _check_context(contexts[0], len(qps))
    _check_qps(contexts[0], qps)
    return Dump(contexts[0], tuple(pds), tuple(mrs), tuple(cqs), tuple(qps), tuple(resources), counters,
                bool(flags & FLAG_STOPPED), unknown)


def read(path: str | os.PathLike[str]) -> Dump:
    """Read a dump file. Raises DumpError naming the file, also when it cannot be opened."""
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise DumpError(f"{name}: not a regular file")
            if info.st_size > MAX_BYTES:
                raise DumpError(f"{name}: {info.st_size} bytes is too long for a dump")
            data = f.read(MAX_BYTES + 1)
        return parse(data)
    except OSError as e:
        raise DumpError(f"{name}: cannot be read: {e.strerror}") from None
    except DumpError as e:
        raise DumpError(str(e) if str(e).startswith(name) else f"{name}: {e}") from None


def _check_header(data: bytes | memoryview, total: int) -> tuple[int, int, int]:
    if total < _HEADER.size:
        raise DumpError(f"not an RDMA dump: {total} bytes are too few")
    if total > MAX_BYTES:
        raise DumpError(f"not an RDMA dump: {total} bytes are too many")
    magic, version, header_len, total_len, n_records, flags = _HEADER.unpack_from(data, 0)
    if magic != MAGIC:
        if magic[:6] == MAGIC[:6]:
            raise DumpError("the dump was damaged by a copy in text mode: its line end was changed")
        raise DumpError(f"not an RDMA dump: it starts with {bytes(magic)!r}")
    if version != VERSION:
        raise DumpError(f"the dump has format version {version}, this migroce reads version {VERSION}")
    if header_len < _HEADER.size or header_len & 7 or header_len > total:
        raise DumpError(f"the dump is damaged: its header claims {header_len} bytes")
    if total_len != total:
        what = "truncated" if total_len > total else "followed by other data"
        raise DumpError(f"the dump is {what}: it should have {total_len} bytes and has {total}")
    return header_len, n_records, flags


def _short(what: str, count: int, pos: int, length: int, want: int) -> DumpError:
    return DumpError(f"the dump is damaged: record {count} at byte {pos} ({what}) has {length} bytes, "
                     f"at least {want} are needed")


def _fixed(layout: struct.Struct, what: str, data: bytes | memoryview, count: int, pos: int,
           length: int) -> tuple[Any, ...]:
    if length < layout.size:
        raise _short(what, count, pos, length, layout.size)
    return layout.unpack_from(data, pos + 8)


def _check_end(data: bytes | memoryview, pos: int, length: int, total: int) -> None:
    if length < _END.size:
        raise DumpError("the dump is damaged: its end record is too short")
    if pos + 8 + length != total:
        raise DumpError(f"the dump is damaged: {total - pos - 8 - length} bytes follow its end record")
    want, _zero = _END.unpack_from(data, pos + 8)
    have = zlib.crc32(memoryview(data)[:pos])
    if want != have:
        raise DumpError(f"the dump is damaged: its CRC is {have:#010x} instead of {want:#010x}")


def _check_context(ctx: ContextRecord, n_qp: int) -> None:
    if ctx.slot >= 64 and ctx.slot != 0xFFFFFFFF:
        raise DumpError(f"the dump is inconsistent: slot {ctx.slot} does not exist")
    if ctx.qpn_base + ctx.qpn_count > 1 << 24:
        raise DumpError(f"the dump is inconsistent: QPNs {ctx.qpn_base:#x}+{ctx.qpn_count:#x} exceed 24 bits")
    if ctx.n_qp != n_qp:
        raise DumpError(f"the dump is inconsistent: it holds {n_qp} QPs, its context says {ctx.n_qp}")


def _check_qps(ctx: ContextRecord, qps: Sequence[QpRecord]) -> None:
    lo, hi = ctx.qpn_base, ctx.qpn_base + ctx.qpn_count
    if len({qp.qpn for qp in qps}) != len(qps):
        raise DumpError("the dump is inconsistent: a QPN occurs twice")
    for qp in qps:
        qpn, state, peer_qpn, mtu = qp.qpn, qp.state, qp.peer_qpn, qp.path_mtu
        if not lo <= qpn < hi:
            raise DumpError(f"the dump is inconsistent: QPN {qpn:#x} is outside its context's range")
        if (peer_qpn | qp.una_psn | qp.next_psn | qp.epsn | qp.msn) >> 24:
            raise DumpError(f"the dump is inconsistent: QP {qpn:#x} has a PSN or QPN of over 24 bits")
        if state >= len(QP_STATES):
            raise DumpError(f"the dump is inconsistent: QP {qpn:#x} is in state {state}")
        if mtu not in _MTUS and qp.connected:
            raise DumpError(f"the dump is inconsistent: QP {qpn:#x} has a path MTU of {mtu}")


# ---- building, for tests and the simulator ------------------------------------------------------


def make_qp(qpn: int, **fields: Any) -> QpRecord:
    """An RC QP in RTS with defaults for everything not given."""
    values: dict[str, Any] = dict.fromkeys(QpRecord._fields, 0)
    values.update(type=2, state=3, mstate=1, path_mtu=1024, local_gid=b"\0" * 16, peer_gid=b"\0" * 16,
                  token=b"\0" * 16, peer_token=b"\0" * 16, sport=4791, retry_cnt=7, rnr_retry=7, timeout=14,
                  min_rnr_timer=12, tclass_hop=64)
    values.update(fields, qpn=qpn)
    return QpRecord(**values)


def build(dump: Dump, *, extra: Iterable[tuple[int, bytes]] = (), grow: int = 0) -> bytes:
    """The bytes of `dump` (the context's totals are set to what it holds). `extra`: further records
    as (type, body); `grow`: bytes (multiple of 8) appended to each record, as a later version would."""
    ctx = dump.context._replace(n_qp=len(dump.qps), n_mr=len(dump.mrs), n_cq=len(dump.cqs),
                                n_pd=len(dump.pds))
    parts: list[bytes] = []

    def add(kind: int, body: bytes, tail: int = grow) -> None:
        body += b"\0" * (-len(body) % 8 + tail)
        parts.append(_RECORD.pack(kind, 1, len(body)) + body)

    add(_T_CONTEXT, _CONTEXT.pack(*ctx))
    tables: tuple[tuple[int, struct.Struct, Iterable[tuple[Any, ...]]], ...] = (
        (_T_PD, _PD, dump.pds),
        (_T_MR, _MR, dump.mrs),
        (_T_CQ, _CQ, dump.cqs),
        (_T_QP, _QP, dump.qps),
        (_T_RESOURCE, _RESOURCE, dump.resources),
    )
    for kind, layout, records in tables:
        for record in records:
            add(kind, layout.pack(*record))
    if dump.counters:
        values = [dump.counters.get(name, 0) for name in COUNTER_NAMES]
        add(_T_COUNTERS, struct.pack(f"<{len(values)}Q", *values), 0)
    for kind, body in extra:
        add(kind, body)
    body = b"".join(parts)
    header = _HEADER.pack(MAGIC, VERSION, _HEADER.size, _HEADER.size + len(body) + 16, len(parts) + 1,
                          FLAG_STOPPED if dump.stopped else 0)
    body = header + body
    return body + _RECORD.pack(_END_TYPE, 1, 8) + _END.pack(zlib.crc32(body), 0)
