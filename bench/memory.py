# SPDX-License-Identifier: BSD-3-Clause
"""Resident memory: what the library adds to a process with one QP, and the agent's."""

from __future__ import annotations

import json
from pathlib import Path

from bench import programs, traffic
from bench.agents import agent
from bench.ends import End, two_ends
from bench.results import Section
from bench.settings import Settings

LIBRARY_LIMIT, AGENT_LIMIT = 8.0, 60.0  # MiB
_IDLE = {"LD_PRELOAD": ""}


def _of_process(pid: int) -> float:
    """Resident MiB of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _probe(end: End, device: str, env: dict[str, str]) -> float:
    """Resident MiB of the probe, which uses a QP if a device is named."""
    said = end.run([programs.one_qp(), *([device] if device else [])], env)
    return int(json.loads(said)["rss_kib"]) / 1024


def memory(settings: Settings) -> Section:
    """A process with one QP that has moved 128 MB against the same without RDMA; and its agent."""
    section = Section("memory", "Resident memory", "MiB; one QP, connected to itself, 2000 writes of 64 KiB")
    added: list[float] = []
    used: list[float] = []
    with settings.scratch() as where, two_ends() as (end, _), agent(end, where / "agent") as helper:
        socket = str(helper.library_socket)
        device = traffic.with_agents(socket, socket).server
        for turn in range(settings.rounds):
            settings.tell(f"memory ({turn + 1}/{settings.rounds})")
            without = _probe(end, "", _IDLE)
            added.append(_probe(end, "rxe0", device) - without)
            used.append(_of_process(helper.pid))
    library = section.add("added by the library, one QP", "MiB", added)
    section.target(f"library: at most {LIBRARY_LIMIT:.0f} MiB", library, LIBRARY_LIMIT)
    section.target(
        f"agent: at most {AGENT_LIMIT:.0f} MiB", section.add("agent", "MiB", used), AGENT_LIMIT
    )
    return section
