# SPDX-License-Identifier: BSD-3-Clause
"""Plain data of the simulated world: what goes into and comes out of native/sim/simapi.h."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from migroce.dump import gid_bytes

from .verbs import ALL_ACCESS

US = 1_000
MS = 1_000_000
S = 1_000_000_000
NEVER = (1 << 64) - 1
ANY = 255

WC = struct.Struct("=QQ10I")
ASYNC = struct.Struct("=QIIiii4x")
MAX_PACKET = 65536


class VerbsError(OSError):
    """A verbs call was refused; `errno` says why, `posted` how much of a list was taken before."""

    def __init__(self, number: int, posted: int = 0):
        super().__init__(number, f"{errno.errorcode.get(number, number)}: {os.strerror(number)}")
        self.posted = posted


def check(rc: int) -> int:
    """The value of an API call; VerbsError for a negative errno."""
    if rc < 0:
        raise VerbsError(-rc)
    return rc


def gid(text: str) -> bytes:
    """The GID of an address: IPv4-mapped for a dotted one."""
    return gid_bytes(text)


class Reason(IntEnum):
    """enum mgs_reason: why `World.run` came back."""

    UNTIL = 0
    QUIET = 1
    WC = 2
    STANDIN = 3
    ASYNC = 4
    BUDGET = 5
    VIOLATION = 6


class CqMode(IntEnum):
    """enum mgs_cq_mode."""

    MANUAL = 0
    POLL = 1
    EVENT = 2
    SOLICITED = 3


class Action(IntEnum):
    """enum mgs_action: what a rule does to the packets it matches."""

    PASS = 0
    DROP = 1
    DUP = 2
    DELAY = 3
    CAPTURE = 4
    STEAL = 5
    SWAP = 6


class Mutation(IntEnum):
    """enum mgs_mutation: faults of the "engine" that the invariants must find."""

    NONE = 0
    LOSE_WC = 1
    DUP_WC = 2
    SWAP_WC = 3
    FLIP_MEMORY = 4
    ERROR_WC = 5


class Wc(NamedTuple):
    """A completion, as polled at time `t`. `imm` in host order, 0 without one."""

    t: int
    wr_id: int
    engine: int
    cq: int
    status: int
    opcode: int
    vendor_err: int
    byte_len: int
    imm: int
    qp_num: int
    src_qp: int
    flags: int


class Async(NamedTuple):
    """An asynchronous event; `qp`, `cq`, `srq`: index of the object, -1 if it is none."""

    t: int
    engine: int
    type: int
    qp: int
    cq: int
    srq: int


class Datagram(NamedTuple):
    """A packet (BTH to ICRC) that came to a stand-in or was captured."""

    t: int
    src: bytes
    dst: bytes
    sport: int
    sender: int
    to: int
    data: bytes
    tclass: int = 0
    hop_limit: int = 0


class Sge(NamedTuple):
    """A piece of local memory."""

    addr: int
    length: int
    lkey: int


class Wr(NamedTuple):
    """A work request, for sending or (then only wr_id and sges matter) receiving."""

    wr_id: int
    sges: Sequence[Sge] = ()
    opcode: int = 2
    flags: int = 0
    imm: int = 0
    remote_addr: int = 0
    rkey: int = 0
    compare_add: int = 0
    swap: int = 0
    srqn: int = 0
    ah: int = -1
    """UD: the address handle; with it `remote_qpn` and `remote_qkey`."""
    remote_qpn: int = 0
    remote_qkey: int = 0
    mw_rkey: int = 0
    mr_lkey: int = 0
    mw_access: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """struct mgs_link: times in ns, rates in parts per million."""

    delay: int = 5 * US
    jitter: int = 0
    queue: int = 0
    reorder_by: int = 0
    late_by: int = 0
    ps_per_byte: int = 200
    loss: int = 0
    dup: int = 0
    corrupt: int = 0
    reorder: int = 0
    late: int = 0
    burst: int = 0
    fair: int = 0
    down: int = 0
    strip: int = 0


@dataclass(frozen=True, slots=True)
class Caps:
    """Queue pair capacities."""

    send_wr: int = 64
    recv_wr: int = 64
    send_sge: int = 4
    recv_sge: int = 4
    inline: int = 64


@dataclass(frozen=True, slots=True)
class Path:
    """What connects a QP: all of ibv_qp_attr that matters."""

    dgid: bytes
    dest_qpn: int
    rq_psn: int = 0
    sq_psn: int = 0
    mtu: int = 1024
    access: int = ALL_ACCESS
    timeout: int = 10
    retry_cnt: int = 7
    rnr_retry: int = 7
    min_rnr_timer: int = 1
    max_rd_atomic: int = 4
    max_dest_rd_atomic: int = 4
    hop_limit: int = 64
    tclass: int = 0
    qkey: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """struct mgs_stats."""

    events: int
    sent: int
    delivered: int
    lost: int
    corrupted: int
    duplicated: int
    reordered: int
    unrouted: int
    injected: int
    false_accepts: int
    timer_calls: int
    bytes: int
