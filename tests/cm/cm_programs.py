# SPDX-License-Identifier: BSD-3-Clause
"""Programs on librdmacm, server and client, in two namespaces."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.native.procfs import waits_for_events

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "verbs"))
from verbs_pair import ADDRESSES, FURTHER, Outcome, Pair, _ended, _finish
from verbs_programs import FLAGS, Preload, sanitized
from verbs_programs import SOURCES as TV

__all__ = ["ADDRESSES", "FLAGS", "FURTHER", "TV", "CmPair", "Preload", "command", "finish_within", "own_race"]


def command(line: str) -> list[str]:
    """A command line whose program is installed."""
    program, *rest = line.split()
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return [path, *rest]


def finish_within(process: subprocess.Popen[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """What a program says to its end; killed if that does not come."""
    return _finish(process, time.monotonic() + seconds)


def own_race(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """rping closes the channel that its own thread reads, and exits with 255 when the thread is quicker."""
    said = done.stderr.removeprefix("client DISCONNECT EVENT...\n").strip()
    if done.returncode == 255 and said == "rdma_get_cm_event: Bad file descriptor":
        done.returncode = 0
    return done


class CmPair(Pair):
    """The servers listen on no TCP port: they are watched until they wait for a connection."""

    def both(self, server: str, client: str, timeout: float = 60) -> Outcome:
        """Run both to their ends."""
        end = time.monotonic() + timeout * (3 if sanitized() else 1)
        with _ended(self._start(0, command(server))) as first:
            while not waits_for_events(first.pid) and first.poll() is None:
                assert time.monotonic() < end, f"{server} does not come to wait for a connection"
                time.sleep(0.005)
            with _ended(self._start(1, command(client))) as second:
                return Outcome(client=own_race(_finish(second, end)), server=_finish(first, end))

    def start(self, end: int, line: str) -> subprocess.Popen[str]:
        """One program alone."""
        return self._start(end, command(line))
