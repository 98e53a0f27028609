# SPDX-License-Identifier: BSD-3-Clause
"""What stopping and resuming costs per QP: an agent stops and resumes a process with N connected QPs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from bench import programs, traffic
from bench.agents import RunningAgent, agent
from bench.ends import BenchError, End, finish, running, two_ends, wait_listening
from bench.results import Section
from bench.settings import Settings

COUNTS = (1, 16, 256, 4096)
LIMIT_MS = 500.0
PORT = 18515
_CONTAINER = "bench"
_SMALL = ["--max-size", "64", "--depth", "32", "--recv-depth", "4", "--messages", "2", "--rnr-every", "0"]


def _state(progress: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads(progress.read_text())["state"])
    return ""


@contextlib.contextmanager
def _connected(ends: tuple[End, End], helper: RunningAgent, count: int, where: Path) -> Iterator[None]:
    """`count` idle QPs between the two ends; at the end they exchange messages, which must be right."""
    server, client = ends
    directory = helper.client.container_add(_CONTAINER, netns=f"/run/netns/{server.name}", gid=server.address)
    device = traffic.with_agents(str(directory / "agent.sock"), "/nonexistent/agent.sock")
    progress, go = where / "progress", where / "go"
    for path in (progress, go):
        path.unlink(missing_ok=True)
    program = programs.mgcheck()
    serve = [program, "-p", str(PORT), *_SMALL[2:6]]
    ask = [program, "-p", str(PORT), "--qps", str(count), *_SMALL, "--idle-until", str(go), server.address]
    with running(server.start([*serve, "--progress", str(progress)], device.server)) as first:
        wait_listening(first, PORT)
        with running(client.start(ask, device.client)) as second:
            until = time.monotonic() + 60
            while _state(progress) != "idle":
                if second.poll() is not None or first.poll() is not None or time.monotonic() > until:
                    raise BenchError(f"{count} QPs were not connected: {_words(second) or _words(first)}")
                time.sleep(0.01)
            yield
            go.touch()
            finish(second, ask)
            finish(first, serve)
    helper.client.container_remove(_CONTAINER)


def _words(process: object) -> str:
    stream = getattr(process, "stderr", None)
    if stream is None or getattr(process, "poll", lambda: None)() is None:
        return ""
    return str(stream.read()).strip()[-200:]


def stop_resume(settings: Settings) -> Section:
    """Stop and resume of 1, 16, 256 and 4096 idle QPs, by the agent's own clock."""
    section = Section("qps", "Stop and resume by number of QPs", "the agent's stop and resume, in place")
    both = {}
    with settings.scratch() as where, two_ends() as ends, agent(ends[0], where / "agent") as helper:
        for count in COUNTS:
            stops: list[float] = []
            resumes: list[float] = []
            with _connected(ends, helper, count, where):
                for turn in range(-settings.warm_up, settings.rounds):
                    settings.tell(f"{count} QPs ({turn + 1}/{settings.rounds})")
                    dumps = where / "dumps"
                    dumps.mkdir(exist_ok=True)
                    stopped = helper.client.container_stop(_CONTAINER, dumps)
                    resumed = helper.client.container_resume(_CONTAINER)
                    if stopped["qps"] != count:
                        raise BenchError(f"{stopped['qps']} QPs were stopped instead of {count}")
                    if turn >= 0:
                        stops.append(float(stopped["ms"]))
                        resumes.append(float(resumed["ms"]))
            section.add(f"stop, {count} QPs", "ms", stops)
            section.add(f"resume, {count} QPs", "ms", resumes)
            both[count] = section.add(
                f"both, {count} QPs", "ms", [a + b for a, b in zip(stops, resumes, strict=True)]
            )
    section.target(f"{COUNTS[-1]} QPs: under {LIMIT_MS:.0f} ms", both[COUNTS[-1]], LIMIT_MS)
    many, fewer = COUNTS[-1], COUNTS[-2]
    per_qp = section.add(
        f"cost per QP, {many} / {fewer} QPs", "x", [both[many].median / many / (both[fewer].median / fewer)]
    )
    section.target("growing no worse than linearly", per_qp, 1.0)
    return section
