# SPDX-License-Identifier: BSD-3-Clause
"""Control messages between libmigroce.so and the agent: codec only, no sockets (docs/control.md).

One message per SOCK_SEQPACKET datagram, little-endian: a 16-byte header, then the body. Descriptors
travel beside them as SCM_RIGHTS and are the caller's business. Bodies are append-only: longer ones
than known are read as far as known, shorter ones are a ControlError, unknown types decode to None.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TypeAlias

MAGIC = 0x3152474D
VERSION = 1
MAX_MESSAGE = 4096
"""Longest message accepted, bytes."""
MAX_FDS = 18
"""Descriptors accepted with one message: two sockets, and one for each further address."""
MAX_FURTHER = MAX_FDS - 2
"""Further addresses of an interface that a process may have."""
NO_SLOT = 0xFFFFFFFF
NO_GID = b"\0" * 16
MAX_SERVICES = 256
"""Ports a process may listen on."""
N_SLOTS = 64
SLOT_SHIFT = 18
SLOT_QPNS = 1 << SLOT_SHIFT

_HEADER = struct.Struct("<IHHII")


class ControlError(Exception):
    """A message that breaks the protocol; the connection should be ended."""


class Type(enum.IntEnum):
    """Message types."""

    HELLO = 1
    WELCOME = 2
    STOP = 3
    STOPPED = 4
    RESUMED = 5
    DUMP_REQ = 6
    DUMP = 7
    LISTENS = 8
    ADDRESSES = 9
    SOCKETS = 10


class HelloState(enum.IntEnum):
    """What a connecting process is up to."""

    FRESH = 0
    STOPPED = 1
    RUNNING = 2


HELLO_FURTHER = 1
"""In a HELLO's flags: sockets of the interface's other IPv4 addresses are wanted, too."""


@dataclass(frozen=True, slots=True)
class Hello:
    """lib -> agent, first message. With RUNNING its UDP sockets come along (v4[, v6], further v4)."""

    instance: bytes
    pid: int
    state: int
    slot: int = NO_SLOT
    qpn_base: int = 0
    qpn_count: int = 0
    comm: str = ""
    gid: bytes = NO_GID
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """agent -> lib. `status`: 0 or an errno; `n_sockets` descriptors come along (v4[, v6], further v4)."""

    status: int
    slot: int = NO_SLOT
    qpn_base: int = 0
    qpn_count: int = 0
    n_sockets: int = 0
    flags: int = 0
    gid: bytes = NO_GID


@dataclass(frozen=True, slots=True)
class Stop:
    """agent -> lib: stop all QPs. `timeout_ms`: how long to wait for tokens to be exchanged."""

    flags: int = 0
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Stopped:
    """lib -> agent: stopped; the dump comes along as a memfd of `dump_len` bytes."""

    status: int
    n_qp: int = 0
    dump_len: int = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """lib -> agent: new sockets are in use and the Resumes have gone out."""

    status: int
    n_qp: int = 0


@dataclass(frozen=True, slots=True)
class DumpReq:
    """agent -> lib: a live snapshot, please."""


@dataclass(frozen=True, slots=True)
class DumpReply:
    """lib -> agent: the live snapshot comes along as a memfd of `dump_len` bytes."""

    status: int
    dump_len: int = 0


@dataclass(frozen=True, slots=True)
class Listens:
    """lib -> agent: all it listens on, low halves of service ids: 0x0106pppp TCP, 0x0111 UDP, 0x013f IB."""

    services: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Addresses:
    """lib -> agent: the interface's addresses have changed; the further ones that it has sockets of."""

    gids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Sockets:
    """agent -> lib: sockets of further addresses that it had none of; `n_sockets` come along."""

    status: int
    n_sockets: int = 0


Message: TypeAlias = (
    Hello | Welcome | Stop | Stopped | Resumed | DumpReq | DumpReply | Listens | Addresses | Sockets
)

_HELLO = struct.Struct("<16s5I16s16s")
_WELCOME = struct.Struct("<6I16s")
_TWO = struct.Struct("<2I")
_TWO_LEN = struct.Struct("<2IQ")

_MIN_BODY = {
    Type.HELLO: _HELLO.size,
    Type.WELCOME: _WELCOME.size,
    Type.STOP: _TWO.size,
    Type.STOPPED: _TWO_LEN.size,
    Type.RESUMED: _TWO.size,
    Type.DUMP_REQ: 0,
    Type.DUMP: _TWO_LEN.size,
    Type.LISTENS: 4,
    Type.ADDRESSES: 4,
    Type.SOCKETS: _TWO.size,
}


