#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Write the fuzzers' seeds: corpus/<name>/*, from the captures and from src/migroce's own codecs.

Run with src/ and tests/wire on PYTHONPATH, and optionally another directory to write to. Deterministic:
tests/fuzz checks that the tree holds what this writes.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from wire_pcap import CAPTURES, Captured, roce_packets

from migroce import control, wire

CORPUS = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent / "corpus")
FLOW = wire.Flow(wire.gid_from_ip("10.0.1.7"), wire.gid_from_ip("10.0.1.3"), 50000)


def write(target: str, name: str, data: bytes) -> None:
    """One seed."""
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def shortest_captured() -> dict[str, Captured]:
    """The shortest packet of each opcode and address family in the captures."""
    best: dict[str, Captured] = {}
    for path in sorted(CAPTURES.glob("*.pcap")):
        for pkt in roce_packets(path):
            family = "" if wire.gid_is_v4(pkt.flow.dst) else "_v6"
            name = wire.OPINFO[pkt.payload[0]].name.lower().replace(" ", "_") + family
            if name not in best or len(pkt.payload) < len(best[name].payload):
                best[name] = pkt
    return best


def icrc_input(flow: wire.Flow, payload: bytes, expected: int) -> bytes:
    """As fuzz_icrc.c takes it."""
    v4 = wire.gid_is_v4(flow.dst)
    addresses = flow.src[12:] + flow.dst[12:] if v4 else flow.src + flow.dst
    numbers = struct.pack("<7H", flow.sport, flow.dport, flow.ip_id, expected, 77, 3, 9)
    return bytes([flow.df | v4 << 1]) + addresses + numbers + payload


def packets() -> None:
    """Seeds of fuzz_packet and fuzz_icrc."""
    for name, pkt in shortest_captured().items():
        if len(pkt.payload) > 400:
            continue
        write("packet", name, pkt.payload)
        write("icrc", name, icrc_input(pkt.flow, pkt.payload, pkt.flow.ip_id))
    meh = wire.Meh(0x123456, 3, 0x654321, bytes(range(16)), FLOW.src)
    for op in (wire.Op.RESUME, wire.Op.RESUME_ACK, wire.Op.TOKEN, wire.Op.TOKEN_ACK):
        control_pkt = wire.Packet(op, 0xABCDEF, 0, capable=True, meh=meh)
        write("packet", f"mig_{op.name.lower()}", wire.build(control_pkt, FLOW))
    xrc = wire.Packet(wire.SVC_XRC + wire.Op.WRITE_ONLY_IMM, 1, 2, xrc_srqn=3, reth=wire.Reth(4, 5, 3), imm=6,
                      payload=b"abc", pad=1)  # fmt: skip
    write("packet", "xrc_write_only_imm", wire.build(xrc, FLOW))
    flush = wire.Packet(wire.Op.FLUSH, 1, 2, feth=wire.Feth(1, 1), reth=wire.Reth(4, 5, 6))
    write("packet", "rc_flush", wire.build(flush, FLOW))
    word = wire.Packet(wire.Op.ATOMIC_WRITE, 1, 2, reth=wire.Reth(8, 5, 8), payload=b"12345678")
    write("packet", "rc_atomic_write", wire.build(word, FLOW))
    body = wire.build(wire.Packet(wire.Op.SEND_ONLY, 1, 2, payload=bytes(300)), FLOW)
    write("icrc", "wrong_id", icrc_input(FLOW, body, 0x1234))


def messages() -> None:
    """Seeds of fuzz_control: what an agent says."""
    sample: dict[str, control.Message] = {
        "welcome": control.Welcome(0, 1, 1 << 18, 1 << 18, 2, 0, FLOW.src),
        "refused": control.Welcome(13),
        "stop": control.Stop(0, 100),
        "dump_req": control.DumpReq(),
        "stopped": control.Stopped(0, 3, 4096),
    }
    for name, msg in sample.items():
        write("control", name, control.encode(msg, 7))


# ---- programs for fuzz_engine: one byte per command, side | command << 1 | argument << 5 ----------

TRANSMIT, DELIVER, KEEP, DROP, MUTATE, FORGE, SEND, RECV, POLL, TIME, STOPPING, STATE = (
    0, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14,
)  # fmt: skip


def cmd(command: int, side: int = 0, arg: int = 0, *more: int) -> bytes:
    """A command and the bytes it takes."""
    return bytes([side | command << 1 | arg << 5, *more])


EXCHANGE = (cmd(TRANSMIT, 0, 3) + cmd(TRANSMIT, 1, 3) + cmd(DELIVER, 0, 3) * 4) * 2
KNOWN = EXCHANGE * 4
"""Long enough for announcement, tokens and their acknowledgements."""
POLLS = cmd(POLL, 0, 7) + cmd(POLL, 1, 7)


