# SPDX-License-Identifier: BSD-3-Clause
"""Sockets over RDMA: librdmacm's rsockets, whose code stays librdmacm's, on our ids and QPs."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from cm_programs import ADDRESSES, FLAGS, CmPair, command, finish_within
from tests.native.procfs import polls_a_listener
from verbs_pair import Outcome, _ended

A = ADDRESSES[0]
SECONDS = 60
SOURCE = Path(__file__).resolve().parent / "c" / "echo.c"
PRELOADS = Path("/usr/lib").glob("*/rsocket/librspreload.so")

# Ways to wait, to connect and to transfer that differ inside rsockets; a size beyond a QP's share of buffer.
OPTIONS = (
    "rstream -S 64 -C 50",
    "rstream -S 4096 -C 50 -T b",
    "rstream -S 4096 -C 50 -T n",
    "rstream -S 4096 -C 50 -T v",
    "rstream -S 2000000 -C 3 -T v",
    "riostream -S 4096 -C 50",
)


def _both(pair: CmPair, server: list[str], client: list[str]) -> Outcome:
    """Run both to their ends; the client starts once the server listens."""
    end = time.monotonic() + SECONDS
    with _ended(pair._start(0, server)) as first:
        while not polls_a_listener(first.pid) and first.poll() is None:
            assert time.monotonic() < end, f"{server[0]} does not come to listen"
            time.sleep(0.005)
        with _ended(pair._start(1, client)) as second:
            return Outcome(client=finish_within(second, SECONDS), server=finish_within(first, SECONDS))


@pytest.mark.parametrize("line", OPTIONS)
def test_programs_on_rsockets_complete(pair: CmPair, line: str) -> None:
    argv = command(line)
    outcome = _both(pair, argv, [*argv, "-s", A])
    outcome.check()
    assert "custom" in outcome.server.stdout + outcome.client.stdout  # its results


def test_unmodified_socket_programs_talk_over_rdma(pair: CmPair, tmp_path: Path) -> None:
    """librspreload turns a program's sockets into rsockets; nothing of them goes through TCP."""
    preload = next(PRELOADS, None)
    assert preload is not None, "librspreload.so comes with librdmacm1"
    program = tmp_path / "echo"
    subprocess.run(["cc", *FLAGS, str(SOURCE), "-o", str(program)], check=True)

    def end(number: int, *arguments: str) -> list[str]:
        ours = pair.preload.environment(ADDRESSES[number])["LD_PRELOAD"]
        return ["env", f"LD_PRELOAD={ours}:{preload}", str(program), A, *arguments]

    before = _tcp_segments(pair)
    outcome = _both(pair, end(0), end(1, "ask"))
    outcome.check()
    assert outcome.server.stdout.strip() == ADDRESSES[1]
    assert _tcp_segments(pair) == before


def _tcp_segments(pair: CmPair) -> str:
    """What the client's namespace counts of TCP."""
    argv = ["nsenter", f"--net=/run/netns/{pair.names()[1]}", "cat", "/proc/net/snmp"]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return values[names.index("OutSegs")]
