# SPDX-License-Identifier: BSD-3-Clause
"""Unmodified benchmarks are moved in the middle and end as if nothing had happened."""

from __future__ import annotations

import pytest
from tests.e2e.perftest import PROGRAMS, Run, Sizes, start
from tests.e2e.stage import Box, NotSeenError, Stage

from migroce.errors import MigroceError


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    """Learned once."""
    return Sizes()


def moved(stage: Stage, sizes: Sizes, program: str, who: str) -> Run:
    """A run whose server or client was moved in the middle."""
    for _ in range(3):
        iterations, _ = sizes.of(stage, program)
        run = start(stage, program, iterations)
        box: Box = run.server if who == "server" else run.client
        try:
            box.move()
            box.wait_for_traffic(20)
            return run
        except (MigroceError, NotSeenError):
            if run.client.info()["status"] != "exited":
                raise
            run.finish()
            sizes.grow(program)
    pytest.fail(f"{program} always ended before it was moved")


@pytest.mark.parametrize("program", ["ib_send_bw, shared queue", "ib_send_bw, XRC", "ib_send_bw, events"])
def test_shared_queues_xrc_and_events_move_too(stage: Stage, sizes: Sizes, program: str) -> None:
    run = moved(stage, sizes, program, "server")
    run.finish()
    assert run.shapes() == sizes.of(stage, program)[1]


@pytest.mark.parametrize("who", ["server", "client"])
def test_ib_send_bw_through_rdma_cm_moves(stage: Stage, sizes: Sizes, who: str) -> None:
    run = moved(stage, sizes, "ib_send_bw, rdma_cm", who)
    run.finish()
    assert run.shapes() == sizes.of(stage, "ib_send_bw, rdma_cm")[1]


def test_ib_send_bw_both_ways_ends_well_when_its_server_is_moved(stage: Stage, sizes: Sizes) -> None:
    run = moved(stage, sizes, "ib_send_bw", "server")
    run.finish()
    assert run.shapes() == sizes.of(stage, "ib_send_bw")[1]


def test_ib_atomic_bw_ends_well_when_its_server_is_moved(stage: Stage, sizes: Sizes) -> None:
    run = moved(stage, sizes, "ib_atomic_bw", "server")
    run.finish()
    assert run.shapes() == sizes.of(stage, "ib_atomic_bw")[1]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["server", "client"])
@pytest.mark.parametrize("program", [name for name in PROGRAMS if "-D" not in PROGRAMS[name]])
def test_it_ends_well_and_prints_what_an_unmoved_run_prints(
    stage: Stage, sizes: Sizes, program: str, who: str
) -> None:
    run = moved(stage, sizes, program, who)
    run.finish()
    assert run.shapes() == sizes.of(stage, program)[1]
