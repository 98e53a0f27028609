# SPDX-License-Identifier: BSD-3-Clause
"""Reader (and, for tests, writer) of a context's dump: the mirror of native/transport/dump.h.

A dump is what a stopped process hands to the agent: every PD, MR, CQ and QP with PSNs, peers, queue
fill and the responder's replay record. It crosses machines and may come from a hostile process, so
`parse` trusts nothing: it returns a consistent `Dump` or raises `DumpError` with one clear sentence.

The format is append-only: longer records than known are read as far as known, unknown record types
are counted in `Dump.unknown` and skipped.

The records themselves, their layouts and words: dump_records.py.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migroce.dump_records import (
    AH,
    ARMED,
    CONTEXT,
    COUNTER_NAMES,
    CQ,
    MCAST,
    MR,
    MSTATES,
    MW,
    PD,
    QP,
    QP_STATES,
    QP_TYPES,
    RESOURCE,
    SRQ,
    T_AH,
    T_CONTEXT,
    T_COUNTERS,
    T_CQ,
    T_MCAST,
    T_MR,
    T_MW,
    T_PD,
    T_QP,
    T_RESOURCE,
    T_SRQ,
    T_XRCD,
    XRCD,
    AhRecord,
    ContextRecord,
    CqRecord,
    McastRecord,
    MrRecord,
    MwRecord,
    PdRecord,
    QpRecord,
    ResourceRecord,
    SrqRecord,
    XrcdRecord,
    gid_bytes,
    gid_text,
)

__all__ = [
    "ARMED", "COUNTER_NAMES", "FLAG_STOPPED", "MAGIC", "MAX_BYTES", "MSTATES", "QP_STATES", "QP_TYPES",
    "VERSION", "AhRecord", "ContextRecord", "CqRecord", "Dump", "DumpError", "McastRecord", "MrRecord",
    "MwRecord", "PdRecord", "QpRecord", "ResourceRecord", "SrqRecord", "XrcdRecord", "build",
    "gid_bytes", "gid_text", "make_qp", "parse", "read",
]  # fmt: skip

MAGIC = b"MGDUMP\r\n"
VERSION = 1
MAX_BYTES = 256 << 20
"""Longest dump accepted, bytes: far above 2^18 QPs with some MRs each would need in practice."""

FLAG_STOPPED = 1

_HEADER = struct.Struct("<8sIIQII")
_RECORD = struct.Struct("<HHI")
_END = struct.Struct("<II")
_END_TYPE = 0xFFFF
_MTUS = frozenset((256, 512, 1024, 2048, 4096))


class DumpError(Exception):
    """The bytes are not a usable dump. The message is one sentence: what is wrong, and why."""


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
    srqs: tuple[SrqRecord, ...] = ()
    xrcds: tuple[XrcdRecord, ...] = ()
    ahs: tuple[AhRecord, ...] = ()
    mcasts: tuple[McastRecord, ...] = ()
    mws: tuple[MwRecord, ...] = ()

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
            "mws": [mw._asdict() for mw in self.mws],
            "cqs": cqs,
            "srqs": [srq._asdict() for srq in self.srqs],
            "xrcds": [xrcd._asdict() for xrcd in self.xrcds],
            "qps": [qp.to_json(secrets=secrets) for qp in self.qps],
            "resources": [r._asdict() for r in self.resources],
            "ahs": [ah.to_json() for ah in self.ahs],
            "mcasts": [mcast.to_json() for mcast in self.mcasts],
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
    srqs: list[SrqRecord] = []
    xrcds: list[XrcdRecord] = []
    ahs: list[AhRecord] = []
    mcasts: list[McastRecord] = []
    mws: list[MwRecord] = []
    tables: dict[int, tuple[struct.Struct, str, Callable[[Iterable[Any]], Any], list[Any]]] = {
        T_PD: (PD, "PD", PdRecord._make, pds),
        T_MR: (MR, "MR", MrRecord._make, mrs),
        T_CQ: (CQ, "CQ", CqRecord._make, cqs),
        T_RESOURCE: (RESOURCE, "resource", ResourceRecord._make, resources),
        T_SRQ: (SRQ, "SRQ", SrqRecord._make, srqs),
        T_XRCD: (XRCD, "XRCD", XrcdRecord._make, xrcds),
        T_AH: (AH, "AH", AhRecord._make, ahs),
        T_MCAST: (MCAST, "multicast", McastRecord._make, mcasts),
        T_MW: (MW, "MW", MwRecord._make, mws),
    }
    counters: dict[str, int] = {}
    unknown: dict[int, int] = {}
    record_unpack, qp_unpack, qp_make = _RECORD.unpack_from, QP.unpack_from, QpRecord._make
    pos, count = header_len, 0
    while True:
        if pos + 8 > total:
            raise DumpError(f"the dump is damaged: it ends at byte {total} without an end record")
        kind, version, length = record_unpack(data, pos)
        count += 1
        body = pos + 8
        if length & 7 or length > total - body:
            raise DumpError(
                f"the dump is damaged: record {count} at byte {pos} claims {length} bytes, "
                f"{total - body} are left"
            )
        if version == 0:
            raise DumpError(f"the dump is damaged: record {count} at byte {pos} has version 0")
        if kind == T_QP:
            if length < 256:
                raise _short("QP", count, pos, length, 256)
            qps.append(qp_make(qp_unpack(data, body)))
        elif kind == _END_TYPE:
            _check_end(data, pos, length, total)
            break
        elif kind == T_CONTEXT:
            contexts.append(ContextRecord._make(_fixed(CONTEXT, "context", data, count, pos, length)))
        elif kind in tables:
            layout, what, make, into = tables[kind]
            into.append(make(_fixed(layout, what, data, count, pos, length)))
        elif kind == T_COUNTERS:
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
    return Dump(
        contexts[0],
        tuple(pds),
        tuple(mrs),
        tuple(cqs),
        tuple(qps),
        tuple(resources),
        counters,
        bool(flags & FLAG_STOPPED),
        unknown,
        tuple(srqs),
        tuple(xrcds),
        tuple(ahs),
        tuple(mcasts),
        tuple(mws),
    )


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
    return DumpError(
        f"the dump is damaged: record {count} at byte {pos} ({what}) has {length} bytes, "
        f"at least {want} are needed"
    )


def _fixed(
    layout: struct.Struct, what: str, data: bytes | memoryview, count: int, pos: int, length: int
) -> tuple[Any, ...]:
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
    values.update(
        type=2,
        state=3,
        mstate=1,
        path_mtu=1024,
        local_gid=b"\0" * 16,
        peer_gid=b"\0" * 16,
        token=b"\0" * 16,
        peer_token=b"\0" * 16,
        sport=4791,
        retry_cnt=7,
        rnr_retry=7,
        timeout=14,
        min_rnr_timer=12,
        tclass_hop=64,
    )
    values.update(fields, qpn=qpn)
    return QpRecord(**values)


def build(dump: Dump, *, extra: Iterable[tuple[int, bytes]] = (), grow: int = 0) -> bytes:
    """The bytes of `dump` (the context's totals are set to what it holds). `extra`: further records
    as (type, body); `grow`: bytes (multiple of 8) appended to each record, as a later version would."""
    ctx = dump.context._replace(
        n_qp=len(dump.qps),
        n_mr=len(dump.mrs),
        n_cq=len(dump.cqs),
        n_pd=len(dump.pds),
        n_srq=len(dump.srqs),
        n_xrcd=len(dump.xrcds),
    )
    parts: list[bytes] = []

    def add(kind: int, body: bytes, tail: int = grow) -> None:
        body += b"\0" * (-len(body) % 8 + tail)
        parts.append(_RECORD.pack(kind, 1, len(body)) + body)

    add(T_CONTEXT, CONTEXT.pack(*ctx))
    tables: tuple[tuple[int, struct.Struct, Iterable[tuple[Any, ...]]], ...] = (
        (T_PD, PD, dump.pds),
        (T_MR, MR, dump.mrs),
        (T_MW, MW, dump.mws),
        (T_CQ, CQ, dump.cqs),
        (T_XRCD, XRCD, dump.xrcds),
        (T_SRQ, SRQ, dump.srqs),
        (T_QP, QP, dump.qps),
        (T_RESOURCE, RESOURCE, dump.resources),
        (T_AH, AH, dump.ahs),
        (T_MCAST, MCAST, dump.mcasts),
    )
    for kind, layout, records in tables:
        for record in records:
            add(kind, layout.pack(*record))
    if dump.counters:
        values = [dump.counters.get(name, 0) for name in COUNTER_NAMES]
        add(T_COUNTERS, struct.pack(f"<{len(values)}Q", *values), 0)
    for kind, body in extra:
        add(kind, body)
    body = b"".join(parts)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        _HEADER.size,
        _HEADER.size + len(body) + 16,
        len(parts) + 1,
        FLAG_STOPPED if dump.stopped else 0,
    )
    body = header + body
    return body + _RECORD.pack(_END_TYPE, 1, 8) + _END.pack(zlib.crc32(body), 0)
