# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks find: samples, medians, ratios, and whether a target is met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one quantity, in `unit`, in the order they were taken."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median sample (0.0 when there is none)."""
        return statistics.median(self.samples) if self.samples else 0.0

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest sample."""
        return (min(self.samples), max(self.samples)) if self.samples else (0.0, 0.0)


def paired(name: str, a: Series, b: Series) -> Series:
    """The ratios a/b, sample by sample: what was measured in the same round."""
    return Series(name, "x", tuple(x / y for x, y in zip(a.samples, b.samples, strict=True) if y))


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the median of `series`: at least or at most `bound`."""

    what: str
    series: Series
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median keeps to the bound."""
        value = self.series.median
        return bool(self.series.samples) and (value >= self.bound if self.at_least else value <= self.bound)


@dataclass(slots=True)
class Section:
    """One benchmark's findings; `note` says how it was measured, `failed` why it could not be."""

    key: str
    title: str
    note: str = ""
    series: list[Series] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    failed: str = ""

    def add(self, name: str, unit: str, samples: Sequence[float]) -> Series:
        """Keep a series and return it."""
        made = Series(name, unit, tuple(samples))
        self.series.append(made)
        return made

    def ratio(self, name: str, a: Series, b: Series) -> Series:
        """Keep the paired ratios a/b and return them."""
        made = paired(name, a, b)
        self.series.append(made)
        return made

    def target(self, what: str, series: Series, bound: float, *, at_least: bool = False) -> None:
        """Hold the median of `series` against a bound."""
        self.targets.append(Target(what, series, bound, at_least))

    def as_json(self) -> dict[str, Any]:
        """For the results file; samples unrounded."""
        return {
            "key": self.key, "title": self.title, "note": self.note, "failed": self.failed,
            "series": [
                {"name": s.name, "unit": s.unit, "median": s.median, "samples": list(s.samples)}
                for s in self.series
            ],
            "targets": [
                {
                    "what": t.what, "value": t.series.median, "bound": t.bound, "at_least": t.at_least,
                    "met": t.met,
                }
                for t in self.targets
            ],
        }  # fmt: skip
