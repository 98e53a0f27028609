# SPDX-License-Identifier: BSD-3-Clause
"""What a dump is made of: its records as named tuples, their layouts, and the words for their numbers.

The mirror of native/transport/dump.h's structures. Named tuples are immutable, slotted and, at 4096
QPs, three times faster than frozen data classes. Integers are host integers, GIDs and tokens are 16
raw bytes, handles are 0 for none.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, NamedTuple

QP_TYPES = {2: "RC", 3: "UC", 4: "UD", 9: "XRC_SEND", 10: "XRC_RECV"}
QP_STATES = ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR", "UNKNOWN")
MSTATES = ("normal", "stopped", "paused", "resuming")
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
    "rx_bad_qkey",
    "rx_dropped",
)


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
    n_srq: int = 0
    n_xrcd: int = 0


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
    """A completion queue; `armed`: index into ARMED; `total`: completions ever.

    `channel`: 1 + the descriptor of its completion channel, 0 without; `events`: told there, not fetched.
    """

    handle: int
    depth: int
    fill: int
    armed: int
    total: int
    channel: int = 0
    events: int = 0


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
    xrcd: int = 0
    qkey: int = 0

    @property
    def connected(self) -> bool:
        """Whether it can exchange packets: RTR, RTS, SQD or SQE."""
        return self.state in (2, 3, 4, 5)

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


class SrqRecord(NamedTuple):
    """A shared receive queue; `cq` and `xrcd` are those of an XRC one; `limit`: 0 when not armed."""

    handle: int
    num: int
    pd: int
    cq: int
    xrcd: int
    depth: int
    fill: int
    max_sge: int
    limit: int
    refs: int
    total: int


class MwRecord(NamedTuple):
    """A memory window. `mr`: lkey of the region it is bound to, 0: not bound; `qpn`: of a type 2's QP."""

    rkey: int
    type: int
    pd: int
    access: int
    mr: int
    qpn: int
    addr: int
    length: int


class XrcdRecord(NamedTuple):
    """An XRC domain."""

    handle: int
    refs: int


class AhRecord(NamedTuple):
    """An address handle: where datagrams leave from and go to."""

    handle: int
    pd: int
    sgid: bytes
    dgid: bytes
    sgid_index: int
    flow_label: int
    tclass_hop: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        out: dict[str, Any] = self._asdict()
        out["sgid"], out["dgid"] = gid_text(self.sgid), gid_text(self.dgid)
        tclass_hop = out.pop("tclass_hop")
        out["tclass"], out["hop_limit"] = tclass_hop >> 8 & 0xFF, tclass_hop & 0xFF
        return out


class McastRecord(NamedTuple):
    """A UD QP's membership in a multicast group."""

    gid: bytes
    qpn: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"gid": gid_text(self.gid), "qpn": self.qpn}


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


CONTEXT = struct.Struct("<16s11I4x")
PD = struct.Struct("<2I")
MR = struct.Struct("<3Q4I")
CQ = struct.Struct("<4IQ2I")
QP = struct.Struct("<16I16s16s16s16s14I8Q2I")
RESOURCE = struct.Struct("<4IQIIQ")
SRQ = struct.Struct("<10IQ")
XRCD = struct.Struct("<2I")
AH = struct.Struct("<2I16s16s3I4x")
MW = struct.Struct("<6I2Q")
MCAST = struct.Struct("<16sI4x")

T_CONTEXT, T_PD, T_MR, T_CQ, T_QP, T_RESOURCE, T_COUNTERS, T_SRQ = range(1, 9)
T_AH, T_XRCD, T_MCAST, T_MW = 9, 10, 11, 12
