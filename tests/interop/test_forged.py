# SPDX-License-Identifier: BSD-3-Clause
"""Packets made by hand to rdma_rxe: each ends as tests/workload/forged_cases.py says, beside ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from tests.interop import net
from tests.interop.ends import V4, Kernels, Ours
from tests.workload.forged import PATIENCE, TARGET_PORT, Case, Target
from tests.workload.forged_cases import CASES


@pytest.fixture(scope="module")
def running(ends: tuple[Ours, Kernels]) -> Iterator[None]:
    """target.c in the emulated machine."""
    program = ends[1].start(["target", "-x", str(ends[1].gid_index(V4))])
    try:
        assert ends[1].listens(TARGET_PORT, PATIENCE)
        yield
        assert program.wait(0) is None, program.wait(0)
    finally:
        program.kill()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("running")
def test_a_packet_made_by_hand(case: Case) -> None:
    with contextlib.closing(Target(net.OURS[V4], net.KERNELS[V4], case.kind)) as target:
        assert target.try_out(case) == case.kernels
