# SPDX-License-Identifier: BSD-3-Clause
"""The program that holds a network: it runs from a file alone, waits without CPU, and ends when killed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from tests.e2e.stage import wait_for

from migroce.engines import hold


def test_it_sleeps_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "hold"
    if not hold.write(path):
        pytest.skip("no program for this machine")
    with subprocess.Popen([str(path)], env={}) as process:

        def asleep() -> bool:
            stat = Path(f"/proc/{process.pid}/stat").read_text()
            return stat[stat.rindex(")") + 2] == "S" and (path.name in stat)

        wait_for("sleep", asleep)
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_file_is_whole(machine: str) -> None:
    data = hold.program(machine)
    assert data is not None
    assert data[:4] == b"\x7fELF"
    assert hold.program("vax") is None
