# SPDX-License-Identifier: BSD-3-Clause
"""What programs say when they take their own options for wrong, and what is known of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.workload.sweep.plan import Case

REFUSALS = re.compile(
    "|".join(
        (
            r"unrecognized option|invalid option|Invalid Command",
            r"only (be )?(supported|available|valid|avavilible|possible)",
            r"is Available only|Available only on|(feature )?not available on|not possible in",
            r"exists only in BW|works? only with|only for latency",
            r"does(n't| not) (yet |currently )?(support|work)",
            r"still doesn't support|is(n't| not) supported|not supported in|not compatible with",
            r"must be a multiple of|should be greater than number of QPs|can't be grater than rx depth",
            r"Message size cannot be changed for Atomic|Max message size in UD cannot be greater than MTU",
            r"mode is not supported in SEND|is supported in BW tests only|supports? (only )?BW tests",
            r"for BW can be|for LAT can be|SW Rate limiter cann't be executed|Only 1 QP supported",
            r"You are not running the atomic|rx depth can be only 1|Multiple QPs only|rate limit isn't",
            r"requires tx_depth|requires RC connection|only supported (with|in)|only supported for",
            r"Failed: Unknown rate limit|Must specify a rate limit|should be between 0 and",
            r"Events must be enabled to select",
            # what a machine does not have, with rxe no more than here
            r"Unable to query port 2|Failed to allocate hugepages|Unable to access performance counters",
        )
    ),
    re.IGNORECASE,
)
"""perftest's words (perftest_parameters.c), of releases 4.5 to 26."""

NO_CLOCK = "Correlation coefficient r^2"
"""perftest gives up: a busy machine kept it from measuring the clock. Such a run is repeated."""


@dataclass(frozen=True, slots=True)
class Known:
    """Cases that cannot work, anywhere, or not always: `case` is searched for in a name, `why` said of it."""

    case: str
    why: str
    sometimes: bool = False

    def names(self, case: Case) -> bool:
        """Whether the case is one of them."""
        return re.search(self.case, case.name) is not None


KNOWN = (
    Known(
        r"-g -x 0$",
        "perftest's own group, ff01::, has the scope of one interface: Linux sends nothing of it",
    ),
    Known(
        r"-c U[CD] --use-srq -q",
        "perftest posts fewer receives to the SRQ than its QPs send; what finds none is lost, and waited for",
        sometimes=True,
    ),
)


def refusal(said: str) -> str | None:
    """The line by which a program refuses its options; None if there is none."""
    for line in said.splitlines():
        if REFUSALS.search(line):
            return line.strip()
    return None


def known(case: Case) -> Known | None:
    """What is known of a case that does not work; None if it should."""
    return next((entry for entry in KNOWN if entry.names(case)), None)
