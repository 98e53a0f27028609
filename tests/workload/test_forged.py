# SPDX-License-Identifier: BSD-3-Clause
"""Packets made by hand to a running program of ours: each ends as `CASES` says, beside rdma_rxe."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator

import pytest
from tests.native.netns import Node
from tests.native.procfs import listens

from migroce import paths

from .forged import PATIENCE, TARGET_PORT, Case, Target
from .forged_cases import CASES
from .test_mgcheck import Nodes, _binary

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def running(nodes: Nodes) -> Iterator[Node]:
    """Where target.c runs, with the library."""
    node = nodes[1]
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_packet_made_by_hand(case: Case, nodes: Nodes, running: Node) -> None:
    own = nodes[0]
    with contextlib.closing(own.call(lambda: Target(own.address, running.address, case.kind))) as target:
        assert target.try_out(case) == case.ours
