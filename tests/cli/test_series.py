# SPDX-License-Identifier: BSD-3-Clause
"""Rates from sampled counters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migroce.report.series import Series


def series(*samples: tuple[float, int]) -> Series:
    made = Series()
    for time, value in samples:
        made.add(time, value)
    return made


def test_a_rate_is_in_bits_per_second() -> None:
    assert series((0, 0), (2, 1000)).rate(0, 2) == 4000


def test_a_rate_between_samples_is_interpolated() -> None:
    assert series((0, 0), (1, 1000), (2, 1000)).rate(0.5, 1.5) == 4000


def test_samples_that_go_backwards_are_left_out() -> None:
    one = series((0, 100), (1, 50), (0.5, 200), (0.5, 300))
    assert one.last == 200
    assert one.span == (0, 0.5)


def test_silence_is_the_longest_time_without_progress() -> None:
    one = series((0, 0), (1, 10), (1.1, 20), (1.2, 20), (1.6, 20), (1.7, 30), (2.0, 40))
    assert one.silence(1.15, 1.65) == pytest.approx(0.5)
    assert one.silence(1.7, 2.0) == 0


def test_an_empty_series_has_no_rate() -> None:
    assert series().rate(0, 1) == 0
    assert series().silence(0, 1) == 0
    assert series().span is None


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40))
def test_bins_hold_every_byte(steps: list[int]) -> None:
    one, total = Series(), 0
    for i, step in enumerate([0, *steps]):
        total += step
        one.add(i * 0.1, total)
    _, rates = one.rates(0, len(steps) * 0.1, 0.1)
    assert sum(rates) * 0.1 / 8 == pytest.approx(total, abs=1)
