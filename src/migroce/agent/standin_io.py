# SPDX-License-Identifier: BSD-3-Clause
"""The stand-in on real sockets: reads what comes for a stopped container, sends what `StandIn` says.

Packets that the process had not read yet are answered first, from the very UDP sockets. From then on
they are taken from packet sockets where that is allowed: CRIU locks the network of the container it
dumps, by netfilter rules that drop all input, and leaves it locked; packet sockets see it nevertheless.
What is sent passes by the mark that CRIU's rules let through.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from migroce.agent import netns
from migroce.agent.sockets import (
    JEQ,
    LDB,
    LDH,
    RET_K,
    RSH,
    UDP_GRO,
    Insn,
    accept_all,
    attach_filter,
    dont_fragment,
    drop_all,
)
from migroce.agent.standin import Reply, StandIn
from migroce.wire import ROCE_PORT

CRIU_MARK = 0xC114
_SO_MARK = 36
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO, _IPV6_PKTINFO = 49, 50
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_VNET_LEN = 10
_GSO_UDP_L4 = 5
_GUESS_FROM = 32  # shorter ones are no trains
_BATCH = 32
_ANNOUNCE_GAPS = (0.005, 0.02, 0.08, 0.32)
_ANNOUNCE_BATCH = 64
_MAX_DATAGRAM = 65536 + 64
_NET_OFF = 0xFFF00000  # SKF_NET_OFF: relative to the IP header
_V4_PREFIX = b"\0" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class _Train:
    """Datagrams of one flow, `size` bytes each but the last; `scope`: interface of a link-local peer."""

    data: bytes
    size: int
    src: bytes
    sport: int
    dst: bytes
    scope: int

    def packets(self) -> Iterator[bytes]:
        return (self.data[at : at + self.size] for at in range(0, len(self.data), self.size))


class StandInIO:
    """Runs a `StandIn` on a stopped container's sockets until `close`, which leaves them as they were."""

    def __init__(
        self, standin: StandIn, netns_fd: int, slots: Iterable[int], sockets: Sequence[socket.socket]
    ) -> None:
        self.standin = standin
        self.sent = 0
        """Answers."""
        self.send_errors = 0
        self._loop = asyncio.get_running_loop()
        self._udp = list(sockets)
        self._packet: list[socket.socket] = []
        self._readers: list[socket.socket] = []
        self._closed = False
        for sock in self._udp:
            _prepare(sock)
        with contextlib.suppress(OSError):  # without CAP_NET_RAW the UDP sockets must do
            self._packet = netns.run_in(netns_fd, lambda: _packet_sockets(sorted(set(slots))))
        if self._packet:
            for sock in self._packet:
                self._listen(sock)
            for sock in self._udp:
                with contextlib.suppress(OSError):  # its process may have locked it
                    drop_all(sock)
                self._loop.call_soon(self._drain, sock)
        else:
            for sock in self._udp:
                self._listen(sock)
        self._telling: asyncio.Handle | None = None
        self._announce(self.standin.announce(), _ANNOUNCE_GAPS)

    def _announce(self, replies: Iterator[Reply], gaps: Sequence[float]) -> None:
        """Tell the peers, some at a time, then again after `gaps` seconds each."""
        for reply in itertools.islice(replies, _ANNOUNCE_BATCH):
            if reply.dst_gid[0] != 0xFE:  # by which interface is only known when it asks
                self._send(reply, 0)
        if (more := next(replies, None)) is not None:
            rest = itertools.chain([more], replies)
            self._telling = self._loop.call_soon(self._announce, rest, gaps)
        elif gaps:
            again, rest_of_gaps = self.standin.announce, gaps[1:]
            self._telling = self._loop.call_later(
                gaps[0], lambda: self._announce(again(), rest_of_gaps)
            )

    @property
    def sees_locked_network(self) -> bool:
        """Whether it goes on hearing while CRIU has the network locked."""
        return bool(self._packet)

    def close(self) -> None:
        """Stop answering and give the UDP sockets back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._telling is not None:
            self._telling.cancel()
        for sock in self._readers:
            self._loop.remove_reader(sock.fileno())
        if self._packet:  # waits for an RCU grace period each, some 20 ms: not while a container resumes
            self._loop.run_in_executor(None, _close_all, self._packet)
        for sock in self._udp:
            if sock.fileno() >= 0:
                _restore(sock, was_deaf=bool(self._packet))
        self._udp, self._packet, self._readers = [], [], []

    def _listen(self, sock: socket.socket) -> None:
        read = self._read_packet if sock in self._packet else self._read_udp
        self._loop.add_reader(sock.fileno(), read, sock)
        self._readers.append(sock)

    def _drain(self, sock: socket.socket) -> None:
        """Answer what was queued before the packet sockets were there."""
        if not self._closed and self._read_udp(sock):
            self._loop.call_soon(self._drain, sock)

    def _read_udp(self, sock: socket.socket) -> bool:
        return self._handle(_receive_udp(sock))

    def _read_packet(self, sock: socket.socket) -> bool:
        return self._handle(_receive_packet(sock))

    def _handle(self, received: Iterator[_Train | None]) -> bool:
        """Answer one batch; whether there may be more.

        A peer that speaks the extension pauses on the first answer: the rest of what it had sent to
        that QP by then would only repeat it. Hence all is read before anything is answered.
        """
        told: set[bytes] = set()
        trains = list(received)
        for train in trains:
            if train is None:
                continue
            for packet in train.packets():
                key = packet[4:8]  # capability bit and QPN
                if key in told:
                    continue
                for reply in self.standin.respond(packet, train.src, train.sport, train.dst):
                    self.sent += self._send(reply, train.scope)
                    if len(key) == 4 and key[0] & 1:
                        told.add(key)
        return len(trains) == _BATCH

    def _send(self, reply: Reply, scope: int) -> bool:
        v4 = reply.dst_gid[:12] == _V4_PREFIX
        family = socket.AF_INET if v4 else socket.AF_INET6
        sock = next((s for s in self._udp if s.family == family), None)
        if sock is None:
            self.send_errors += 1
            return False
        to: tuple[str, int] | tuple[str, int, int, int]
        if v4:
            info = struct.pack("I4s4s", 0, reply.src_gid[12:], b"\0" * 4)
            control = (socket.IPPROTO_IP, _IP_PKTINFO, info)
            to = (socket.inet_ntop(socket.AF_INET, reply.dst_gid[12:]), reply.dst_port)
        else:
            scope = scope if reply.dst_gid[0] == 0xFE else 0
            control = (socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("16sI", reply.src_gid, scope))
            to = (socket.inet_ntop(socket.AF_INET6, reply.dst_gid), reply.dst_port, 0, scope)
        try:
            sock.sendmsg([reply.data], [control], socket.MSG_DONTWAIT, to)
        except OSError:
            self.send_errors += 1
            return False
        return True


def _close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _prepare(sock: socket.socket) -> None:
    """Make a process's UDP socket tell all that is needed, whatever the process has done to it."""
    family = (socket.IPPROTO_IP, _IP_PKTINFO)
    if sock.family == socket.AF_INET6:
        family = (socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO)
    with contextlib.suppress(OSError):
        dont_fragment(sock)
    for level, option, value in (
        (*family, 1),
        (socket.IPPROTO_UDP, UDP_GRO, 1),  # trains that are queued already tell their size only with it
        (socket.SOL_SOCKET, _SO_MARK, CRIU_MARK),  # needs CAP_NET_ADMIN
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def _restore(sock: socket.socket, *, was_deaf: bool) -> None:
    with contextlib.suppress(OSError):
        if was_deaf:
            accept_all(sock)
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, 0)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 0)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 0)


