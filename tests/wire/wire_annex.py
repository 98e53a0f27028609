# SPDX-License-Identifier: BSD-3-Clause
"""RoCEv2 packets judged from outside: written from the standard alone, sharing no code with either codec.

IBA volume 1: BTH 9.2, padding 9.2.4, ICRC 7.8.1; RoCEv2 annex A17: IP and UDP headers, ICRC A17.3.3.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wire_pcap import write_pcap

ROCE = 4791
_ETH = {4: 0x0800, 6: 0x86DD}
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS, _ETH_P_ALL = 33, 263, 6, 3
_PACKET_OUTGOING = 4
_GUESSED = re.compile(":infiniband:(?!_ws)")
"""In tshark's list of a frame's protocols: it went on to dissect the payload."""
_SERVICES = {0: "RC", 1: "UC", 3: "UD", 4: "CNP", 5: "XRC", 6: "migroce"}


@dataclass(frozen=True, slots=True)
class Seen:
    """A RoCE packet as it was on the wire: an Ethernet frame, and where its parts begin."""

    frame: bytes
    family: int
    udp: int
    """Offset of the UDP header."""
    outgoing: bool = False
    """Sent by the machine that captured it."""

    @property
    def bth(self) -> bytes:
        """From the BTH to before the ICRC."""
        return self.frame[self.udp + 8 : self.end - 4]

    @property
    def end(self) -> int:
        """Where the IP packet ends: what follows pads the frame."""
        if self.family == 4:
            return 14 + int.from_bytes(self.frame[16:18], "big")
        return 54 + int.from_bytes(self.frame[18:20], "big")

    @property
    def service(self) -> str:
        """RC, UC, UD, XRC, ...; the CM's messages are UD."""
        return _SERVICES[self.bth[0] >> 5]

    @property
    def icrc(self) -> bytes:
        """As it was sent."""
        return self.frame[self.end - 4 : self.end]


def roce(frame: bytes, *, outgoing: bool = False) -> Seen | None:
    """A frame, if it holds a RoCE packet. (IPv4 options are not looked through: none of ours has any.)"""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == _ETH[4] and frame[14] == 0x45 and frame[23] == socket.IPPROTO_UDP:
        seen = Seen(frame, 4, 34, outgoing)
    elif kind == _ETH[6] and frame[20] == socket.IPPROTO_UDP:
        seen = Seen(frame, 6, 54, outgoing)
    else:
        return None
    return seen if int.from_bytes(frame[seen.udp + 2 : seen.udp + 4], "big") == ROCE else None


def icrc(seen: Seen) -> bytes:
    """What it has to be: CRC-32 over 64 ones (the LRH's place) and the packet, variant fields all ones."""
    packet = bytearray(seen.frame[14 : seen.end - 4])
    udp = seen.udp - 14
    if seen.family == 4:
        variant = [1, 8, 10, 11]  # type of service, time to live, header checksum
    else:
        packet[0] |= 0x0F  # traffic class and flow label
        variant = [1, 2, 3, 7]  # ... and hop limit
    for at in [*variant, udp + 6, udp + 7, udp + 8 + 4]:  # UDP checksum; BTH's FECN, BECN, reserved
        packet[at] = 0xFF
    return struct.pack("<I", zlib.crc32(b"\xff" * 8 + packet))


def faults(seen: Seen, capable: int = 1) -> list[str]:
    """What is wrong with a packet of ours. `capable`: the value of BTH byte 4 (docs/protocol.md)."""
    found = []
    bth, frame = seen.bth, seen.frame
    if seen.icrc != icrc(seen):
        found.append(f"ICRC {seen.icrc.hex()}, not {icrc(seen).hex()}")
    if int.from_bytes(frame[seen.udp + 4 : seen.udp + 6], "big") != seen.end - seen.udp:
        found.append("UDP length")
    if seen.family == 4 and int.from_bytes(frame[20:22], "big") != 0x4000:
        found.append("not DF, or a fragment")
    if len(bth) % 4:
        found.append("not padded to 4 bytes")
    pad = bth[1] >> 4 & 3
    if bth[1] & 0x0F or (pad and len(bth) < 12 + pad):
        found.append("TVer, or more padding than there is payload")
    if any(bth[len(bth) - pad :]) and pad:
        found.append("padding that is not zero")
    if bth[2:4] != b"\xff\xff":
        found.append("P_Key")
    if bth[4] != capable:
        found.append("reserved byte 4")
    if bth[8] & 0x7F:
        found.append("reserved bits before the PSN")
    return [f"opcode {bth[0]:#04x}: {fault}" for fault in found]


class Tap:
    """All frames of an interface of the calling thread's network namespace, from now on.

    Nobody reads meanwhile: the socket's buffer holds them, so keep the traffic small. `take` fails if
    it did not.
    """

    def __init__(self, interface: str, buffer: int = 256 << 20) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
        self._socket.bind((interface, _ETH_P_ALL))
        self._socket.setblocking(False)

    def take(self) -> list[Seen]:
        """The RoCE packets so far, in order."""
        found = []
        while True:
            try:
                frame, address = self._socket.recvfrom(1 << 17)
            except BlockingIOError:
                break
            if packet := roce(frame, outgoing=address[2] == _PACKET_OUTGOING):
                found.append(packet)
        _, drops = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert drops == 0, f"{drops} frames were not captured"
        return found

    def close(self) -> None:
        self._socket.close()


def tshark_complaints(path: Path, packets: Iterable[Seen]) -> list[str]:
    """Frames that tshark calls malformed, has something to say about, or does not decode as InfiniBand.

    What it says of a payload, which it took for another protocol by its first bytes, is not about us.
    """
    write_pcap(path, (packet.frame for packet in packets))
    wanted = '_ws.malformed || _ws.expert.severity >= "Warning" || !infiniband.bth'
    fields = ("frame.protocols", "frame.number", "infiniband.bth.opcode", "_ws.expert.message",
              "_ws.malformed")  # fmt: skip
    argv = ["tshark", "-r", str(path), "--disable-protocol", "rpcordma", "-Y", wanted, "-T", "fields"]
    done = subprocess.run(
        [*argv, *(word for name in fields for word in ("-e", name))],
        capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(path.parent)},
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if not _GUESSED.search(line.split("\t")[0])]
