# SPDX-License-Identifier: BSD-3-Clause
"""Moves of programs that have everything pending that verbs know: keepcheck leaves it and uses it later."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.stage import Box, Stage, built, wait_for

PROGRAM = "/usr/local/bin/keepcheck"


class Pending:
    """A server and a client of keepcheck, held at each step until the test lets them go on."""

    def __init__(self, stage: Stage, memory: str = "private") -> None:
        files = {PROGRAM: str(built("tests/workload/keepcheck"))}
        argv = ["sh", "-c", 'mkdir -p /hold && exec "$@"', "sh", PROGRAM, "--hold", "/hold"]
        argv += ["--memory", memory]
        self.server = stage.box("keep-server", "a", argv, files=files)
        self.client = stage.box("keep-client", "b", [*argv, self.server.ip], files=files)
        self.boxes = (self.server, self.client)
        self.reach("pending")

    def reach(self, step: str) -> None:
        """Wait until both have come to a step."""

        def there(box: Box) -> bool:
            assert box.info()["status"] != "exited", f"before {step}: {box.log()}"
            path = box.file("/hold/at")
            return path.exists() and path.read_text().strip() == step

        for box in self.boxes:
            wait_for(f"{box.name} at {step}", lambda box=box: there(box))  # type: ignore[misc]

    def on(self, step: str) -> None:
        """Let both go on from a step."""
        for box in self.boxes:
            box.file(f"/hold/go-{step}").touch()

    def finish(self) -> None:
        """See both end well."""
        for box in self.boxes:
            assert box.wait() == 0, "\n".join(each.log() for each in self.boxes)
            assert json.loads(box.log().splitlines()[-1])["rounds"] > 100


def test_everything_pending_is_there_after_moves_of_both_ends(stage: Stage) -> None:
    """Events and completions not fetched, an armed SRQ, RNR, windows; atomics, READs, FLUSHes under way."""
    check = Pending(stage)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(box.move) for box in check.boxes]:
            assert (done.result().qps, done.result().warnings) == (13, [])
    check.on("pending")
    check.reach("used")
    check.server.move()
    check.on("used")
    check.finish()


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_everything_pending_is_there_after_ten_moves_of_one_end(stage: Stage, who: int) -> None:
    check = Pending(stage)
    for step in ("pending", "used"):
        for _ in range(5):
            check.boxes[who].move()
        check.on(step)
        if step == "pending":
            check.reach("used")
    check.finish()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["sparse", "memfd", "/dev/shm/registered", "/registered"])
def test_regions_of_any_kind_of_memory_move(stage: Stage, memory: str) -> None:
    """2 GiB of which little is touched, a memfd, shared memory, a file."""
    check = Pending(stage, memory)
    for step in ("pending", "used"):
        check.server.move()
        check.client.move()
        check.on(step)
        if step == "pending":
            check.reach("used")
    check.finish()