def post(opcode: int, *, side: int = 0, conn: int = 0, size: int = 1000, flags: int = 1) -> bytes:
    """A request with two pieces of `size` bytes: 0 SEND, 1 with immediate, 2 WRITE, 3 with, 4 READ."""
    pieces = struct.pack("<4H", 0, size, 2000, size)
    return cmd(SEND, side, conn << 2, opcode, flags | 2 | 2 << 2) + pieces + b"\x34\x12"


def special(what: int, more: bytes, *, conn: int = 0) -> bytes:
    """One of specialize()'s: 200 CMP_SWAP, FETCH_ADD, BIND_MW, FLUSH, ATOMIC_WRITE; its own bytes."""
    return post(what, conn=conn) + more


def recv(side: int = 1, conn: int = 0) -> bytes:
    """A receive that fits everything."""
    return cmd(RECV, side, conn << 2, 0)


def resume(side: int, how: int) -> bytes:
    """Resume; `how`: 1 and 2 the clock jumps, 4 elsewhere."""
    more = (b"\x05\x00" if how & 1 else b"") + (b"\x03" if how & 2 else b"")
    return cmd(STOPPING, side, 2, how) + more


def forged(opcode: int, how: int, *, side: int = 1, psn: int = 1, more: bytes = b"\x24\x05\x00\x00") -> bytes:
    """A packet of RC opcode number `opcode` in forge()'s table."""
    return cmd(FORGE, side, 0, how, psn, opcode) + more


def programs() -> None:
    """Seeds of fuzz_engine. The first bytes: random seed, options (16: an honest network)."""
    honest, hostile = b"\x01\x10", b"\x02\x00"
    work = b"".join(recv(1, c) * 2 + post(op, conn=c) for c in (0, 1) for op in range(5))
    write("engine", "exchange", honest + KNOWN + work + EXCHANGE * 8 + POLLS)
    write(
        "engine",
        "both_ways",
        honest + KNOWN + recv(0) + recv(1) + post(0) + post(0, side=1) + EXCHANGE * 4 + POLLS,
    )
    write(
        "engine",
        "no_receive",
        honest + KNOWN + post(0) + EXCHANGE * 2 + cmd(TIME, 0, 5, 9) + recv() + EXCHANGE * 4,
    )
    lossy = work + (cmd(TRANSMIT, 0, 3) + cmd(DROP, 0, 1) + cmd(KEEP, 0, 2) + cmd(DELIVER, 0, 3) * 2) * 6
    write("engine", "lossy", honest + KNOWN + lossy + cmd(TIME, 0, 5, 200) + EXCHANGE * 8 + POLLS)
    for name, stops in {
        "stop": cmd(STOPPING, 1, 1) + EXCHANGE * 3 + cmd(TIME, 0, 6, 3) + EXCHANGE + resume(1, 1),
        "move": cmd(STOPPING, 1, 1) + EXCHANGE * 3 + resume(1, 5),
        "both_move": cmd(STOPPING, 0, 1) + cmd(STOPPING, 1, 1) + resume(0, 6) + EXCHANGE + resume(1, 5),
        "move_twice": resume(0, 4) + EXCHANGE + resume(0, 4) + resume(0, 4),
        "untold": resume(0, 0) + cmd(TIME, 0, 6, 250) * 3,
    }.items():
        write("engine", name, honest + KNOWN + work + cmd(TRANSMIT, 0, 3) + stops + EXCHANGE * 8 + POLLS)
    words = (b"\x00\x05", b"\x07\x00", b"\x10\x40\x01", b"\x01\x40\x00", b"\x08")
    specials = b"".join(special(200 + i, more, conn=c) for c in (0, 1) for i, more in enumerate(words))
    write("engine", "specials", honest + KNOWN + specials + EXCHANGE * 8 + POLLS)
    write(
        "engine",
        "specials_move",
        honest + KNOWN + specials + cmd(TRANSMIT, 0, 3) + cmd(STOPPING, 1, 1) + EXCHANGE * 3 + resume(1, 5)
        + EXCHANGE * 8 + POLLS,
    )
    wrong = b"".join(special(what, bytes(12)) for what in range(250, 256))
    write("engine", "specials_wrong", hostile + KNOWN + recv() + wrong + EXCHANGE * 4 + POLLS)
    for opcode in (19, 20, 21, 22, 27, 28):
        for how in (0x01, 0x09, 0x19, 0x31):
            program = hostile + KNOWN + recv() + forged(opcode, how) + POLLS
            write("engine", f"forge_{opcode}_{how:02x}", program)
    write("engine", "small_cq", b"\x03\x06" + KNOWN + work + EXCHANGE * 8 + POLLS)
    states = (cmd(STATE, 0, 1, 4), cmd(STATE, 0, 1, 3), cmd(STATE, 1, 1, 128), cmd(STATE, 0, 1, 5))
    write(
        "engine",
        "states",
        hostile + KNOWN + work + b"".join(state + EXCHANGE * 3 for state in states) + POLLS,
    )
    write("engine", "region", hostile + KNOWN + work + cmd(STATE, 0, 0, 7) + EXCHANGE * 4 + POLLS)
    write(
        "engine",
        "mutated",
        hostile + KNOWN + work + (cmd(TRANSMIT, 0, 3) + cmd(MUTATE, 0, 1, 2, 9, 1, 8, 255)) * 8,
    )
    rights = {"data": 1, "foreign": 1 | 8, "kept": 1 | 8 | 16}
    for op in (6, 10, 12):  # WRITE_FIRST, WRITE_ONLY, READ_REQ
        for name, how in rights.items():
            for where in range(4):
                more = {6: b"\x00\x80\x01", 10: b"\x24", 12: b"\x40\x00"}[op] + bytes([where, 255, 1])
                program = hostile + EXCHANGE + forged(op, how, more=more) + EXCHANGE
                write("engine", f"forge_{op}_{name}_{where}", program)
    acks = b"".join(
        forged(17, 1, side=0, psn=1, more=bytes([syndrome, 1, 0])) for syndrome in (0x7F, 0x60, 0x2C, 0x1F)
    )
    write(
        "engine", "forged_acks", hostile + KNOWN + post(2) + cmd(TRANSMIT, 0, 3) + acks + EXCHANGE * 2 + POLLS
    )
    resumes = b"".join(forged(op, how, more=b"\x01\x02") for op in (23, 24, 25, 26) for how in (1, 33, 129))
    write("engine", "forged_resumes", hostile + KNOWN + post(0) + resumes + EXCHANGE * 2)


