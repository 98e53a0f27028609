# SPDX-License-Identifier: BSD-3-Clause
"""Packets made by hand and what follows each: of ours, and of the kernel's rdma_rxe where that differs.

test_forged.py holds ours to it, tests/interop/test_forged.py the kernel's.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from migroce.wire import Op

from .forged import MTU, OWN_QPN, QKEY, SQ_PSN, UC, UD, Case, Fate, Target

# ---- the packets -------------------------------------------------------------------------------------------

Made = Callable[[Target], list[bytes]]
FULL = bytes(MTU)
_S, _W, _R = Op.SEND_ONLY, Op.WRITE_ONLY, Op.READ_REQ
_SEND_FIRST, _SEND_MIDDLE, _SEND_LAST = Op.SEND_FIRST, Op.SEND_MIDDLE, Op.SEND_LAST
_WRITE_FIRST, _WRITE_MIDDLE, _WRITE_LAST = Op.WRITE_FIRST, Op.WRITE_MIDDLE, Op.WRITE_LAST


def _aeth(syndrome: int) -> bytes:
    return struct.pack(">I", syndrome << 24 | 1)


def _deth(qkey: int = QKEY, qpn: int = OWN_QPN) -> bytes:
    return struct.pack(">II", qkey, qpn)


_HEADERS: dict[str, Made] = {
    "SEND": lambda t: [t.packet(_S, b"four")],
    "empty SEND": lambda t: [t.packet(_S)],
    "transport version 1": lambda t: [t.packet(_S, b"four", flags=1)],
    "another P_Key": lambda t: [t.packet(_S, b"four", pkey=0x1234)],
    "P_Key of a limited member": lambda t: [t.packet(_S, b"four", pkey=0x7FFF)],
    "a QPN that is not there": lambda t: [t.packet(_S, b"four", qpn=t.qpn ^ 0x800)],
    "reserved bits before the PSN all set": lambda t: [t.packet(_S, b"four", last=0xFF)],
    "reserved bits beside the destination QPN all set": lambda t: [t.packet(_S, b"four", reserved=0x3F)],
    "FECN and BECN": lambda t: [t.packet(_S, b"four", reserved=0xC0)],
    "solicited event and migration state": lambda t: [t.packet(_S, b"four", flags=0xC0)],
    **{f"reserved opcode {opcode:#04x}": lambda t, o=opcode: [t.packet(o, bytes(32))]  # type: ignore[misc]
       for opcode in (0x15, 0x18, 0x1B, 0x1E, 0x1F)},
    "SEND of UC": lambda t: [t.packet(UC | _S, b"four")],
    "SEND of RD": lambda t: [t.packet(0x40 | _S, bytes(16))],
    "SEND of UD": lambda t: [t.packet(UD | _S, _deth() + b"four")],
    "congestion notification": lambda t: [t.packet(0x81, bytes(16))],
    "manufacturer's opcode 0xc5": lambda t: [t.packet(0xC5, bytes(48))],
    "eight bytes of a BTH": lambda t: [t.packet(_S)[:8]],
    "WRITE without RETH": lambda t: [t.packet(_W)],
    "WRITE with half a RETH": lambda t: [t.packet(_W, t.reth(4)[:8])],
    "READ with half a RETH": lambda t: [t.packet(_R, t.reth(64)[:8])],
    "atomic with half its header": lambda t: [t.packet(Op.FETCH_ADD, t.atomic()[:12])],
    "immediate data missing": lambda t: [t.packet(Op.SEND_ONLY_IMM)],
    "more pad than payload": lambda t: [t.packet(_S, flags=0x30)],
    "SEND of five bytes without pad": lambda t: [t.packet(_S, bytes(5))],
}  # fmt: skip

_ORDER: dict[str, Made] = {
    "SEND first, last": lambda t: [t.packet(_SEND_FIRST, FULL), t.packet(_SEND_LAST, b"four", 1)],
    "SEND middle": lambda t: [t.packet(_SEND_MIDDLE, FULL)],
    "SEND last": lambda t: [t.packet(_SEND_LAST, b"four")],
    "WRITE middle": lambda t: [t.packet(_WRITE_MIDDLE, FULL)],
    "WRITE last": lambda t: [t.packet(_WRITE_LAST, b"four")],
    "SEND first, then SEND first": lambda t: [t.packet(_SEND_FIRST, FULL), t.packet(_SEND_FIRST, FULL, 1)],
    "SEND first, then SEND only": lambda t: [t.packet(_SEND_FIRST, FULL), t.packet(_S, b"four", 1)],
    "SEND first, then WRITE middle": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(_WRITE_MIDDLE, FULL, 1)],
    "SEND first, then READ": lambda t: [t.packet(_SEND_FIRST, FULL), t.packet(_R, t.reth(64), 1)],
    "SEND first, then atomic": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(Op.FETCH_ADD, t.atomic(), 1)],
    "WRITE first, then SEND last": lambda t: [
        t.packet(_WRITE_FIRST, t.reth(MTU + 4) + FULL), t.packet(_SEND_LAST, b"four", 1)],
    "WRITE first, then WRITE only": lambda t: [
        t.packet(_WRITE_FIRST, t.reth(MTU + 4) + FULL), t.packet(_W, t.reth(4) + b"four", 1)],
}  # fmt: skip

_LENGTHS: dict[str, Made] = {
    "SEND longer than the path MTU": lambda t: [t.packet(_S, bytes(MTU + 4))],
    "SEND first, shorter than the path MTU": lambda t: [t.packet(_SEND_FIRST, bytes(MTU - 4))],
    "SEND first, with pad": lambda t: [t.packet(_SEND_FIRST, FULL, flags=0x10)],
    "SEND last, empty, after a SEND first": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(_SEND_LAST, b"", 1)],
    "SEND middle, shorter than the path MTU": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(_SEND_MIDDLE, bytes(MTU - 4), 1)],
    "SEND last, longer than the path MTU": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(_SEND_LAST, bytes(MTU + 4), 1)],
    "SEND too long for its receive": lambda t: [
        t.packet(_SEND_FIRST, FULL), t.packet(_SEND_MIDDLE, FULL, 1), t.packet(_SEND_LAST, b"four", 2)],
    "WRITE": lambda t: [t.packet(_W, t.reth(4) + b"four")],
    "WRITE with less than it says": lambda t: [t.packet(_W, t.reth(8) + b"four")],
    "WRITE with more than it says": lambda t: [t.packet(_W, t.reth(4) + b"fourfour")],
    "WRITE first, last, with less than they say": lambda t: [
        t.packet(_WRITE_FIRST, t.reth(MTU + 8) + FULL), t.packet(_WRITE_LAST, b"four", 1)],
    "WRITE first, last, with more than they say": lambda t: [
        t.packet(_WRITE_FIRST, t.reth(MTU + 4) + FULL), t.packet(_WRITE_LAST, b"fourfour", 1)],
    "WRITE first of a length within the path MTU": lambda t: [t.packet(_WRITE_FIRST, t.reth(MTU) + FULL)],
    "WRITE of 0xffffffff bytes": lambda t: [t.packet(_WRITE_FIRST, t.reth(0xFFFFFFFF) + FULL)],
    "READ": lambda t: [t.packet(_R, t.reth(64))],
    "READ request with data behind it": lambda t: [t.packet(_R, t.reth(64) + b"four")],
    "READ of 0xffffffff bytes": lambda t: [t.packet(_R, t.reth(0xFFFFFFFF))],
}  # fmt: skip

_KEYS: dict[str, Made] = {
    "WRITE with a key of nobody's": lambda t: [t.packet(_W, t.reth(4, rkey=t.rkey ^ 0xFF00) + b"four")],
    "WRITE to memory that may not be written": lambda t: [
        t.packet(_W, t.reth(4, rkey=t.closed_rkey, va=t.closed_va) + b"four")],
    "WRITE across the end": lambda t: [t.packet(_W, t.reth(4, 8190) + b"four")],
    "WRITE around the end of the address space": lambda t: [
        t.packet(_W, t.reth(16, va=(1 << 64) - 8) + bytes(16))],
    "empty WRITE with a key of nobody's": lambda t: [t.packet(_W, t.reth(0, rkey=t.rkey ^ 0xFF00))],
    "READ with a key of nobody's": lambda t: [t.packet(_R, t.reth(64, rkey=t.rkey ^ 0xFF00))],
    "READ of memory that may not be read": lambda t: [
        t.packet(_R, t.reth(64, rkey=t.closed_rkey, va=t.closed_va))],
    "READ across the end": lambda t: [t.packet(_R, t.reth(64, 8190))],
    "atomic": lambda t: [t.packet(Op.FETCH_ADD, t.atomic())],
    "atomic with a key of nobody's": lambda t: [t.packet(Op.FETCH_ADD, t.atomic(rkey=t.rkey ^ 0xFF00))],
    "atomic at an odd address": lambda t: [t.packet(Op.FETCH_ADD, t.atomic(4))],
    "atomic across the end": lambda t: [t.packet(Op.FETCH_ADD, t.atomic(8192))],
    "SEND with invalidate of nobody's key": lambda t: [
        t.packet(Op.SEND_ONLY_INV, struct.pack(">I", t.rkey ^ 0xFF00) + b"four")],
}  # fmt: skip

_PSNS: dict[str, Made] = {
    "SEND one ahead": lambda t: [t.packet(_S, b"four", 1)],
    "SEND one ahead, twice": lambda t: [t.packet(_S, b"four", 1), t.packet(_S, b"four", 1)],
    "SEND one ahead, then the right one": lambda t: [t.packet(_S, b"four", 1), t.packet(_S, b"four")],
    "SEND as far ahead as can be": lambda t: [t.packet(_S, b"four", 0x7FFFFF)],
    "SEND as far behind as can be": lambda t: [t.packet(_S, b"four", -0x800000)],
    "duplicate of what was no WRITE, as one": lambda t: [t.packet(_W, t.reth(4) + b"four", -1)],
    "duplicate READ of what was none": lambda t: [t.packet(_R, t.reth(64), -1)],
    "duplicate atomic of what was none": lambda t: [t.packet(Op.FETCH_ADD, t.atomic(), -1)],
    "atomic, twice": lambda t: [t.packet(Op.FETCH_ADD, t.atomic()), t.packet(Op.FETCH_ADD, t.atomic())],
    "READ, then a longer one as its duplicate": lambda t: [
        t.packet(_R, t.reth(64)), t.packet(_R, t.reth(128))],
}  # fmt: skip

_GHOSTS: dict[str, Made] = {
    "ACK of what was not sent": lambda t: [t.packet(Op.ACK, _aeth(0x1F), psn=SQ_PSN)],
    "NAK sequence error about nothing": lambda t: [t.packet(Op.ACK, _aeth(0x60), psn=SQ_PSN)],
    "NAK remote access error about nothing": lambda t: [t.packet(Op.ACK, _aeth(0x62), psn=SQ_PSN)],
    "RNR NAK about nothing": lambda t: [t.packet(Op.ACK, _aeth(0x2C), psn=SQ_PSN)],
    "READ response to nothing": lambda t: [
        t.packet(Op.READ_RESP_ONLY, _aeth(0x1F) + bytes(64), psn=SQ_PSN)],
    "atomic acknowledgement to nothing": lambda t: [
        t.packet(Op.ATOMIC_ACK, _aeth(0x1F) + bytes(8), psn=SQ_PSN)],
}  # fmt: skip

_ANSWERS: dict[str, tuple[str, Made]] = {
    "SEND: ACK of a later one": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x1F), psn=SQ_PSN + 1)]),
    "SEND: ACK of an earlier one": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x1F), psn=SQ_PSN - 1)]),
    "SEND: NAK with a reserved code": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x6F), psn=SQ_PSN)]),
    "SEND: AETH of the reserved kind": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x5F), psn=SQ_PSN)]),
    "SEND: NAK invalid request": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x61), psn=SQ_PSN)]),
    "SEND: NAK remote access error": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x62), psn=SQ_PSN)]),
    "SEND: NAK remote operational error": ("send", lambda t: [t.packet(Op.ACK, _aeth(0x63), psn=SQ_PSN)]),
    "SEND: READ response": ("send", lambda t: [
        t.packet(Op.READ_RESP_ONLY, _aeth(0x1F) + bytes(64), psn=SQ_PSN)]),
    "READ: ACK": ("read", lambda t: [t.packet(Op.ACK, _aeth(0x1F), psn=SQ_PSN)]),
    "READ: response too short": ("read", lambda t: [
        t.packet(Op.READ_RESP_ONLY, _aeth(0x1F) + bytes(32), psn=SQ_PSN)]),
    "READ: response too long": ("read", lambda t: [
        t.packet(Op.READ_RESP_ONLY, _aeth(0x1F) + bytes(128), psn=SQ_PSN)]),
    "READ: atomic acknowledgement": ("read", lambda t: [
        t.packet(Op.ATOMIC_ACK, _aeth(0x1F) + bytes(8), psn=SQ_PSN)]),
    "atomic: ACK": ("atomic", lambda t: [t.packet(Op.ACK, _aeth(0x1F), psn=SQ_PSN)]),
    "atomic: READ response": ("atomic", lambda t: [
        t.packet(Op.READ_RESP_ONLY, _aeth(0x1F) + bytes(8), psn=SQ_PSN)]),
}  # fmt: skip

_OF_UC: dict[str, Made] = {
    "UC: SEND": lambda t: [t.packet(UC | _S, b"four5678")],
    "UC: SEND of RC": lambda t: [t.packet(_S, b"four5678")],
    "UC: SEND middle": lambda t: [t.packet(UC | _SEND_MIDDLE, FULL)],
    "UC: SEND last": lambda t: [t.packet(UC | _SEND_LAST, b"four5678")],
    "UC: READ": lambda t: [t.packet(UC | _R, t.reth(64))],
    "UC: WRITE with a key of nobody's": lambda t: [
        t.packet(UC | _W, t.reth(4, rkey=t.rkey ^ 0xFF00) + b"four")],
    "UC: WRITE across the end": lambda t: [t.packet(UC | _W, t.reth(4, 8190) + b"four")],
    "UC: WRITE": lambda t: [t.packet(UC | _W, t.reth(4) + b"four")],
}  # fmt: skip

_OF_UD: dict[str, Made] = {
    "UD: SEND": lambda t: [t.packet(UD | _S, _deth() + b"four5678")],
    "UD: another Q_Key": lambda t: [t.packet(UD | _S, _deth(qkey=0x22222222) + b"four5678")],
    "UD: SEND first": lambda t: [t.packet(UD | _SEND_FIRST, _deth() + FULL)],
    "UD: SEND of RC": lambda t: [t.packet(_S, b"four5678")],
    "UD: SEND without DETH": lambda t: [t.packet(UD | _S)],
    "UD: SEND with half a DETH": lambda t: [t.packet(UD | _S, _deth()[:4])],
    "UD: WRITE": lambda t: [t.packet(UD | _W, _deth() + t.reth(4) + b"four")],
}  # fmt: skip


# ---- what follows ------------------------------------------------------------------------------------------


def _taken(packets: int, *received: int, answers: tuple[int, ...] = (), changed: int = 0) -> Fate:
    """Executed; `received`: bytes of each message, `changed`: so many at the memory's beginning."""
    done = tuple(f"recv SUCCESS {length}" for length in received)
    return Fate(taken=packets, answers=answers, completions=done, changed=((0, changed),) if changed else ())


