# SPDX-License-Identifier: BSD-3-Clause
"""Programs that nobody here wrote, moved there and back, one end, the other, both at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.programs import PROGRAMS, Program
from tests.e2e.stage import Check, Stage, wait_for
from tests.native.procfs import listens

from migroce.errors import MigroceError

pytestmark = pytest.mark.slow


class Journey:
    """Two containers with a program's ends."""

    def __init__(self, stage: Stage, program: Program, runs: int) -> None:
        def argv(line: str, ip: str) -> list[str]:
            filled = line.replace("{n}", str(runs)).replace("{ip}", ip)
            return ["sh", "-c", filled if "exec" in line else f"exec {filled}"]

        self.server = stage.box("server", "a", argv(program.server, ""))
        wait_for("the server", lambda: self._listens(program.ready))
        self.client = stage.box("client", "b", argv(program.client, self.server.ip))
        wait_for("traffic", lambda: self.over() or self.client.packets() > 20)

    def _listens(self, ready: int | str | Callable[[int], bool]) -> bool:
        pid = self.server.info()["pid"]
        assert pid is not None, self.server.log()
        if isinstance(ready, str):
            return ready in self.server.log()
        return listens(ready, of=pid) if isinstance(ready, int) else ready(pid)

    def over(self) -> bool:
        return bool(self.client.info()["status"] == "exited")

    def go(self) -> bool:
        """There and back, one end, the other, both at once; False: the program had ended before."""
        with ThreadPoolExecutor(2) as pool:
            for boxes in (
                [self.server], [self.server], [self.client], [self.client],
                [self.server, self.client], [self.server, self.client],
            ):  # fmt: skip
                try:
                    for done in [pool.submit(box.move) for box in boxes]:
                        assert done.result().warnings == []
                except MigroceError:
                    if not self.over():
                        raise
                    return False
                before = self._packets()
                wait_for("traffic", lambda before=before: self.over() or self._packets() > before + 20)  # type: ignore[misc]
        return not self.over()

    def _packets(self) -> int:
        with contextlib.suppress(MigroceError):
            return self.server.packets() + self.client.packets()
        return 0

    def finish(self) -> None:
        """See both end well."""
        statuses = (self.client.wait(300), self.server.wait(30))
        assert statuses == (0, 0), f"{self.client.log()}\n{self.server.log()}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_ends_well_after_moves_of_either_end_and_both(stage: Stage, name: str) -> None:
    program = PROGRAMS[name]
    words = shlex.split(program.client.rpartition("exec ")[2])
    needed = next(word for word in words if word != "env" and "=" not in word)
    if shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    for more in (1, 4, 16):
        journey = Journey(stage, program, program.runs * more)
        whole = journey.go()
        journey.finish()
        if whole:
            return
    pytest.fail(f"{name} always ended before it had been moved")


def _footprint(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads, KiB of data of a process, touched or not: the workload touches more and more."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), int(status["VmData"].split()[0])


def test_twenty_moves_leave_nothing_in_process_and_agents(stage: Stage) -> None:
    """Descriptors and threads are as many as after the first round trips; so is memory."""
    check = Check(stage)
    nodes = list(stage.lab.nodes.values())

    def look() -> list[tuple[int, int, int]]:
        check.more(50)
        agents = [int(node.call("agent", method="status")["pid"]) for node in nodes]
        pids = [int(box.info()["pid"]) for box in (check.server, check.client)]
        return [_footprint(pid) for pid in (*pids, *agents)]

    def trip(turns: int) -> None:
        for _ in range(turns):
            for _ in range(2):
                check.more(20)
                check.server.move()

    trip(2)
    before = look()
    trip(10)
    after = look()
    for who, old, new in zip(("server", "client", "agent of a", "agent of b"), before, after, strict=True):
        assert new[:2] <= old[:2], f"{who}: {old} -> {new} (descriptors, threads, KiB)"
        assert new[2] <= old[2] + 4096, f"{who}: {old} -> {new} (descriptors, threads, KiB)"
    check.finish()
