# SPDX-License-Identifier: BSD-3-Clause
"""Programs on librdmacm, server and client, in two namespaces."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "verbs"))
from verbs_pair import ADDRESSES, Outcome, Pair, _finish
from verbs_programs import Preload, sanitized

__all__ = ["ADDRESSES", "CmPair", "Preload", "command"]


def command(line: str) -> list[str]:
    """A command line whose program is installed."""
    program, *rest = line.split()
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return [path, *rest]


class CmPair(Pair):
    """The servers listen on no TCP port: a client that comes too early is refused, and comes again."""

    def both(self, server: str, client: str, timeout: float = 40) -> Outcome:
        """Run both to their ends."""
        timeout *= 4 if sanitized() else 1
        first = self._start(0, command(server))
        end = time.monotonic() + timeout
        try:
            while True:
                second = self._start(1, command(client))
                try:
                    done = _finish(second, timeout)
                finally:
                    second.kill()
                    second.wait()
                if done.returncode == 0 or first.poll() is not None or time.monotonic() > end:
                    return Outcome(client=done, server=_finish(first, timeout))
        finally:
            first.kill()
            first.communicate()

    def start(self, end: int, line: str) -> subprocess.Popen[str]:
        """One program alone."""
        return self._start(end, command(line))
