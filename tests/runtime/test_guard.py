# SPDX-License-Identifier: BSD-3-Clause
"""A killed runtime's work is undone, once nobody works on the container any more; other work is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_WORK = """
import os, subprocess, sys
from migroce.runtime.guard import Guard
guard = Guard(lambda: os.write(undone, b"undone"))
if sys.argv[1] == "release":
    guard.release()
    sys.exit(0)
if sys.argv[1] == "child":
    child = subprocess.Popen(["sleep", "100"], close_fds=False)
    print(child.pid, flush=True)
else:
    print(0, flush=True)
os.kill(os.getpid(), 9)
"""


def run(how: str) -> tuple[int, int, int]:
    """(status, pid of what it started, descriptor that shows what is undone)."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    script = f"undone = {write}\n{_WORK}"
    done = subprocess.Popen(
        [sys.executable, "-c", script, how], stdout=subprocess.PIPE, pass_fds=(write,), text=True
    )
    os.close(write)
    assert done.stdout is not None
    with done.stdout as out:
        first = out.readline()
    return done.wait(), int(first or 0), read


def test_killed_it_is_undone() -> None:
    status, _, undone = run("kill")
    assert status == -signal.SIGKILL
    assert os.read(undone, 100) == b"undone"
    os.close(undone)


def test_released_it_is_not() -> None:
    status, _, undone = run("release")
    assert status == 0
    assert os.read(undone, 100) == b""
    os.close(undone)


def test_while_the_real_runtime_still_works_nothing_is_undone() -> None:
    status, child, undone = run("child")
    assert status == -signal.SIGKILL
    os.set_blocking(undone, False)
    with pytest.raises(BlockingIOError):
        os.read(undone, 100)
    os.kill(child, signal.SIGKILL)
    os.set_blocking(undone, True)
    assert os.read(undone, 100) == b"undone"
    os.close(undone)


def test_the_engine_does_not_wait_for_the_guard(tmp_path: Path) -> None:
    script = f"""
import os, time
from migroce.runtime.guard import Guard
read, write = os.pipe()
Guard(lambda: time.sleep(200))
open({str(tmp_path / "ran")!r}, "w").close()
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "ran").exists()
    for pid in [each for each in os.listdir("/proc") if each.isdigit()]:  # the guard itself, sleeping
        try:
            if script.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue
