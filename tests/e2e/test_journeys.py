# SPDX-License-Identifier: BSD-3-Clause
"""Programs that nobody here wrote, moved there and back, one end, the other, both at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.stage import Check, Stage, wait_for
from tests.native.procfs import listens, waits_for_events

from migroce.errors import MigroceError

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """Command lines of a server and a client; {ip} is the server's address, {n} how long it runs."""

    server: str
    client: str
    runs: int
    """The first {n}; four times as much when it was over before its moves were."""
    ready: int | str | None = None
    """The TCP port that the server listens at, or words it says then; None: it waits for rdma_cm's events."""


def perftest(options: str) -> Program:
    """A benchmark of perftest, for {n} seconds, or where it refuses that, as often."""
    program, *rest = options.split()
    amount, runs = ("-n", 50_000) if "-e" in rest else ("-D", 20)
    common = shlex.join([program, "-d", "rxe0", *rest, amount, "{n}"])
    return Program(common, f"{common} {{ip}}", runs, None if "-R" in rest else 18515)


def ucx(transports: str, options: str, runs: int) -> Program:
    """ucx_perftest by the messages of UCX's protocols."""
    names = f"env UCX_NET_DEVICES=rxe0:1 UCX_WARN_UNUSED_ENV_VARS=n UCX_TLS={transports} ucx_perftest"
    return Program(f"{names} {options} -n {{n}}", f"{names} {{ip}} {options} -n {{n}}", runs, 13337)


def fio(verb: str) -> Program:
    """fio's rdma engine at 150 MB/s; fio asks for no RNR retries, so its server posts more than can come."""
    both = f"[global]\nioengine=rdma\nport=9990\nbs=64k\nsize={{n}}M\nverb={verb}\n"
    server = f"{both}[server]\nrw=read\niodepth=16\n"
    client = f"{both}hostname={{ip}}\niodepth=8\n[client]\nrw=write\nrate=150m\n"
    lines = [f"printf %s {shlex.quote(job)} >/job; exec fio /job" for job in (server, client)]
    return Program(*lines, 2500, "waiting for connection")


PROGRAMS = {
    "ib_send_bw -R": perftest("ib_send_bw -R -b"),
    "ib_send_bw -R -e": perftest("ib_send_bw -R -e"),
    "ib_send_bw, 16 QPs": perftest("ib_send_bw -q 16 -b"),
    "ib_send_bw, shared queue": perftest("ib_send_bw --use-srq -q 4"),
    "ib_send_bw, XRC": perftest("ib_send_bw -c XRC -q 2"),
    "ib_send_bw, UC": perftest("ib_send_bw -c UC"),
    "ib_send_bw, UD": perftest("ib_send_bw -c UD"),
    "ib_write_bw, chains": perftest("ib_write_bw --post_list 8 -q 4"),
    "ib_write_bw, 1024 QPs": dataclasses.replace(perftest("ib_write_bw -q 1024 -t 4 -s 1024"), runs=40),
    "ib_write_lat": perftest("ib_write_lat"),
    "ib_read_bw, 16 QPs, both ways": perftest("ib_read_bw -q 16 -b"),
    "ib_atomic_bw": perftest("ib_atomic_bw -q 4"),
    "ucx, messages": ucx("rc_verbs,ud_verbs,self", "-t tag_bw -s 65536", 100_000),
    "ucx, puts": ucx("rc_verbs,ud_verbs,self", "-t ucp_put_bw -s 65536", 100_000),
    "ucx, datagrams": ucx("ud_verbs,self", "-t tag_lat -s 4096", 100_000),
    "fio, writes": fio("write"),
    "fio, reads": fio("read"),
}


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

    def _listens(self, ready: int | str | None) -> bool:
        pid = self.server.info()["pid"]
        assert pid is not None, self.server.log()
        if isinstance(ready, str):
            return ready in self.server.log()
        return waits_for_events(pid) if ready is None else listens(ready, of=pid)

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
    words = shlex.split(program.client.replace("exec ", "").split(";")[-1])
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
