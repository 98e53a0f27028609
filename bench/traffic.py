# SPDX-License-Identifier: BSD-3-Clause
"""Single measurements between two ends: perftest's programs and their raw UDP counterparts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from bench import programs
from bench.ends import BenchError, End, finish, running, wait_line, wait_listening
from migroce import paths

PERFTEST_PORT = 18515
RAW_PORT = 4791
# UDP payload of a packet in the middle of a message with RDMA MTU 4096: BTH, data, ICRC.
FULL_PACKET = 12 + 4096 + 4
# ... and of a SEND of 2 bytes: BTH, data, pad, ICRC.
TINY_PACKET = 12 + 2 + 2 + 4


@dataclass(frozen=True, slots=True)
class Device:
    """How programs find the device at the two ends: environment for each."""

    server: dict[str, str] = field(default_factory=dict)
    client: dict[str, str] = field(default_factory=dict)


def without_agent() -> Device:
    """The library alone, no agent."""
    env = {"LD_PRELOAD": str(paths.library()), "MIGROCE_AGENT": "/nonexistent/agent.sock"}
    return Device(env, env)


def with_agents(server_socket: str, client_socket: str) -> Device:
    """The library with an agent at each end, by its socket's path."""
    env = {"LD_PRELOAD": str(paths.library())}
    return Device({**env, "MIGROCE_AGENT": server_socket}, {**env, "MIGROCE_AGENT": client_socket})


def _perftest(ends: tuple[End, End], device: Device, name: str, options: list[str]) -> list[float]:
    """Run server and client; the numbers of the client's result line."""
    server, client = ends
    argv = [programs.perftest(name), "-d", "rxe0", "-x", "1", "-F", *options]
    with running(server.start(argv, device.server)) as listening:
        wait_listening(listening, PERFTEST_PORT)
        with running(client.start([*argv, server.address], device.client)) as asking:
            out = finish(asking, argv)
        finish(listening, argv)
    lines = out.splitlines()
    for at, line in enumerate(lines):
        if line.startswith(" #bytes") and at + 1 < len(lines):
            return [float(word) for word in lines[at + 1].split()]
    raise BenchError(f"{name}: no result line in its output")


def bandwidth(ends: tuple[End, End], device: Device, name: str, size: int, messages: int) -> float:
    """ib_*_bw: average Gb/s of payload."""
    options = ["-s", str(size), "-n", str(messages), "-m", "4096", "--report_gbits"]
    return _perftest(ends, device, name, options)[3]


def message_rate(ends: tuple[End, End], device: Device, name: str, size: int, messages: int) -> float:
    """ib_*_bw: messages per second."""
    return 1e6 * _perftest(ends, device, name, ["-s", str(size), "-n", str(messages), "-m", "4096"])[4]


def latency(ends: tuple[End, End], device: Device, name: str, size: int, rounds: int) -> float:
    """ib_*_lat: median half round trip in microseconds."""
    return _perftest(ends, device, name, ["-s", str(size), "-n", str(rounds), "-m", "4096"])[4]


def raw_bandwidth(ends: tuple[End, End], seconds: float, *, trains: bool = True) -> float:
    """Raw UDP with packets of the same size: Gb/s of RDMA payload that would fit. `trains`: GSO and GRO."""
    server, client = ends
    program = programs.raw_udp()
    common = ["-p", str(RAW_PORT), "-s", str(seconds), "-l", str(FULL_PACKET)]
    receive = [program, "recv", *common, *([] if trains else ["-1"])]
    with running(server.start(receive)) as receiver:
        wait_line(receiver, "ready")
        client.run([program, "send", *common, *([] if trains else ["-g", "1"]), server.address])
        found = json.loads(finish(receiver, receive))
    return float(found["gbps"]) * 4096 / FULL_PACKET


def raw_latency(ends: tuple[End, End], rounds: int) -> float:
    """Raw UDP ping-pong of packets as large as a SEND of 2 bytes, both spinning: median half trip in us."""
    server, client = ends
    program = programs.raw_udp()
    common = ["-p", str(RAW_PORT), "-l", str(TINY_PACKET)]
    answer = [program, "pong", *common]
    with running(server.start(answer)) as answering:
        wait_line(answering, "ready")
        found = json.loads(client.run([program, "ping", *common, "-n", str(rounds), server.address]))
        finish(answering, answer)
    return float(found["half_us"]["median"])
