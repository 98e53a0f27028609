# SPDX-License-Identifier: BSD-3-Clause
"""Several processes behind one address: each CM datagram reaches the one it is for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cm_programs import ADDRESSES, CmPair, command, finish_within, own_race

from migroce.agent.sockets import Insn, steering

TCP, UDP = 0x01060000, 0x01110000
PORTS = (7001, 7002, 7003)


def interpret(program: list[Insn], packet: bytes) -> int:
    """What the kernel's classic BPF machine returns."""
    a, pc = 0, 0
    while True:
        code, if_true, if_false, k = program[pc]
        pc += 1
        match code:
            case 0x20 | 0x28 | 0x30:
                size = {0x20: 4, 0x28: 2, 0x30: 1}[code]
                assert k + size <= len(packet)
                a = int.from_bytes(packet[k : k + size], "big")
            case 0x74:
                a >>= k
            case 0x54:
                a &= k
            case 0x05:
                pc += k
            case 0x15:
                pc += if_true if a == k else if_false
            case 0x16:
                return a
            case 0x06:
                return k
            case _:
                raise AssertionError(f"{code:#x}")


def datagram(attr: int, at: int, value: int) -> bytes:
    """A CM message as a UDP payload, from a capable peer."""
    packet = bytearray(280)
    packet[4], packet[7] = 0x01, 1
    packet[36:38] = attr.to_bytes(2, "big")
    packet[at : at + 4] = value.to_bytes(4, "big")
    return bytes(packet)


GROUPS = [{0: 0}, {0: 0, 1: 1, 2: 2}, {0: 1, 5: 0, 63: 2}, {s: 63 - s for s in range(64)}]


@pytest.mark.parametrize("index_of", GROUPS, ids=len)
def test_datagrams_and_data_reach_their_process(index_of: dict[int, int]) -> None:
    slots = sorted(index_of)
    services = {TCP | 4000 + i: slots[i % len(slots)] for i in range(256)}
    services[UDP | 4000] = max(index_of)
    program = steering(index_of, services)
    assert len(program) <= 4096  # the kernel's limit
    lowest = index_of[min(index_of)]
    for service, slot in services.items():
        for attr in (0x10, 0x17):
            assert interpret(program, datagram(attr, 56, service)) == index_of[slot]
    assert interpret(program, datagram(0x10, 56, TCP | 9)) == lowest
    for slot, index in index_of.items():
        for attr in range(0x11, 0x17):
            assert interpret(program, datagram(attr, 48, slot << 26 | 0x123456)) == index
        assert interpret(program, datagram(0x18, 44, slot << 26 | 0x123456)) == index
        data = bytearray(64)
        data[4:8] = bytes([0x01, slot << 2, 0, 9])
        assert interpret(program, bytes(data)) == index


def test_three_servers_and_three_clients_share_two_addresses(pair: CmPair, agents: list[Path]) -> None:
    def start(end: int, line: str) -> subprocess.Popen[str]:
        return pair._start(end, ["env", f"MIGROCE_AGENT={agents[end]}", *command(line)])

    servers = {p: start(0, f"rping -s -p {p} -C 20 -V") for p in PORTS}
    try:
        left = set(PORTS)
        while left:  # a client that comes before its server listens is refused, and comes again
            clients = {p: start(1, f"rping -c -a {ADDRESSES[0]} -p {p} -C 20 -V") for p in left}
            for p, client in clients.items():
                done = own_race(finish_within(client, 40))
                if done.returncode == 0:
                    left.discard(p)
                else:
                    assert servers[p].poll() is None, done
        for server in servers.values():
            done = finish_within(server, 40)
            assert done.returncode == 0, done.stderr
    finally:
        for server in servers.values():
            server.kill()
            server.communicate()
