# SPDX-License-Identifier: BSD-3-Clause
"""Programs between the kernel's rdma_rxe and our library, in both directions."""

from __future__ import annotations

import pytest
from tests.interop import table
from tests.interop.ends import NO_CLOCK, End, run
from tests.interop.matrix import KERNELS_ANSWERS, ROWS, SCENARIOS, CmRow, Row


@pytest.mark.timeout(400)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_the_program_finishes_at_both_ends(
    row: Row | CmRow, direction: tuple[End, End], request: pytest.FixtureRequest
) -> None:
    table.cell(request, row.group, row.title, f"to {direction[0].name}")
    for _ in range(5):
        outcome = row.run(*direction)
        if NO_CLOCK not in str(outcome):
            break
    assert outcome.good, str(outcome)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_request_completes_as_the_standard_has_it(
    scenario: str, direction: tuple[End, End], request: pytest.FixtureRequest
) -> None:
    of_all = SCENARIOS[scenario]
    requester, responder = of_all if direction[0].name == "migroce" else KERNELS_ANSWERS.get(scenario, of_all)
    shown = ", ".join((*of_all[0], *of_all[1])).replace("_", "\\_")
    table.cell(request, "Completions", f"`mgerr {scenario}`: {shown}", f"to {direction[0].name}")
    outcome = run(*direction, ["mgerr", scenario], port=18600, gid_option="-x")
    assert outcome.good, str(outcome)
    assert tuple(outcome.client.output.splitlines()) == requester, str(outcome)
    assert tuple(outcome.server.output.splitlines()) == responder, str(outcome)
