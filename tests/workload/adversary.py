# SPDX-License-Identifier: BSD-3-Clause
"""Somebody in another namespace who reads a connection's packets and sends others, from any address.

What is sent is drawn from a seed and from what was read last. Two kinds, both with a right ICRC:

- from a stranger's address: anything, with the connection's own numbers, opcodes, keys;
- from the peer's own address: whatever is not exactly what the receiver waits for: other QPNs, PSNs far
  ahead or behind (every opcode, headers absurd, lengths that lie), forged Resumes and tokens, CM datagrams,
  cut and overlong packets, copies of packets. (Who knows address, QPN *and* PSN can end an RC connection
  of any RoCE device: docs/protocol.md, section 7.)
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.native.netns import Node

from migroce.wire import OPINFO, PSN_MASK, ROCE_PORT, Flow, Op, Packet, gid_from_ip, icrc, parse

FAR = (1 << 19, (1 << 23) - (1 << 19))
"""Distance of a forged PSN from the last one read, in packets: seconds of traffic away from it."""
SNAP = 2048
SYNDROMES = (0, 0x1F, 0x20, 0x2C, 0x60, 0x61, 0x62, 0x63, 0x64, 0x7F, 0xFF)
PAYLOADS = (0, 1, 3, 4, 64, 256, 1024, 1025, 4096, 4100, 8000)
CM_ATTRIBUTES = (0x01, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x1B)
CONTROL = (Op.RESUME, Op.RESUME_ACK, Op.TOKEN, Op.TOKEN_ACK)
ETH_P_ALL = 3
SPORT = 0xC000

_IP = struct.Struct("!BBHHHBBH4s4s")
_UDP = struct.Struct("!HHHH")
_BTH = struct.Struct("!BBHII")


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet that was read: addresses, UDP source port, BTH's numbers, UDP payload if it was read whole."""

    src: str
    dst: str
    sport: int
    opcode: int
    qpn: int
    psn: int
    payload: bytes


Forged = tuple[str, bytes]
"""Source address, UDP payload without ICRC."""


