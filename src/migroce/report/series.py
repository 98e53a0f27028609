# SPDX-License-Identifier: BSD-3-Clause
"""Cumulative byte counters sampled over time, and the rates between the samples."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Series:
    """One counter. Times in seconds of any monotonic clock, ascending; values in bytes."""

    __slots__ = ("_times", "_values")

    def __init__(self) -> None:
        self._times: list[float] = []
        self._values: list[int] = []

    def __len__(self) -> int:
        return len(self._times)

    def add(self, time: float, value: int) -> None:
        """Append a sample; one not later than the last, or smaller (a lost context), is left out."""
        if self._times and (time <= self._times[-1] or value < self._values[-1]):
            return
        self._times.append(time)
        self._values.append(value)

    @property
    def last(self) -> int:
        """The newest value; 0 before the first."""
        return self._values[-1] if self._values else 0

    @property
    def span(self) -> tuple[float, float] | None:
        """Times of the first and the last sample."""
        return (self._times[0], self._times[-1]) if self._times else None

    def at(self, time: float) -> float:
        """The counter at `time`, linear between samples, constant outside."""
        if not self._times:
            return 0.0
        right = bisect_left(self._times, time)
        if right == 0:
            return float(self._values[0])
        if right == len(self._times):
            return float(self._values[-1])
        left = right - 1
        share = (time - self._times[left]) / (self._times[right] - self._times[left])
        return self._values[left] + share * (self._values[right] - self._values[left])

    def rate(self, start: float, end: float) -> float:
        """Mean rate in bits per second between two times."""
        return (self.at(end) - self.at(start)) * 8 / (end - start) if end > start else 0.0

    def rates(self, start: float, end: float, step: float) -> tuple[list[float], list[float]]:
        """Middles of bins of `step` seconds from `start` to `end`, and the rate in each in bit/s."""
        times, values = [], []
        count = max(1, round((end - start) / step))
        for i in range(count):
            left = start + i * step
            times.append(left + step / 2)
            values.append(self.rate(left, left + step))
        return times, values

    def steps(self) -> tuple[list[float], list[float]]:
        """Rates between neighbouring samples: times of the later one, and bit/s."""
        rates = [
            (v1 - v0) * 8 / (t1 - t0)
            for t0, t1, v0, v1 in zip(
                self._times, self._times[1:], self._values, self._values[1:], strict=False
            )
        ]
        return self._times[1:], rates

    def silence(self, start: float, end: float) -> float:
        """The longest time in seconds without any progress that touches [start, end]."""
        low = max(0, bisect_right(self._times, start) - 1)
        longest = 0.0
        i = low
        while i + 1 < len(self._times) and self._times[i] <= end:
            j = i
            while j + 1 < len(self._times) and self._values[j + 1] == self._values[i]:
                j += 1
            if j > i:
                longest = max(longest, self._times[j] - self._times[i])
            i = max(j, i + 1)
        return longest
