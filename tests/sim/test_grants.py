# SPDX-License-Identifier: BSD-3-Clause
"""Memory opened by windows, used, given back and opened anew, under loss and moves (grants.py)."""

from __future__ import annotations

import pytest

from .grants import schedule
from .program import InvariantError
from .test_schedules import SCALE

BLOCK = 100


@pytest.mark.parametrize("block", range(4))
def test_what_a_window_opens_is_used_and_given_back_whatever_is_lost_and_moved(block: int) -> None:
    """A failure names its seed: `python -c 'from tests.sim.grants import schedule; schedule(SEED)'`."""
    first = block * BLOCK
    for seed in range(first, first + max(1, int(BLOCK * SCALE))):
        try:
            schedule(seed)
        except InvariantError as e:
            e.args = (f"seed {seed}: {e.args[0]}",)
            raise