def _receive_udp(sock: socket.socket) -> Iterator[_Train | None]:
    for _ in range(_BATCH):
        try:
            data, controls, flags, address = sock.recvmsg(_MAX_DATAGRAM, 512, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # an ICMP error of an earlier reply
            yield None
            continue
        size, dst, scope = len(data), b"", 0
        for level, kind, value in controls:
            if level == socket.IPPROTO_UDP and kind == UDP_GRO and len(value) >= 4:
                size = struct.unpack_from("i", value)[0]
            elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO and len(value) >= 12:
                dst = _V4_PREFIX + value[8:12]
            elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO and len(value) >= 20:
                dst, scope = value[:16], struct.unpack_from("I", value, 16)[0]
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not dst or size <= 0 or not data:
            yield None
            continue
        host: str = address[0].split("%")[0]
        v4 = sock.family == socket.AF_INET
        src = _V4_PREFIX + socket.inet_aton(host) if v4 else socket.inet_pton(socket.AF_INET6, host)
        yield _Train(data, size, src, address[1], dst, scope)


def _receive_packet(sock: socket.socket) -> Iterator[_Train | None]:
    for _ in range(_BATCH):
        try:
            data, address = sock.recvfrom(_MAX_DATAGRAM, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:  # the interface went away
            yield None
            continue
        yield _parse_frame(data, address)


@lru_cache(maxsize=1)
def _tells_train_size() -> bool:
    """Whether packet sockets can tell a train's segment size (else they lose trains when asked to)."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (6, 2)


def _guess_size(payload: bytes) -> int:
    """Length of a train's packets, when only its bytes are known: where the next PSN of the QP follows."""
    qpn, psn = payload[5:8], int.from_bytes(payload[9:12], "big")
    following = ((psn + 1) & 0xFFFFFF).to_bytes(3, "big")
    at = payload.find(qpn, 16)
    while at >= 0:
        if payload[at + 4 : at + 7] == following:
            return at - 5
        at = payload.find(qpn, at + 1)
    return len(payload)


def _parse_frame(data: bytes, address: tuple[str, int, int, int, bytes]) -> _Train | None:
    """What a packet socket delivers (with PACKET_VNET_HDR where that works); None: none of ours."""
    name, protocol, kind, _hatype, hardware = address
    vnet = _VNET_LEN if _tells_train_size() else 0
    if kind != socket.PACKET_HOST or len(data) < vnet:
        return None
    at = vnet + (14 if hardware else 0)  # devices without addresses (tun) have no link header
    v4 = protocol == _ETH_P_IP
    udp = at + (20 if v4 else 40)
    if len(data) < udp + 8:
        return None
    if v4:
        if data[at] != 0x45 or data[at + 9] != socket.IPPROTO_UDP or data[at + 6] & 0x3F or data[at + 7]:
            return None
        src, dst = _V4_PREFIX + data[at + 12 : at + 16], _V4_PREFIX + data[at + 16 : at + 20]
    else:
        if data[at] >> 4 != 6 or data[at + 6] != socket.IPPROTO_UDP:
            return None
        src, dst = data[at + 8 : at + 24], data[at + 24 : at + 40]
    sport, dport, length, _sum = struct.unpack_from(">4H", data, udp)
    end = udp + length
    if dport != ROCE_PORT or length <= 8 or end > len(data):
        return None
    payload = data[udp + 8 : end]
    size = len(payload)
    if vnet:
        _flags, gso_type, _hdr, gso_size = struct.unpack_from("BBHH", data)
        if gso_type & 0x7F == _GSO_UDP_L4 and gso_size:
            size = gso_size
    elif size > _GUESS_FROM:
        size = _guess_size(payload)
    scope = 0
    if not v4 and src[0] == 0xFE:
        with contextlib.suppress(OSError):
            scope = socket.if_nametoindex(name)
    return _Train(payload, size, src, sport, dst, scope)


def _slot_filter(protocol: int, slots: Sequence[int]) -> list[Insn]:
    """Accept UDP to our port with a destination QPN in one of the slots; IP options are not used by RoCE."""
    v4 = protocol == _ETH_P_IP
    udp = _NET_OFF + (20 if v4 else 40)
    program: list[Insn] = []

    def expect(load: int, at: int, value: int) -> None:
        program.extend([(load, 0, 0, at), (JEQ, 1, 0, value), (RET_K, 0, 0, 0)])

    if v4:
        expect(LDB, _NET_OFF, 0x45)
    expect(LDB, _NET_OFF + (9 if v4 else 6), socket.IPPROTO_UDP)
    expect(LDH, udp + 2, ROCE_PORT)
    program += [(LDB, 0, 0, udp + 8 + 5), (RSH, 0, 0, 2)]
    for slot in slots:
        program += [(JEQ, 0, 1, slot), (RET_K, 0, 0, 0x40000)]
    return [*program, (RET_K, 0, 0, 0)]


def _packet_sockets(slots: Sequence[int]) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for protocol in (_ETH_P_IP, _ETH_P_IPV6):
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            sock = socket.socket(socket.AF_PACKET, kind, socket.htons(protocol))
            made.append(sock)
            if _tells_train_size():
                sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            attach_filter(sock, _slot_filter(protocol, slots))
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made