def _refused(syndrome: int, psn: int = 0, *, receive: str = "WR_FLUSH_ERR", changed: int = 0) -> Fate:
    """The QP has ended with that NAK; `receive`: status of the receive that was to be used."""
    done = (f"recv {receive}", "recv WR_FLUSH_ERR")
    return Fate("ERR", ((syndrome, psn),), None, (), done, ((0, changed),) if changed else ())


def _told(status: str) -> Fate:
    """The target's own request has ended with an error."""
    return Fate("ERR", (), None, (), (f"send {status}", "recv WR_FLUSH_ERR", "recv WR_FLUSH_ERR"))


def _gap(taken: int = 0, *received: int) -> Fate:
    """Asked for what is missing, once."""
    return dataclasses.replace(_taken(taken, *received), naks=((_SEQUENCE, 0),))


_SEQUENCE, _INVALID, _ACCESS, _OPERATION = 0x60, 0x61, 0x62, 0x63
_IGNORED = Fate()
_UNACKNOWLEDGED = Fate(taken=None)
_LATER = Fate(completions=("send SUCCESS",))
"""Ignored: the right answer that comes later is what counts."""
_LATER_DATA = dataclasses.replace(_LATER, read=True)

_OURS: dict[str, Fate] = {
    "SEND": _taken(1, 4),
    "empty SEND": _taken(1, 0),
    "P_Key of a limited member": _taken(1, 4),
    "reserved bits before the PSN all set": _taken(1, 4),
    "reserved bits beside the destination QPN all set": _taken(1, 4, answers=(Op.TOKEN,)),  # one is CAPABLE
    "FECN and BECN": _taken(1, 4),
    "solicited event and migration state": _taken(1, 4),
    "SEND of five bytes without pad": _taken(1, 5),
    "SEND first, last": _taken(2, MTU + 4),
    "SEND middle": _refused(_INVALID),
    "SEND last": _refused(_INVALID),
    "WRITE middle": _refused(_INVALID),
    "WRITE last": _refused(_INVALID),
    "WRITE first, then SEND last": _refused(_INVALID, 1, changed=MTU),
    "WRITE first, then WRITE only": _refused(_INVALID, 1, changed=MTU),
    "SEND too long for its receive": _refused(_INVALID, 2, receive="LOC_LEN_ERR"),
    "WRITE": _taken(1, changed=4),
    "WRITE with less than it says": _refused(_INVALID),
    "WRITE with more than it says": _refused(_INVALID),
    "WRITE first, last, with less than they say": _refused(_INVALID, 1, changed=MTU),
    "WRITE first, last, with more than they say": _refused(_INVALID, 1, changed=MTU),
    "WRITE first of a length within the path MTU": _refused(_INVALID),
    "WRITE of 0xffffffff bytes": _refused(_INVALID),
    "READ": _taken(1, answers=(Op.READ_RESP_ONLY,)),
    "READ of 0xffffffff bytes": _refused(_INVALID),
    "WRITE with a key of nobody's": _refused(_ACCESS),
    "WRITE to memory that may not be written": _refused(_ACCESS),
    "WRITE across the end": _refused(_ACCESS),
    "WRITE around the end of the address space": _refused(_ACCESS),
    "empty WRITE with a key of nobody's": _taken(1),
    "READ with a key of nobody's": _refused(_ACCESS),
    "READ of memory that may not be read": _refused(_ACCESS),
    "READ across the end": _refused(_ACCESS),
    "atomic": _taken(1, answers=(Op.ATOMIC_ACK,), changed=1),
    "atomic with a key of nobody's": _refused(_ACCESS),
    "atomic at an odd address": _refused(_INVALID),
    "atomic across the end": _refused(_ACCESS),
    # Executed and acknowledged as a SEND; what it was to invalidate is the responder's error.
    "SEND with invalidate of nobody's key": Fate(
        "ERR", taken=None, completions=("recv REM_INV_REQ_ERR", "recv WR_FLUSH_ERR")
    ),
    "SEND one ahead": _gap(),
    "SEND one ahead, twice": _gap(),
    "SEND one ahead, then the right one": _gap(1, 4),
    "SEND as far ahead as can be": _gap(),
    "atomic, twice": _taken(1, answers=(Op.ATOMIC_ACK, Op.ATOMIC_ACK), changed=1),
    "READ, then a longer one as its duplicate": _taken(1, answers=(Op.READ_RESP_ONLY,)),
    "SEND: NAK invalid request": _told("REM_INV_REQ_ERR"),
    "SEND: NAK remote access error": _told("REM_ACCESS_ERR"),
    "SEND: NAK remote operational error": _told("REM_OP_ERR"),
    **dict.fromkeys((name for name, (asks, _) in _ANSWERS.items() if asks != "send"), _LATER_DATA),
    "UC: SEND": Fate(taken=None, completions=("recv SUCCESS 8",)),
    "UC: WRITE": Fate(taken=None, changed=((0, 4),)),
    "UD: SEND": Fate(taken=None, completions=("recv SUCCESS 48",)),
}
"""What is not named here is ignored."""

