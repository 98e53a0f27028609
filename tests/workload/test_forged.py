# SPDX-License-Identifier: BSD-3-Clause
"""Packets made by hand to a running program of ours: each ends as `CASES` says, beside rdma_rxe."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from tests.native.netns import Node, ip
from tests.native.procfs import listens

from migroce import paths
from migroce.wire import Op

from .forged import OWN_QPN, PATIENCE, QKEY, TARGET_PORT, UD, Case, Fate, Target
from .forged_cases import CASES
from .test_mgcheck import Nodes, _binary

pytestmark = pytest.mark.root
FURTHER = "10.9.0.12"
"""A second address of the target's interface."""


@pytest.fixture(scope="module")
def running(nodes: Nodes) -> Iterator[Node]:
    """Where target.c runs, with the library, on an interface that has two addresses."""
    node = nodes[1]
    ip("-n", node.netns, "addr", "add", f"{FURTHER}/24", "dev", node.iface)
    env = {**os.environ, "LD_PRELOAD": str(paths.library()), "MIGROCE_AGENT": "/nonexistent"}
    argv = node.command(str(_binary().with_name("target")), "-x", "1")
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not listens(TARGET_PORT, of=process.pid):
                assert process.poll() is None, "target.c has ended"
                assert time.monotonic() < end, "target.c does not listen"
                time.sleep(0.01)
            yield node
            assert process.poll() is None, "target.c has ended"
        finally:
            process.kill()
            ip("-n", node.netns, "addr", "del", f"{FURTHER}/24", "dev", node.iface)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_packet_made_by_hand(case: Case, nodes: Nodes, running: Node) -> None:
    own = nodes[0]
    with contextlib.closing(own.call(lambda: Target(own.address, running.address, case.kind))) as target:
        assert target.try_out(case) == case.ours


def test_a_packet_to_another_address_of_the_targets(nodes: Nodes, running: Node) -> None:
    """A connected QP takes what comes to the address it was connected to, as rdma_rxe's (check_addr)."""

    def made(t: Target) -> list[bytes]:
        t.send(t.packet(Op.SEND_ONLY, b"four"), to=FURTHER)
        return []

    with contextlib.closing(nodes[0].call(lambda: Target(nodes[0].address, running.address))) as target:
        assert target.try_out(Case("", made, Fate(), Fate())) == Fate()


def test_a_datagram_to_another_address_of_the_targets(nodes: Nodes, running: Node) -> None:
    """UD QPs have no address: it arrives."""
    with contextlib.closing(nodes[0].call(lambda: Target(nodes[0].address, running.address, "ud"))) as target:
        end = time.monotonic() + PATIENCE
        while "recv SUCCESS 44" not in target.command("report")["completions"]:
            assert time.monotonic() < end, "nothing has arrived"
            target.send(
                target.packet(UD | Op.SEND_ONLY, struct.pack(">II", QKEY, OWN_QPN) + b"four"), FURTHER
            )
            target.hear()  # nothing: a moment