class Adversary:
    """Reads at some nodes' interfaces (no name: at all of the node's); sends to some addresses.

    `senders`: the addresses that are attacked, and out of which node; `stranger`: his own address.
    """

    def __init__(
        self, readers: Sequence[Node], senders: Mapping[str, Node], stranger: str, seed: int
    ) -> None:
        self._rng = random.Random(seed)
        self._stranger = stranger
        self._taps = [node.call(lambda node=node: self._open_tap(node.iface)) for node in readers]
        self._to = {address: node.call(self._open_raw) for address, node in senders.items()}
        self.seen: dict[str, Seen] = {}
        """The last one by its destination."""
        self.control: dict[str, Packet] = {}
        """The same of the migration extension's packets."""
        self.sent: Counter[str] = Counter()
        self._copies: list[Seen] = []
        self._kinds: tuple[Callable[[Seen], Forged], ...] = (
            self.a_stranger_with_all_numbers, self.another_qpn, self.a_psn_far_away, self.a_psn_far_away,
            self.a_forged_control, self.a_cm_datagram, self.a_stub,
        )  # fmt: skip

    def close(self) -> None:
        """Close the sockets."""
        for sock in (*self._taps, *self._to.values()):
            sock.close()

    @staticmethod
    def _open_tap(iface: str) -> socket.socket:
        # of all protocols: others are not shown what goes out
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0 if iface else socket.htons(ETH_P_ALL))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        if iface:
            tap.bind((iface, ETH_P_ALL))
        tap.setblocking(False)
        return tap

    @staticmethod
    def _open_raw() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def read(self) -> None:
        """Take in what the taps have."""
        for tap in self._taps:
            self._read(tap)

    def _read(self, tap: socket.socket) -> None:
        for _ in range(2000):
            try:
                data = tap.recv(SNAP)
            except BlockingIOError:
                return
            seen = _understand(data)
            if not seen or seen.dst not in self._to or seen.src == self._stranger:
                continue
            if seen.opcode in CONTROL:
                if seen.payload:
                    self.control[seen.dst] = parse(seen.payload)
            else:
                self.seen[seen.dst] = seen
                if seen.payload:
                    self._copies = [*self._copies[-15:], seen]

    def aim(self, src: str, dst: str) -> None:
        """Attack `dst` as if from `src`, though nothing was read yet."""
        self.seen[dst] = Seen(src, dst, SPORT, 0, 1, 0, b"")

    def attack(self, packets: int) -> None:
        """Send so many, about what was read last; nothing before anything was."""
        for _ in range(packets if self.seen else 0):
            target = self._rng.choice(list(self.seen.values()))
            forge = self._rng.choice(self._kinds)
            src, body = forge(target)
            self.sent[forge.__name__] += 1
            self.send(src, target.dst, target.sport, body)
        if self._copies and self._rng.random() < 0.2:
            again = self._rng.choice(self._copies)
            self.sent["a_copy"] += 1
            self._emit(again.src, again.dst, again.sport, again.payload, 0)

    def flood(self, packets: int) -> None:
        """The same unwanted packet, over and over."""
        for target in list(self.seen.values()):
            _, body = self.another_qpn(target)
            for _ in range(packets):
                self.send(target.src, target.dst, target.sport, body)
            self.sent["flood"] += packets

    def send(self, src: str, dst: str, sport: int, body: bytes) -> None:
        """A UDP payload, its ICRC added."""
        ip_id = self._rng.randrange(1, 1 << 16)
        crc = icrc(Flow(gid_from_ip(src), gid_from_ip(dst), sport, ip_id=ip_id), body)
        self._emit(src, dst, sport, body + struct.pack("<I", crc), ip_id)

    def _emit(self, src: str, dst: str, sport: int, payload: bytes, ip_id: int) -> None:
        udp = _UDP.pack(sport, ROCE_PORT, 8 + len(payload), 0)
        head = _IP.pack(
            0x45, 0, 28 + len(payload), ip_id, 0x4000, 64, socket.IPPROTO_UDP, 0,
            socket.inet_aton(src), socket.inet_aton(dst),
        )  # fmt: skip
        try:
            self._to[dst].sendto(head + udp + payload, (dst, 0))
        except OSError as e:
            # The interface's queue is full, what a flood does; nobody has the address at the moment.
            if e.errno not in (errno.ENOBUFS, errno.EHOSTUNREACH):
                raise

    # ---- what is sent ------------------------------------------------------------------------------

    def a_stranger_with_all_numbers(self, seen: Seen) -> Forged:
        """The connection's QPN and very next PSNs, from an address that is not the peer's."""
        psn = seen.psn + self._rng.randrange(-2, 40) & PSN_MASK
        return self._stranger, self._packet(self._opcode(), seen.qpn, psn)

    def another_qpn(self, seen: Seen) -> Forged:
        """A QP that is not there, or one of the reserved ones."""
        qpn = self._rng.choice((0, 1, 2, 0xFFFFFF, seen.qpn ^ 1 << self._rng.randrange(20)))
        return seen.src, self._packet(self._opcode(), qpn, self._far(seen.psn))

    def a_psn_far_away(self, seen: Seen) -> Forged:
        """Far behind or ahead: requests to be answered as duplicates or gaps, ghost ACKs, NAKs, READ data."""
        return seen.src, self._packet(self._opcode(), seen.qpn, self._far(seen.psn))

    def a_forged_control(self, seen: Seen) -> Forged:
        """Resume, its acknowledgement, tokens: with everything right but the secret."""
        opcode = self._rng.choice(CONTROL)
        back = self.seen.get(seen.src, seen)
        gid = gid_from_ip(self._rng.choice((self._stranger, seen.src, seen.dst)))
        version = 1 if self._rng.random() < 0.9 else self._rng.randrange(256)
        epoch = self._rng.choice((0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF))
        meh = struct.pack("!BBHIII16s16s", version, 0, 0, back.qpn, epoch, self._far(seen.psn),
                          self._rng.randbytes(16), gid)  # fmt: skip
        src = self._rng.choice((seen.src, self._stranger))
        return src, self._bth(int(opcode), seen.qpn, 0, 0) + meh

    def a_cm_datagram(self, seen: Seen) -> Forged:
        """A MAD of the communication manager (or another class) to QP 1, its fields random."""
        mad = struct.pack("!BBBBHHQHHI", 1, self._rng.choice((7, 7, 7, 3, 4, 0x81)), 2,
                          self._rng.choice((3, 1, 0x81)), 0, 0, self._rng.getrandbits(64),
                          self._rng.choice(CM_ATTRIBUTES), 0, 0)  # fmt: skip
        length = self._rng.choice((232, 232, 232, 0, 100, 231, 233, 4000))
        deth = struct.pack("!II", self._rng.choice((0x80010000, 0x80010000, 0)), 1)
        body = self._bth(0x64, 1, self._rng.getrandbits(24), 0) + deth + mad + self._rng.randbytes(length)
        return self._rng.choice((seen.src, self._stranger)), body

    def a_stub(self, seen: Seen) -> Forged:
        """Fewer bytes than a BTH, or a BTH of a wrong version, key or pad count."""
        if self._rng.random() < 0.3:
            return seen.src, self._rng.randbytes(self._rng.randrange(12))
        flags, pkey = self._rng.randrange(256), self._rng.choice((0, 0x7FFF, 0xFFFF, 0x1234))
        psn = self._far(seen.psn)
        head = _BTH.pack(self._opcode(), flags, pkey, self._rng.getrandbits(8) << 24 | seen.qpn, psn)
        return seen.src, head + self._rng.randbytes(self._rng.randrange(64))

    @staticmethod
    def request(qpn: int, psn: int, rkey: int) -> bytes:
        """A WRITE of 64 bytes to an address and key of nobody's."""
        reth = struct.pack("!QII", 0x1000, rkey, 64)
        return _BTH.pack(int(Op.WRITE_ONLY), 0, 0xFFFF, qpn, 1 << 31 | psn) + reth + bytes(64)

    def _opcode(self) -> int:
        return self._rng.choice((self._rng.randrange(256), self._rng.choice((*OPINFO, 0, 4, 6, 10, 12, 17))))

    def _far(self, psn: int) -> int:
        return psn + self._rng.choice((-1, 1)) * self._rng.randrange(*FAR) & PSN_MASK

    def _bth(self, opcode: int, qpn: int, psn: int, flags: int) -> bytes:
        capable = self._rng.getrandbits(1) << 24
        return _BTH.pack(opcode, flags, 0xFFFF, capable | qpn, self._rng.getrandbits(1) << 31 | psn)

    def _packet(self, opcode: int, qpn: int, psn: int) -> bytes:
        rng = self._rng
        info = OPINFO.get(opcode)
        rest = bytearray(rng.choice((rng.randbytes, bytes))((info.hdr_len if info else 12) - 12))
        if len(rest) == 4:  # an AETH, mostly
            rest[0] = rng.choice(SYNDROMES)
        if rng.random() < 0.1:
            del rest[rng.randrange(len(rest) + 1) :]
        return self._bth(opcode, qpn, psn, rng.randrange(4) << 4) + rest + bytes(rng.choice(PAYLOADS))


def _understand(data: bytes) -> Seen | None:
    """An RC or control packet, given from its IP header on (a GSO train: its first one).

    None: something else, or one of our own, which have another IP id than the library's 0.
    """
    if len(data) < 40 or data[0] != 0x45 or data[9] != socket.IPPROTO_UDP or data[4:6] != b"\0\0":
        return None
    sport, dport, length, _ = _UDP.unpack_from(data, 20)
    opcode, _, _, qpn, psn = _BTH.unpack_from(data, 28)
    if dport != ROCE_PORT or (opcode >= 0x20 and opcode not in CONTROL):
        return None
    whole = 20 + length == len(data) < SNAP
    return Seen(
        socket.inet_ntoa(data[12:16]), socket.inet_ntoa(data[16:20]), sport, opcode, qpn & 0xFFFFFF,
        psn & PSN_MASK, data[28:] if whole else b"",
    )  # fmt: skip
