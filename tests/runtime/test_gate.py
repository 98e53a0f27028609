# SPDX-License-Identifier: BSD-3-Clause
"""A restore goes on when its driver has opened the gate, and fails when the driver gives up or dies."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migroce.errors import MigroceError
from migroce.runtime.gate import Gate, wait

_DIES = """
import os, signal, sys
from pathlib import Path
from migroce.runtime.gate import Gate
gate = Gate(Path(sys.argv[1]))
print("shut", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_where_there_is_no_gate_nobody_waits(tmp_path: Path) -> None:
    wait(tmp_path / "gate")


def test_who_waits_goes_on_when_it_is_opened_and_who_comes_later_too(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, tmp_path / "gate")
        assert not waiting.done()
        gate.open()
        waiting.result(60)
    wait(tmp_path / "gate")


def test_a_driver_that_gives_up_lets_the_restore_fail(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, tmp_path / "gate")
        gate.give_up()
        gate.give_up()
        with pytest.raises(MigroceError, match="given up"):
            waiting.result(60)
    with pytest.raises(MigroceError, match="given up"):
        wait(tmp_path / "gate")


def test_a_driver_that_dies_lets_the_restore_fail(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    with (
        subprocess.Popen(
            [sys.executable, "-c", _DIES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as driver,
        ThreadPoolExecutor(1) as pool,
    ):
        assert driver.stdin is not None
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"shut\n"
        waiting = pool.submit(wait, path)
        assert not waiting.done()
        driver.stdin.close()
        with pytest.raises(MigroceError, match="given up"):
            waiting.result(60)


def test_a_gate_that_an_earlier_move_has_left_open_is_shut_again(tmp_path: Path) -> None:
    Gate(tmp_path / "gate").open()
    Gate(tmp_path / "gate").give_up()
    with pytest.raises(MigroceError, match="given up"):
        wait(tmp_path / "gate")
