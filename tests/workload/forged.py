# SPDX-License-Identifier: BSD-3-Clause
"""Packets made by hand, each with a right ICRC, to a QP of target.c; what became of it (forged_cases.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from migroce.wire import PSN_MASK, ROCE_PORT, Flow, Op, gid_from_ip, icrc

TARGET_PORT = 18700
PATIENCE = 30.0
"""Seconds for any answer, on a loaded or emulated machine."""
LAST_WORDS = 3.0
"""Seconds to wait for what usually follows an error."""
RECEIVES = 3
"""That target.c posts."""
OWN_QPN, RQ_PSN, SQ_PSN = 0x123, 1000, 5000
MTU = 1024
QKEY = 0x11111111
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2
UC, UD = 0x20, 0x60
"""Added to an opcode: of which service it is."""
_CONTROL = 0xC0


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a QP and its program. PSNs are counted from the first that was not executed before."""

    state: str = "RTS"
    naks: tuple[tuple[int, int], ...] = ()
    """(AETH syndrome, PSN) of each."""
    taken: int | None = 0
    """How many PSNs were executed, as its acknowledgements say; None: it acknowledges nothing (any more)."""
    answers: tuple[int, ...] = ()
    """Opcodes of READ responses and atomic acknowledgements, and kinds of packets of the extension."""
    completions: tuple[str, ...] = ()
    changed: tuple[tuple[int, int], ...] = ()
    """(offset, bytes) of the memory that may be written."""
    closed: bool = False
    """Whether memory that may not be written was."""
    read: bool = False
    """Whether a request of the target's brought data."""


@dataclasses.dataclass(frozen=True)
class Case:
    """`made` gives the UDP payloads to send, without ICRC; `asks` is what the target posts before."""

    name: str
    made: Callable[[Target], list[bytes]]
    ours: Fate
    kernels: Fate
    kind: str = "rc"
    asks: str = ""


