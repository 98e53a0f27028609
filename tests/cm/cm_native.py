# SPDX-License-Identifier: BSD-3-Clause
"""native/cm through cffi: the codec, and connection managers on a simulated network."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from cffi import FFI

MAD_LEN = 256
NEVER = (1 << 64) - 1
SECOND = 1_000_000_000
ATTRS = ("REQ", "MRA", "REJ", "REP", "RTU", "DREQ", "DREP", "SIDR_REQ", "SIDR_REP")
TCP, UDP = 0x0000000001060000, 0x0000000001110000

_PRELUDE = "typedef uint64_t mg_time; struct mg_addr { uint8_t gid[16]; };"


def declarations(directory: Path) -> str:
    """What cffi's parser takes of the headers."""
    text = "".join((directory / name).read_text() for name in ("mad.h", "cm.h"))
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    return _PRELUDE + text.replace("MG_MAD_LEN", "256").replace("MG_CM_PRIVATE_MAX", "224")


class Native:
    """The library."""

    def __init__(self, directory: Path, library: Path) -> None:
        self.ffi: Any = FFI()
        self.ffi.cdef(declarations(directory))
        self.lib: Any = self.ffi.dlopen(str(library))

    def parse(self, mad: bytes) -> Any | None:
        """A `struct mg_cm_msg`; None where C refuses."""
        msg = self.ffi.new("struct mg_cm_msg *")
        data = self.ffi.new("uint8_t[]", bytes(mad) or b"\0")  # exactly as long: ASan sees beyond
        error = self.lib.mg_cm_parse(data, len(mad), msg)
        assert error in (0, -74)
        return msg if error == 0 else None

    def build(self, msg: Any) -> bytes:
        """The MAD."""
        out = self.ffi.new("uint8_t[256]")
        self.lib.mg_cm_build(msg, out)
        return bytes(out)

    def message(self, **fields: Any) -> Any:
        """A `struct mg_cm_msg` with these fields."""
        msg = self.ffi.new("struct mg_cm_msg *")
        for name, value in fields.items():
            if isinstance(value, bytes):
                self.ffi.memmove(getattr(msg, name), value, len(value))
            else:
                setattr(msg, name, value)
        return msg


@dataclass
class Event:
    """What a connection manager told its program."""

    name: str
    conn: Any
    reason: int
    state: str


def address(number: int) -> bytes:
    """A host's GID."""
    return bytes(10) + b"\xff\xff" + bytes([10, 0, 0, number])


