# SPDX-License-Identifier: BSD-3-Clause
"""Thousands of random schedules: loss, reordering, duplication, corruption, stops, moves, mistakes.

MIGROCE_SIM_SCALE multiplies how many (default 1; sanitized runs take 0.1). For long runs:
`MIGROCE_SIM_PROFILE=explore pytest tests/sim/test_schedules.py` draws new ones each time, and
`python -m tests.sim.replay 100000..200000` goes through seeds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .generate import Seeded, from_seed, schedule, with_mistake
from .program import InvariantError
from .runner import run
from .schedule import Schedule, from_token

_T = TypeVar("_T")
SCALE = float(os.environ.get("MIGROCE_SIM_SCALE") or (0.1 if os.environ.get("MIGROCE_SANITIZER") else 1))
BLOCK = 500
BLOCKS = 10
EXPLORE = os.environ.get("MIGROCE_SIM_PROFILE") == "explore"
PROFILE = settings(
    max_examples=100_000 if EXPLORE else max(20, int(300 * SCALE)),
    derandomize=not EXPLORE,
    database=None,
    deadline=None,
    print_blob=EXPLORE,
    suppress_health_check=list(HealthCheck),
)


class _Drawn:
    """Choices made by Hypothesis, so that a failing schedule gets smaller."""

    def __init__(self, draw: st.DrawFn):
        self._draw = draw

    def integer(self, lo: int, hi: int) -> int:
        return self._draw(st.integers(lo, hi))

    def pick(self, choices: Sequence[_T]) -> _T:
        return self._draw(st.sampled_from(choices))

    def chance(self, percent: int) -> bool:
        return self._draw(st.integers(0, 99)) >= 100 - percent


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return schedule(_Drawn(draw), draw(st.integers(0, 1 << 32)))


@st.composite
def mistaken(draw: st.DrawFn) -> Schedule:
    return with_mistake(_Drawn(draw), draw(st.integers(0, 1 << 32)))


def _all_hold(numbers: Sequence[int], *, mistake: bool) -> None:
    failures = []
    for seed in numbers:
        try:
            run(with_mistake(Seeded(seed), seed) if mistake else from_seed(seed))
        except InvariantError as e:
            command = f"python -m tests.sim.replay {'m' if mistake else ''}{seed}"
            failures.append(f"{command}\n  {e}")
            if len(failures) == 5:
                break
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_message_arrives_once_in_order_and_intact(block: int) -> None:
    first = 1 + block * BLOCK
    _all_hold(range(first, first + max(1, int(BLOCK * SCALE))), mistake=False)


@pytest.mark.parametrize("block", range(2))
def test_a_mistake_ends_its_connection_as_iba_asks_for_and_no_other(block: int) -> None:
    first = 1 + block * BLOCK
    _all_hold(range(first, first + max(1, int(BLOCK * SCALE))), mistake=True)


@PROFILE
@given(schedules())
def test_hypothesis_finds_no_schedule_that_breaks_a_promise(s: Schedule) -> None:
    run(s)


@PROFILE
@given(mistaken())
def test_hypothesis_finds_no_mistake_with_a_wrong_end(s: Schedule) -> None:
    run(s)


@settings(PROFILE, max_examples=50)
@given(schedules())
def test_a_schedule_survives_its_token(s: Schedule) -> None:
    assert from_token(s.token()) == s


# Schedules that once failed, smallest first; what was wrong is in the commit that mended it.
REGRESSIONS = (698, 4755)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_once_failed_holds(seed: int) -> None:
    _all_hold([seed], mistake=False)
