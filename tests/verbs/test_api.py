# SPDX-License-Identifier: BSD-3-Clause
"""Every test of the C programs, as a test of its own: programs in c/, names in their TV_MAIN."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from verbs_programs import DLOPEN, FORWARD, PROGRAMS, Preload, cases_of, sanitized

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

CASES = [(program, name) for program in (*PROGRAMS, FORWARD, DLOPEN) for name in cases_of(program)]
BY_HANDLE = {name for program, name in CASES if program == DLOPEN} | {"a_handle_gives_what_linking_gives"}
"""What needs the library's own dlsym, which a sanitized one does not have (native/verbs/dlsym.c)."""
TSAN = os.environ.get("MIGROCE_SANITIZER") == "tsan"


@pytest.mark.parametrize(("program", "name"), CASES, ids=[f"{p[2:]}:{n}" for p, n in CASES])
def test_verbs(programs: dict[str, Path], preload: Preload, program: str, name: str) -> None:
    if sanitized() and name in BY_HANDLE:
        pytest.skip("a sanitizer's runtime does not bear with another dlsym")
    if TSAN and program == "t_gone":
        pytest.skip("TSan's own memcpy looks at shadow memory first, and faults where nothing can be left")
    if TSAN and name == "children_that_open_the_device_anew":
        pytest.skip("TSan has a thread of its own and no threads after a fork")
    done = preload.alone(programs[program], name)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