class Target:
    """A QP of target.c on `address`, its peer being us on `own`. Closing it ends the QP."""

    def __init__(self, own: str, address: str, kind: str = "rc") -> None:
        self._flow = Flow(gid_from_ip(own), gid_from_ip(address), ROCE_PORT)
        with contextlib.ExitStack() as stack:
            self._udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)  # IP id 0, DF
            self._udp.bind((own, ROCE_PORT))
            self._udp.settimeout(0.05)
            self._link = stack.enter_context(
                socket.create_connection((address, TARGET_PORT), timeout=PATIENCE)
            )
            self._lines = stack.enter_context(self._link.makefile("r"))
            self._stack = stack.pop_all()
        self._address = address
        self.kind = kind
        self._asked = ""
        self._report: dict[str, Any] = {"completions": []}
        self.epsn = RQ_PSN
        about = self.command(f"open {kind} {self._flow.src.hex()} {OWN_QPN} {RQ_PSN} {SQ_PSN}")
        self.qpn, self.rkey, self.va = int(about["qpn"]), int(about["rkey"]), int(about["va"])
        self.closed_rkey, self.closed_va = int(about["closed_rkey"]), int(about["closed_va"])

    def close(self) -> None:
        self._stack.close()

    def command(self, line: str) -> dict[str, Any]:
        """What target.c answers."""
        self._link.sendall(f"{line}\n".encode())
        return dict(json.loads(self._lines.readline()))

    # ---- making packets ----------------------------------------------------------------------------------

    def packet(
        self, opcode: int, rest: bytes = b"", ahead: int = 0, *, flags: int = 0, pkey: int = 0xFFFF,
        qpn: int | None = None, reserved: int = 0, last: int = 0x80, psn: int | None = None,
    ) -> bytes:  # fmt: skip
        """A BTH and what is behind; `ahead` of the PSN expected next, `last` the byte with AckReq."""
        number = (self.epsn + ahead if psn is None else psn) & PSN_MASK
        words = (reserved << 24 | (self.qpn if qpn is None else qpn), last << 24 | number)
        return struct.pack(">BBHII", opcode, flags, pkey, *words) + rest

    def reth(self, length: int, offset: int = 0, *, rkey: int | None = None, va: int | None = None) -> bytes:
        """Of a READ or WRITE."""
        at = self.va + offset if va is None else va
        return struct.pack(">QII", at, self.rkey if rkey is None else rkey, length)

    def atomic(self, offset: int = 0, *, rkey: int | None = None, va: int | None = None) -> bytes:
        """Of a fetch-and-add of 1."""
        at = self.va + offset if va is None else va
        return struct.pack(">QIQQ", at, self.rkey if rkey is None else rkey, 1, 0)

    # ---- sending and hearing -----------------------------------------------------------------------------

    def send(self, body: bytes, to: str | None = None) -> None:
        """With its ICRC; `to` another address than the target's."""
        flow = dataclasses.replace(self._flow, dst=gid_from_ip(to)) if to else self._flow
        whole = body + struct.pack("<I", icrc(flow, body))
        self._udp.sendto(whole, (to or self._address, ROCE_PORT))

    def hear(self) -> bytes | None:
        """A packet from the target, None when there is none for a moment."""
        try:
            return self._udp.recv(9000)
        except TimeoutError:
            return None

    def _settle(self, packets: int, seen: list[bytes]) -> bool:
        """Wait until the last `packets` sent have been dealt with; whether the QP still acknowledges.

        By duplicates: a QP that lives acknowledges them, whatever it has made of what came before. Each of
        the packets may have brought an ACK, too: so there is one more than those, and one for what may
        follow an ACK.
        """
        for _ in range(packets + 2):
            self.send(self.packet(Op.SEND_ONLY, b"\0\0\0\0", psn=RQ_PSN))
            end = time.monotonic() + PATIENCE
            while (packet := self.hear()) is None or not _is_ack(packet):
                if packet is not None:
                    seen.append(packet)
                elif self._state() == "ERR":
                    self._end_in_error(seen)
                    return False
                assert time.monotonic() < end, "the QP neither acknowledges nor is in error"
            seen.append(packet)
        return True

    def _end_in_error(self, seen: list[bytes]) -> None:
        """Wait for the NAK that told the peer, and for all receives to be flushed, where either comes."""
        end = time.monotonic() + LAST_WORDS
        while time.monotonic() < end:
            if (packet := self.hear()) is not None:
                seen.append(packet)
            self._state()
            flushed = sum(each.startswith("recv") for each in self._report["completions"]) == RECEIVES
            if flushed and (self._asked or any(_is_nak(each) for each in seen)):
                return

    def _state(self) -> str:
        self._report = _merged(self._report, self.command("report"))
        return str(self._report["state"])

    def try_out(self, case: Case) -> Fate:
        """Send a case's packets; what became of it."""
        seen: list[bytes] = []
        if self.kind == "rc":
            self._introduce()
        if case.asks:
            self._asked = case.asks
            self.command(f"post {case.asks}")
            self._await_request()
        bodies = case.made(self)
        for body in bodies:
            self.send(body)
        if self.kind == "rc":
            alive = self._settle(len(bodies), seen)
        else:
            self._settle_unacknowledged()
            alive = False
        if case.asks:
            self._finish_request()
        self._state()
        return self._fate(seen, alive=alive)

    def _introduce(self) -> None:
        """Send a first message: ours knows then what we are, and announces itself no more."""
        self.send(self.packet(Op.SEND_ONLY, b"\0\0\0\0"))
        end = time.monotonic() + PATIENCE
        while (packet := self.hear()) is None or not _is_ack(packet) or _psn(packet) != RQ_PSN:
            assert time.monotonic() < end, "the first message is not acknowledged"
        self.epsn += 1

    def _await_request(self) -> None:
        for _ in range(int(PATIENCE / 0.05)):
            packet = self.hear()
            if packet is not None and packet[0] != Op.ACK and _psn(packet) == SQ_PSN:
                return
        raise AssertionError("the request did not come")

    def _finish_request(self) -> None:
        """An ACK for what was posted, unless it has ended: then the completion tells what ended it."""
        for _ in range(int(PATIENCE / 0.05)):
            self._state()
            if any(each.startswith("send") for each in self._report["completions"]):
                return
            aeth = struct.pack(">I", 0x1F000001)
            answers = (
                self.packet(Op.ACK, aeth, psn=SQ_PSN),
                self.packet(Op.READ_RESP_ONLY, aeth + bytes(64), psn=SQ_PSN),
                self.packet(Op.ATOMIC_ACK, aeth + bytes(8), psn=SQ_PSN),
            )
            self.send(answers[{"read": 1, "atomic": 2}.get(self._asked, 0)])
            self.hear()
        raise AssertionError("what was posted does not complete")

    def _settle_unacknowledged(self) -> None:
        """Send something valid behind it, which uses up a receive."""
        body = self.packet(UC | Op.SEND_ONLY, b"last", psn=self.epsn + 50)
        if self.kind == "ud":
            body = self.packet(UD | Op.SEND_ONLY, struct.pack(">II", QKEY, OWN_QPN) + b"last")
        wanted = "recv SUCCESS 44" if self.kind == "ud" else "recv SUCCESS 4"
        self.send(body)
        for _ in range(int(PATIENCE / 0.05)):
            self.hear()
            self._state()
            if self._report["completions"][-1:] == [wanted]:
                self._report["completions"].pop()
                return
        raise AssertionError(f"nothing arrives any more: {self._report}")

    def _fate(self, seen: list[bytes], *, alive: bool) -> Fate:
        naks, answers, acked = [], [], 0
        for packet in seen:
            opcode, ahead = packet[0], _signed(_psn(packet) - self.epsn)
            if opcode & _CONTROL == _CONTROL:
                answers += [opcode] if opcode not in answers else []  # repeated until it is answered
            elif opcode == Op.ACK and packet[12] >= 0x20:
                naks.append((packet[12], ahead))
            elif opcode == Op.ACK or Op.READ_RESP_FIRST <= opcode <= Op.ATOMIC_ACK:
                acked = max(acked, ahead + 1)
                answers += [opcode] if opcode != Op.ACK else []
        done = tuple(self._report["completions"])
        if self.kind == "rc":
            assert done[:1] == ("recv SUCCESS 4",), done
            done = done[1:]
        state = str(self._report["state"])
        return Fate(
            state, tuple(naks), acked if alive and state != "ERR" else None, tuple(answers), done,
            tuple((at, n) for at, n in self._report["changed"]), bool(self._report["closed"]),
            bool(self._report["read"]),
        )  # fmt: skip


def _merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {**now, "completions": [*before["completions"], *now["completions"]]}


def _is_ack(packet: bytes) -> bool:
    return packet[0] == Op.ACK and packet[12] < 0x20


def _is_nak(packet: bytes) -> bool:
    return packet[0] == Op.ACK and packet[12] >= 0x20


def _psn(packet: bytes) -> int:
    return int.from_bytes(packet[9:12], "big")


def _signed(psn: int) -> int:
    return (psn + 0x800000 & PSN_MASK) - 0x800000