def unacknowledged() -> None:
    """Programs for fuzz_unack: one byte per command, side | command << 1 | argument << 5."""

    def piece(length: int) -> bytes:
        return struct.pack("<BHH", 0, length, 100)

    def send(qp: int, how: int, to: int = 0, size: int = 300) -> bytes:
        more = bytes([to]) if qp else struct.pack("<H", 64)
        return cmd(0, 0, qp, how) + piece(size) + piece(size // 2) + more

    def receive(qp: int, side: int = 1) -> bytes:
        return cmd(2, side, qp) + piece(1999)

    both = (cmd(4, 0) + cmd(4, 1)) * 2 + cmd(6)
    over = cmd(11, 0) + cmd(11, 1)
    known = both * 4
    datagram = receive(1) + receive(2) + send(1, 0, 4) + send(1, 3, 8) + both + over
    message = receive(0) * 2 + b"".join(send(0, op << 1 | 1, size=1400) for op in range(4)) + both * 3 + over
    for name, program in {
        "datagrams": datagram,
        "multicast": receive(1) + receive(1, 0) + send(1, 0, 2) + both + over,
        "messages": known + message,
        "copies": known + receive(0) * 2 + send(0, 1) + cmd(4, 0) + cmd(7) * 3 + cmd(6) + over,
        "losses": known + receive(0) + send(0, 1, size=1400) + cmd(4, 0) + cmd(8) + both + send(0, 0) + both,
        "move": known + cmd(13, 0, 0, 0) + send(1, 0, 4) + send(0, 0) + cmd(13, 0, 0, 5) + both * 3 + message,
        "forged": known + receive(0) + cmd(10, 1, 0, 0x20) + b"\x30\0" + bytes(40) + b"\x2a" + over,
        "states": send(1, 0, 4) + cmd(14, 0, 0, 0x41) + send(1, 0, 4) + cmd(14, 0, 0, 0x81) + both + over,
        "objects": cmd(15, 0, 0, 0) + send(1, 0, 4) + cmd(15, 0, 0, 0) + cmd(15, 1, 0, 0x81) + datagram,
    }.items():
        write("unack", name, program)


def connections() -> None:
    """Programs for fuzz_cm: one byte per command, side | command << 1 | argument << 5."""
    deliver, lose, double, change, forge, req, sidr, listen, call, wait, move, farewell = range(12)
    rep, rtu, rej, dreq, drep, sidr_rep, notify, destroy = range(8)
    arrive = cmd(deliver)
    tcp, udp = cmd(listen, 1, 0), cmd(listen, 1, 2)
    asked = b"\x01" + tcp + cmd(req, 0, 0, 0x88) + arrive
    answered = asked + cmd(call, 1, 1, rep) + arrive
    up = answered + cmd(call, 0, 0, rtu) + arrive
    late = cmd(wait, 0, 0, 0xFF, 0xFF) + cmd(wait, 1, 0, 0xFF, 0xFF)
    end = cmd(call, 0, 0, dreq) + arrive + cmd(call, 1, 1, drep) + arrive
    for name, program in {
        "connection": up + end + late,
        "both_end": up + cmd(call, 0, 0, dreq) + cmd(call, 1, 1, dreq) + arrive * 4 + late,
        "rejected": asked + cmd(call, 1, 1, rej) + arrive + late,
        "refused": b"\x02" + cmd(req, 0, 0, 0) + arrive * 2 + cmd(call, 0, 0, destroy),
        "repeated": asked + cmd(req, 0, 0, 0x88) + cmd(double) * 2 + cmd(call, 1, 1, rep) + cmd(double) * 2,
        "lost": asked + cmd(call, 1, 1, rep) + cmd(lose) + late * 3 + arrive * 2,
        "stale": up + cmd(req, 0, 0, 0x88) + arrive * 2 + cmd(call, 1, 1, notify),
        "given_up": b"\x03" + cmd(req, 0, 0, 0) + (late + cmd(lose)) * 9,
        "moved": answered + cmd(move, 1) + cmd(move) + arrive * 3 + cmd(call, 0, 0, rtu) + arrive * 3 + end,
        "farewell": up + cmd(farewell, 0, 7) + arrive * 2 + cmd(call, 1, 1, destroy) + arrive * 2,
        "destroyed": asked + cmd(call, 1, 0, destroy) + cmd(call, 0, 0, destroy) + arrive * 3 + late,
        "datagrams": b"\x04" + udp + cmd(sidr) + arrive + cmd(call, 1, 1, sidr_rep) + arrive + late,
        "changed": up + cmd(call, 0, 0, dreq) + cmd(change, 0, 0, 31, 1) + arrive + end,
    }.items():
        write("cm", name, program)
    for attr in range(11):
        for how in (0x10, 0x20, 0x50):
            forged = b"".join(cmd(forge, side, 0, attr | how, 1 - side) + bytes(16) for side in (0, 1))
            write("cm", f"forged_{attr}_{how:02x}", up + forged + end)


def shared() -> None:
    """Programs for fuzz_shared: one byte per command, command | QP << 4, or command | queue << 5."""
    post, window, change, other, send = 8, 11, 12, 13, 14
    rc, xrc = 0, 1

    def forged(what: int, qp: int, how: int = 0, key: int = 4, more: bytes = b"\x40\x00") -> bytes:
        """Opcode number `what` of forge()'s table; payload and address are in `more`."""
        return bytes([qp << 4, what, how, key]) + more

    def receive(queue: int, length: int = 1500) -> bytes:
        return bytes([post | queue << 5, 1]) + struct.pack("<2H", 0, length)

    flush = bytes([send, other | 7 << 5])
    bind = bytes([window, 2 | 16 | 1, 1]) + struct.pack("<2H", 0, 1000) + bytes([send])
    for name, program in {
        "send": receive(0) + forged(4, rc) + receive(1) + forged(4, xrc) + flush,
        "send_other": receive(2) + forged(4, xrc, 8) + receive(1) + forged(5, xrc, 8) + flush,
        "long": receive(0) + b"".join(forged(what, rc) for what in (0, 1, 2)) + flush,
        "none": forged(4, rc) + forged(4, xrc) + flush + receive(0) + forged(4, rc) + flush,
        "write": forged(10, rc) + forged(11, xrc) + receive(1) + forged(11, xrc) + flush,
        "window": bind + forged(10, rc, key=1) + forged(12, rc, key=1) + forged(17, rc, key=1) + flush,
        "window_xrc": bind + forged(10, xrc, key=1) + flush,
        "atomic": forged(14, rc, more=b"\x08") + forged(15, xrc, more=b"\x08") + forged(18, xrc) + flush,
        "limit": receive(1) * 3 + bytes([change | 1 << 5, 0x21]) + forged(4, xrc) * 3 + flush,
        "gone": receive(2) + forged(0, xrc, 8) + bytes([change | 2 << 5, 0xC0]) + forged(1, xrc, 8) + flush,
        "moved": receive(0) + (bytes([other | 3 << 5]) + forged(4, rc)) * 2 + flush,
        "again": forged(12, rc, key=2) + bytes([other, other | 1 << 5 | 1 << 4, other | 1 << 4]) + flush,
    }.items():
        write("shared", name, b"\x01" + program)


if __name__ == "__main__":
    shared()
    connections()
    unacknowledged()
    packets()
    messages()
    programs()
