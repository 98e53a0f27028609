# SPDX-License-Identifier: BSD-3-Clause
"""The programs of tests/verbs/c on rdma_rxe: they pass there as on our device, but for what is on record.

`differences.txt` has a line for each case in which the devices differ, with the check that fails on
rdma_rxe; what comes after that check has not been seen there. docs/verbs.md says what the differences mean.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.interop.ends import Kernels, Ours
from tests.interop.image import HERE
from tests.verbs.verbs_programs import Builder, cases_of

PROGRAMS = ("t_modify", "t_post", "t_args", "t_qp", "t_errors", "t_memory", "t_events", "t_srq", "t_ud",
            "t_windows", "t_atomics", "t_ex", "t_data", "t_threads")  # fmt: skip
UNSTEADY = {
    "t_ud a_posted_request_has_a_copy_of_its_handle": "rdma_rxe looks for the handle when it sends",
}
"""Not run: what rdma_rxe does differs from run to run, or the machine is not made for it."""
EVERY = [f"{program} {name}" for program in PROGRAMS for name in cases_of(program)]
CASES = [case for case in EVERY if case not in UNSTEADY]
NO_END, CRASH = "no end", "crash"


def _recorded() -> dict[str, str]:
    lines = (HERE / "differences.txt").read_text().splitlines()
    found = dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    assert found.keys() | UNSTEADY.keys() <= set(EVERY), "no such case"
    return found


DIFFERENCES = _recorded()


@pytest.fixture(scope="module")
def installed(ends: tuple[Ours, Kernels], tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The emulated machine with the programs in it."""
    ours, kernels = ends
    builder = Builder(ours.library, tmp_path_factory.mktemp("verbs"))
    for name in PROGRAMS:
        program: Path = builder.program(name)
        kernels.guest.put(program, f"/usr/local/bin/{name}")
    return kernels


@pytest.mark.timeout(150)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_device_does_the_same(installed: Kernels, case: str) -> None:
    wanted = DIFFERENCES.get(case)
    try:
        ended = installed.guest.run(case.split(), 20 if wanted == NO_END else 90)
    except TimeoutError:
        assert wanted == NO_END
        return
    if wanted is None:
        assert ended.status == 0, ended
    elif wanted == CRASH:
        assert ended.status < 0, ended
    else:
        assert ended.status == 1, ended
        assert wanted in ended.output, ended
