# SPDX-License-Identifier: BSD-3-Clause
"""Communication libraries that sit between verbs and applications: UCX, which Open MPI uses.

They look at the device in ways that perftest does not: its files in /sys and /dev, shared receive queues,
atomics, thousands of receives, datagrams whose header tells IPv4 by wc.sl, an asynchronous thread.
"""

from __future__ import annotations

import shutil

import pytest
from verbs_pair import Pair
from verbs_programs import sanitized

UCX_PORT = 13337  # ucx_perftest's own

pytestmark = [
    pytest.mark.skipif(shutil.which("ucx_perftest") is None, reason="ucx_perftest is not installed"),
    pytest.mark.skipif(sanitized(), reason="UCX puts its own hooks into malloc and mmap"),
]


def _ucx(pair: Pair, transports: str, *options: str) -> None:
    environment = [f"UCX_TLS={transports}", "UCX_NET_DEVICES=rxe0:1", "UCX_WARN_UNUSED_ENV_VARS=n"]
    pair.run(["env", *environment, "ucx_perftest", *options], port=UCX_PORT, timeout=100).check()


@pytest.mark.parametrize("test", ["put_lat", "am_bw", "fadd", "cswap"])
def test_ucx_runs_on_reliable_connections(pair: Pair, test: str) -> None:
    _ucx(pair, "all", "-d", "rxe0:1", "-x", "rc_verbs", "-t", test, "-n", "500", "-w", "10")


@pytest.mark.parametrize("transports", ["rc_verbs,ud_verbs,self", "ud_verbs,self"])
@pytest.mark.parametrize("size", [8, 65536])
def test_ucx_messages_arrive_over_the_transports_that_open_mpi_uses(
    pair: Pair, transports: str, size: int
) -> None:
    _ucx(pair, transports, "-t", "tag_lat", "-s", str(size), "-n", "200", "-w", "10")