_OUT_OF_ORDER = (
    "SEND first, then SEND first", "SEND first, then SEND only", "SEND first, then WRITE middle",
    "SEND first, then READ", "SEND first, then atomic", "SEND last, empty, after a SEND first",
    "SEND middle, shorter than the path MTU", "SEND last, longer than the path MTU",
)  # fmt: skip
_OUT_OF_SHAPE = (
    "SEND longer than the path MTU", "SEND first, shorter than the path MTU", "SEND first, with pad"
)  # fmt: skip
_OURS |= {name: _refused(_INVALID, 1, receive="LOC_QP_OP_ERR") for name in _OUT_OF_ORDER}
_OURS |= {name: _refused(_INVALID) for name in _OUT_OF_SHAPE}

_KERNELS: dict[str, Fate] = {
    "reserved bits beside the destination QPN all set": _taken(1, 4),
    **{name: _refused(_INVALID, 1, receive="REM_INV_REQ_ERR") for name in _OUT_OF_ORDER},
    **{name: _refused(_INVALID, receive="REM_INV_REQ_ERR") for name in _OUT_OF_SHAPE},
    "SEND too long for its receive": _refused(_OPERATION, 2, receive="LOC_QP_OP_ERR"),
    "WRITE first of a length within the path MTU": _taken(1, changed=MTU),
    "READ request with data behind it": _taken(1, answers=(Op.READ_RESP_ONLY,)),
    "SEND: NAK with a reserved code": _told("REM_OP_ERR"),
    "SEND: AETH of the reserved kind": _told("SUCCESS"),
    "SEND: READ response": _told("fatal error"),
    "READ: ACK": _LATER,  # successful, without its data
    "READ: response too long": _told("LOC_PROT_ERR"),
    "READ: atomic acknowledgement": _told("SUCCESS"),
    "atomic: ACK": _LATER,
    "atomic: READ response": _told("fatal error"),
}
"""Where rdma_rxe (6.12) differs."""


def _case(name: str, made: Made, kind: str = "rc", asks: str = "") -> Case:
    ignored = _LATER if asks else _IGNORED if kind == "rc" else _UNACKNOWLEDGED
    ours = _OURS.get(name, ignored)
    return Case(name, made, ours, _KERNELS.get(name, ours), kind, asks)


_OF_RC = (_HEADERS, _ORDER, _LENGTHS, _KEYS, _PSNS, _GHOSTS)
CASES = [
    *(_case(*each) for group in _OF_RC for each in group.items()),
    *(_case(name, made, asks=asks) for name, (asks, made) in _ANSWERS.items()),
    *(_case(*each, kind="uc") for each in _OF_UC.items()),
    *(_case(*each, kind="ud") for each in _OF_UD.items()),
]
"""All of them."""
