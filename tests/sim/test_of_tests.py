# SPDX-License-Identifier: BSD-3-Clause
"""The invariants can fail: each deliberate fault of the "transport" is found, and named rightly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .generate import from_seed
from .program import InvariantError
from .records import Action, Link, Mutation
from .runner import Run, run
from .schedule import Connection, Host, Kind, Op, Schedule, Side

OPS = tuple(Op(kind, kind.size(size)) for kind in Kind for size in (700, 3000, 64))
BASE = Schedule(
    (Host("10.0.0.1"), Host("10.0.0.2")), (Connection(Side(0, OPS), Side(1, OPS)),), Link(fair=2), seed=5
)


@pytest.mark.parametrize(
    ("mutation", "kinds"),
    [
        (Mutation.LOSE_WC, {"order", "stuck"}),
        (Mutation.DUP_WC, {"order"}),
        (Mutation.SWAP_WC, {"order"}),
        (Mutation.ERROR_WC, {"error"}),
        (Mutation.FLIP_MEMORY, {"memory", "data"}),
    ],
)
@pytest.mark.parametrize("n", [1, 7, 20])
def test_a_faulty_completion_is_found(mutation: Mutation, kinds: set[str], n: int) -> None:
    with pytest.raises(InvariantError) as failure:
        run(BASE, mutation=(mutation, n))
    assert failure.value.kind in kinds


def _with_rule(action: Action, op: int | tuple[int, int], **how: int) -> InvariantError:
    r = Run(BASE)
    r.build()
    r.world.rule(action, op, **how)
    r.build = lambda: None  # type: ignore[method-assign]
    try:
        with pytest.raises(InvariantError) as failure:
            r.execute()
    finally:
        r.world.close()
    return failure.value


def test_answers_lost_for_ever_are_found() -> None:
    assert _with_rule(Action.DROP, (13, 17)).kind == "error"


@pytest.mark.parametrize("op", [0, 1, 2, 4, 5, 6, 8, 10, 13, 14, 15, 16])
def test_a_changed_byte_under_a_right_icrc_is_found(op: int) -> None:
    assert _with_rule(Action.SWAP, op, count=1).kind in ("data", "memory")


def test_a_failure_names_the_command_that_replays_it() -> None:
    with pytest.raises(InvariantError, match=r"replay: python -m tests\.sim\.replay mgs1\.\S+"):
        run(BASE, mutation=(Mutation.LOSE_WC, 3))


def test_a_run_is_the_same_each_time() -> None:
    schedule = from_seed(8)
    traces = []
    for _ in range(2):
        r = Run(schedule, trace=True)
        r.execute()
        # MR addresses are the process's own: they are not part of what must repeat.
        traces.append(r.world.trace_text())
        r.world.close()
    assert traces[0] == traces[1]
    assert len(traces[0]) > 10_000


def test_other_seeds_make_other_runs() -> None:
    one, two = run(from_seed(3)), run(replace(from_seed(3), seed=4))
    assert one.stats != two.stats
