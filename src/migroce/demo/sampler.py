# SPDX-License-Identifier: BSD-3-Clause
"""Samples the counters of containers from the nodes' agents, often enough to draw a move of 0.2 s."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migroce.agent.client import AgentClient, AgentError

PERIOD = 0.016
"""Seconds between samples: above 50 a second."""


class Sampler:
    """Asks one agent again and again in a thread of its own, and hands on what it says."""

    def __init__(self, node: str, agent: Path, take: Callable[[float, str, dict[str, Any]], None]) -> None:
        """`take(now, node, entry)` is called for each container of each answer; `now` in seconds."""
        self._node = node
        self._agent = agent
        self._take = take
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sampler {node}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = AgentClient(self._agent)
        due = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(AgentError):  # a context that ends while asked, an agent that restarts
                asked = time.monotonic()
                found = client.ps()
                # The snapshot was taken somewhere between question and answer.
                now = (asked + time.monotonic()) / 2
                for entry in found:
                    self._take(now, self._node, entry)
            due = max(due + PERIOD, time.monotonic())
            self._stop.wait(due - time.monotonic())
        client.close()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(5)
