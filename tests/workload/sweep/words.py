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
            r"Protocol not supported|[Dd]evice (isn't|is not) ODP|ODP capable|device doesn't have completion",
            r"doesn't support (dm|device memory)|prefetch is valid only with|size larger than port MTU",
            r"[Cc]an only be used with|with write/read verbs only",
            r"rx_depth \d+ is too small|use blocking calls",
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
    """Cases that cannot work, anywhere, or not always.

    `case` is searched for in a name, `why` said of it. `says`, if given: what an end that fails says then.
    """

    case: str
    why: str
    sometimes: bool = False
    says: str = ""

    def names(self, case: Case, said: list[str]) -> bool:
        """Whether the case is one of them, and one that failed said what is to be expected of it."""
        expected = not said or not self.says or any(self.says in text for text in said)
        return expected and re.search(self.case, case.name) is not None


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
    Known(
        r"-c U[CD] .*(-q 4 -b -e|-q 4 -e -b)",
        "perftest 4.5 takes one queue's depth of completions per event and sleeps, though there are more",
        sometimes=True,
    ),
    Known(
        r"ib_atomic_bw .*--perform_warm_up",
        "perftest 4.5 waits for completions that it has not asked for",
        sometimes=True,
    ),
    Known(r"-c XRC -z", "perftest posts a receive to a QP that has an SRQ, which no device takes"),
    Known(r"ib_send_lat -c UD -R --use-srq", "perftest posts a receive to a QP that has an SRQ"),
    Known(
        "^ibv_.c_pingpong -t -e",
        "the program takes an event whose completions it has polled already for an error",
        sometimes=True,
        says="poll CQ failed 2",
    ),
    Known("--use-null-mr", "neither here nor with rxe are there null MRs"),
    Known("^ibv_xsrq_pingpong.* -c", "its -c wants a number: another case than those of the other pingpongs"),
    Known(
        "^rping",
        "rping closes the channel that its own thread reads",
        sometimes=True,
        says="rdma_get_cm_event: Bad file descriptor",
    ),
    Known(
        "^rping",
        "rping 65 destroys an id between the poll that sees its event and the fetching, which then waits",
        sometimes=True,
        says="wait for RDMA_READ_ADV state 10",
    ),
    Known(
        "ib_write_lat -c XRC --mr_per_qp",
        "perftest waits for data behind its first QP's buffer, which is not where it told its peer to write",
    ),
    Known(
        "-u 10$",
        "8 times 4 ms without an answer: a limit that the user sets and a busy machine may miss",
        sometimes=True,
        says="Failed status 12",
    ),
    Known(r"-w 1$|-y 10$", "a limit that the user sets and a busy machine may miss", sometimes=True),
)
"""The README's limits aside: each is explained in docs/programs.md."""


def refusal(said: str) -> str | None:
    """The line by which a program refuses its options; None if there is none."""
    for line in said.splitlines():
        if REFUSALS.search(line):
            return line.strip()
    return None


def known(case: Case, said: list[str]) -> Known | None:
    """What is known of a case that does not work, by its name and what failed said; None if it should."""
    return next((entry for entry in KNOWN if entry.names(case, said)), None)