class Host:
    """A connection manager and what a program needs of it."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.native, self.number = world, world.native, number
        ffi, lib = self.native.ffi, self.native.lib
        self.events: list[Event] = []
        self.told: Counter[str] = Counter()
        self.stopped = False
        self.full = False
        self.wake = NEVER
        self.sent: list[bytes] = []
        self._queue: list[tuple[bytes, bytes]] = []
        self._callbacks = [
            ffi.callback("void(void *, void *, size_t)", self._random),
            ffi.callback("void(void *, const struct mg_addr *, const struct mg_addr *, uint8_t, "
                         "const uint8_t *)", self._send),
            ffi.callback("_Bool(void *, struct mg_cm_conn *, enum mg_cm_event, const struct mg_cm_msg *)",
                         self._event),
            ffi.callback("void(void *, mg_time)", self._wake),
        ]
        self._ops = ffi.new("struct mg_cm_ops *")
        self._ops.random, self._ops.send, self._ops.event, self._ops.wake = self._callbacks
        self.cm = lib.mg_cm_create(self._ops, ffi.NULL, number << 26, 6)
        self._owner = ffi.new("char[1]")

    def _random(self, _arg: Any, buf: Any, n: int) -> None:
        self.native.ffi.memmove(buf, self.world.rng.randbytes(n), n)

    def _send(self, _arg: Any, _src: Any, dst: Any, _tclass: int, mad: Any) -> None:
        data = bytes(self.native.ffi.buffer(mad, MAD_LEN))
        to = bytes(self.native.ffi.buffer(dst, 16))
        if self.stopped:  # as the engine does: it goes when the process does
            self._queue.append((to, data))
        else:
            self.sent.append(data)
            self.world.transmit(self.number, to, data)

    def _event(self, _arg: Any, conn: Any, event: int, msg: Any) -> bool:
        name = self.native.ffi.typeof("enum mg_cm_event").elements[event].removeprefix("MG_CM_EV_")
        if self.full:
            return False
        conn.owner = self._owner
        state = self.native.ffi.string(self.native.lib.mg_cm_state_name[conn.state]).decode()
        reason = msg.reason if msg != self.native.ffi.NULL else 0
        self.told[name] += 1
        self.events.append(Event(name, conn, reason, state))
        return True

    def _wake(self, _arg: Any, at: int) -> None:
        self.wake = at

    def conn(self) -> Any:
        """A new connection of the program's."""
        return self.native.lib.mg_cm_conn_new(self.cm, self._owner)

    def listen(self, port: int, prefix: int = TCP) -> Any:
        """Listen on a port of any address."""
        conn = self.conn()
        any_address = self.native.ffi.new("struct mg_addr *")
        assert self.native.lib.mg_cm_listen(conn, prefix | port, any_address) == 0
        return conn

    def connect(self, to: int, port: int, *, qpn: int = 0x123, prefix: int = TCP) -> Any:
        """Begin to connect."""
        conn = self.conn()
        header = self.native.ffi.new("struct mg_ip_hdr *", {"version": 4, "sport": 4000})
        self.native.ffi.memmove(header.src, address(self.number), 16)
        self.native.ffi.memmove(header.dst, address(to), 16)
        msg = self.native.message(service_id=prefix | port, qpn=qpn)
        msg.primary.ack_timeout = 17
        self.native.lib.mg_ip_hdr_build(header, msg.private_data)
        ends = [self.native.ffi.new("struct mg_addr *") for _ in range(2)]
        self.native.ffi.memmove(ends[0].gid, address(self.number), 16)
        self.native.ffi.memmove(ends[1].gid, address(to), 16)
        send = self.native.lib.mg_cm_send_req if prefix == TCP else self.native.lib.mg_cm_send_sidr_req
        assert send(conn, self.world.now, msg, *ends) == 0
        return conn

    def receive(self, source: bytes, mad: bytes) -> None:
        """A datagram from the network."""
        if self.stopped:
            return
        ends = [self.native.ffi.new("struct mg_addr *") for _ in range(2)]
        self.native.ffi.memmove(ends[0].gid, source, 16)
        self.native.ffi.memmove(ends[1].gid, address(self.number), 16)
        data = self.native.ffi.new("uint8_t[]", mad)
        self.native.lib.mg_cm_rx(self.cm, self.world.now, *ends, 0, data)

    def stop(self) -> None:
        """The process is being moved."""
        self.stopped = True

    def resume(self) -> None:
        """It goes on."""
        self.stopped = False
        for to, data in self._queue:
            self.sent.append(data)
            self.world.transmit(self.number, to, data)
        self._queue.clear()
        self.native.lib.mg_cm_resumed(self.cm, self.world.now)

    def attrs(self) -> list[str]:
        """The names of all messages sent."""
        return [ATTRS[int.from_bytes(mad[16:18], "big") - 0x10] for mad in self.sent]


@dataclass
class World:
    """Hosts, virtual time, a network that loses, doubles and delays."""

    native: Native
    seed: int = 0
    loss: float = 0.0
    dup: float = 0.0
    now: int = 1000 * SECOND
    hosts: dict[int, Host] = field(default_factory=dict)
    drop: Counter[str] = field(default_factory=Counter)
    """How many of the next messages of an attribute are lost."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._order = count()
        self._due: list[tuple[int, int, Any]] = []

    def host(self) -> Host:
        """One more."""
        number = len(self.hosts) + 1
        self.hosts[number] = Host(self, number)
        return self.hosts[number]

    def at(self, delay: int, what: Any) -> None:
        """Call something later."""
        heapq.heappush(self._due, (self.now + delay, next(self._order), what))

    def transmit(self, source: int, to: bytes, mad: bytes) -> None:
        """From one host to the address of another."""
        name = ATTRS[int.from_bytes(mad[16:18], "big") - 0x10]
        if self.drop[name] > 0:
            self.drop[name] -= 1
            return
        host = self.hosts.get(to[15])
        for _ in range(2 if self.rng.random() < self.dup else 1):
            if host is not None and self.rng.random() >= self.loss:
                delay = self.rng.randrange(10_000, 50_000_000)
                self.at(delay, lambda: host.receive(address(source), mad))

    def run(self, seconds: float, handle: Any = None) -> None:
        """Let time pass; `handle(host, event)` is the programs."""
        end = self.now + int(seconds * SECOND)
        while True:
            for host in self.hosts.values():
                while host.events:
                    event = host.events.pop(0)
                    if handle is not None:
                        handle(host, event)
            timers = [h.wake for h in self.hosts.values() if not h.stopped]
            due = min([*timers, self._due[0][0] if self._due else NEVER])
            if due > end:
                break
            self.now = max(self.now, due)
            if self._due and self._due[0][0] <= self.now:
                heapq.heappop(self._due)[2]()
            for host in self.hosts.values():
                if not host.stopped and host.wake <= self.now:
                    self.native.lib.mg_cm_timer(host.cm, self.now)
        self.now = end