def _body(msg: Message) -> tuple[Type, bytes]:
    match msg:
        case Hello():
            comm = msg.comm.encode("utf-8", "replace")[:15]
            return Type.HELLO, _HELLO.pack(
                msg.instance, msg.pid, msg.state, msg.slot, msg.qpn_base, msg.qpn_count, comm, msg.gid
            ) + struct.pack("<I", msg.flags)
        case Welcome():
            return Type.WELCOME, _WELCOME.pack(
                msg.status, msg.slot, msg.qpn_base, msg.qpn_count, msg.n_sockets, msg.flags, msg.gid
            )
        case Stop():
            return Type.STOP, _TWO.pack(msg.flags, msg.timeout_ms)
        case Stopped():
            return Type.STOPPED, _TWO_LEN.pack(msg.status, msg.n_qp, msg.dump_len)
        case Resumed():
            return Type.RESUMED, _TWO.pack(msg.status, msg.n_qp)
        case DumpReq():
            return Type.DUMP_REQ, b""
        case DumpReply():
            return Type.DUMP, _TWO_LEN.pack(msg.status, 0, msg.dump_len)
        case Listens():
            n = len(msg.services)
            return Type.LISTENS, struct.pack(f"<{n + 1}I", n, *msg.services)
        case Addresses():
            return Type.ADDRESSES, struct.pack("<I", len(msg.gids)) + b"".join(msg.gids)
        case Sockets():
            return Type.SOCKETS, _TWO.pack(msg.status, msg.n_sockets)


def encode(msg: Message, request_id: int = 0) -> bytes:
    """The datagram for `msg`; `request_id` is echoed in the answer."""
    kind, body = _body(msg)
    return _HEADER.pack(MAGIC, kind, VERSION, len(body), request_id) + body


def decode(data: bytes) -> tuple[int, Message | None]:
    """(request id, message) of one datagram; None for a type not known. Raises ControlError."""
    if len(data) < _HEADER.size:
        raise ControlError(f"a message of {len(data)} bytes is too short for its header")
    magic, kind, version, length, request_id = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ControlError(f"a message starts with {magic:#010x} instead of {MAGIC:#010x}")
    if version != VERSION:
        raise ControlError(f"a message has protocol version {version} instead of {VERSION}")
    if length != len(data) - _HEADER.size:
        raise ControlError(f"a message claims a body of {length} bytes and has {len(data) - _HEADER.size}")
    try:
        known = Type(kind)
    except ValueError:
        return request_id, None
    if length < _MIN_BODY[known]:
        raise ControlError(f"a {known.name} of {length} bytes is too short, {_MIN_BODY[known]} are needed")
    return request_id, _message(known, data)


def _message(kind: Type, data: bytes) -> Message:
    at = _HEADER.size
    match kind:
        case Type.HELLO:
            instance, pid, state, slot, base, count, comm, gid = _HELLO.unpack_from(data, at)
            if state > HelloState.RUNNING:
                raise ControlError(f"a HELLO has the unknown state {state}")
            name = comm.split(b"\0", 1)[0].decode("utf-8", "replace")
            name = "".join(c if c.isprintable() else "?" for c in name)
            more = at + _HELLO.size
            (flags,) = struct.unpack_from("<I", data, more) if len(data) >= more + 4 else (0,)
            return Hello(instance, pid, state, slot, base, count, name, gid, flags)
        case Type.WELCOME:
            return Welcome(*_WELCOME.unpack_from(data, at))
        case Type.STOP:
            return Stop(*_TWO.unpack_from(data, at))
        case Type.STOPPED:
            return Stopped(*_TWO_LEN.unpack_from(data, at))
        case Type.RESUMED:
            return Resumed(*_TWO.unpack_from(data, at))
        case Type.DUMP_REQ:
            return DumpReq()
        case Type.DUMP:
            status, _rsv, dump_len = _TWO_LEN.unpack_from(data, at)
            return DumpReply(status, dump_len)
        case Type.LISTENS:
            (n,) = struct.unpack_from("<I", data, at)
            if n > MAX_SERVICES or len(data) < at + 4 + 4 * n:
                raise ControlError(f"a LISTENS of {len(data) - at} bytes is too short, or {n} are too many")
            return Listens(struct.unpack_from(f"<{n}I", data, at + 4))
        case Type.ADDRESSES:
            (n,) = struct.unpack_from("<I", data, at)
            if n > MAX_FURTHER or len(data) < at + 4 + 16 * n:
                raise ControlError(f"an ADDRESSES of {n} is too short, or they are too many")
            return Addresses(tuple(data[at + 4 + 16 * i : at + 20 + 16 * i] for i in range(n)))
        case Type.SOCKETS:
            return Sockets(*_TWO.unpack_from(data, at))
