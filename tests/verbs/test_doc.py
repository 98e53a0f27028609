# SPDX-License-Identifier: BSD-3-Clause
"""docs/verbs.md: each test it names exists, and the limits are what it says."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from verbs_programs import Preload, cases_of

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "verbs.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+)::(\w+)`", DOC)))

# Linux 6.12, drivers/infiniband/sw/rxe/rxe_param.h, under the names of ibv_devinfo -v. Without max_qp, which
# docs/verbs.md explains, and max_pkeys: rxe has the one P_Key too.
RXE = {
    "max_qp_wr": 1 << 20, "max_sge": 32, "max_sge_rd": 32, "max_cq": 1 << 20, "max_cqe": (1 << 15) - 1,
    "max_mr": (1 << 19) - 1, "max_pd": 1 << 20, "max_qp_rd_atom": 128, "max_res_rd_atom": 0x3F000,
    "max_qp_init_rd_atom": 128, "max_srq": (1 << 20) - 0x20001, "max_srq_wr": 1 << 20, "max_srq_sge": 27,
    "max_ah": (1 << 15) - 1, "max_mcast_grp": 8192, "max_mcast_qp_attach": 56,
    "max_total_mcast_qp_attach": 0x70000, "local_ca_ack_delay": 15, "phys_port_cnt": 1,
}  # fmt: skip


@cache
def names_in(path: str) -> set[str]:
    """Names of the tests in a file; none if there is no such file."""
    file = ROOT / path
    if not file.is_file():
        return set()
    if file.suffix == ".c":
        return set(cases_of(file.stem))
    return set(re.findall(r"^\s*(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))


def test_each_test_that_is_named_exists() -> None:
    missing = [f"{path}::{name}" for path, name in NAMED if name not in names_in(path)]
    assert not missing, f"docs/verbs.md names tests that do not exist: {missing}"


def test_each_row_is_proven() -> None:
    rows = [line for line in DOC.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    unproven = [row for row in rows if "::" not in row]
    assert rows
    assert not unproven, f"rows of docs/verbs.md without a test: {unproven}"


def test_our_limits_are_at_least_those_of_rxe(preload: Preload) -> None:
    program = shutil.which("ibv_devinfo")
    if program is None:
        pytest.skip("ibv_devinfo is not installed")
    done = preload.alone(Path(program), "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    ours = {name: int(value) for name, value in re.findall(r"^\s+(\w+):\s+(\d+)$", done.stdout, re.MULTILINE)}
    assert {name: ours[name] for name, least in RXE.items() if ours[name] < least} == {}
