# SPDX-License-Identifier: BSD-3-Clause
"""An agent at one end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.ends import BenchError, End, running
from migroce.agent.client import AgentClient
from migroce.errors import MigroceError

START_LIMIT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """An agent: its process's `pid`, its `directory` with its sockets, a `client` for it."""

    pid: int
    directory: Path
    client: AgentClient

    @property
    def library_socket(self) -> Path:
        """Where the library of a program that is in no container finds it."""
        return self.directory / "agent.sock"


@contextlib.contextmanager
def agent(end: End, directory: Path) -> Iterator[RunningAgent]:
    """An agent at `end`, ended when the block is left."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "migroce.agent", "--run-dir", str(directory)]
    with running(end.start(argv, container=False)) as process:
        try:
            with AgentClient(directory / "admin.sock", wait_s=START_LIMIT) as client:
                yield RunningAgent(process.pid, directory, client)
        except MigroceError as exc:
            raise BenchError(f"the agent at {end.name}: {exc}") from exc
