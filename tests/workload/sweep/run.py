# SPDX-License-Identifier: BSD-3-Clause
"""Runs cases between two namespaces and judges what comes of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO

from tests.native.netns import Node
from tests.native.procfs import polls_a_listener, waits_for_events
from tests.workload.sweep.plan import ADDRESS, ADDRESS6, PORT, Case, Ends, Ready
from tests.workload.sweep.words import NO_CLOCK, known, refusal

TRIES = 3
"""Runs of a case in which the machine was too busy for perftest to measure its clock."""

LONGER = 5
"""
How much longer a case may take that has 23 sizes (perftest measures the processor's clock before each), or
two ends that spin on memory: where others want the CPUs, each turn costs a time slice.
"""

REPORTS = 2
"""Reports of a program that runs for ever, after which it is interrupted."""


class Verdict(StrEnum):
    """What came of a case (see the package)."""

    OK = "ok"
    REFUSED = "refused"
    KNOWN = "known"
    FAILED = "failed"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class End:
    """How one program ended: its exit status (negative: the signal; None: killed, out of time), its words."""

    status: int | None
    said: str


@dataclass(frozen=True, slots=True)
class Result:
    """A case's outcome; `why` is what the program or docs/programs.md says of a refusal or failure."""

    case: Case
    verdict: Verdict
    why: str
    seconds: float
    ends: tuple[End, ...] = ()


@dataclass(slots=True)
class Runner:
    """Runs one case at a time between its two nodes, `library` preloaded; `timeout`: seconds for a case."""

    nodes: tuple[Node, Node]
    address6: str
    library: Path
    timeout: float
    _ports: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(20000, 28000)))

    def run(self, case: Case) -> Result:
        """Run and judge."""
        start = time.monotonic()
        if shutil.which(case.server[0]) is None:
            return Result(case, Verdict.MISSING, f"{case.server[0]} is not installed", 0.0)
        for _ in range(TRIES):
            ends = self._both(case)
            if not any(NO_CLOCK in end.said for end in ends):
                break
        verdict, why = judge(case, ends)
        return Result(case, verdict, why, time.monotonic() - start, ends)

    def _both(self, case: Case) -> tuple[End, ...]:
        port = str(next(self._ports))
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._start(0, case.server, port))
            longer = {"-a", "ib_write_lat"} & case.options
            end = time.monotonic() + self.timeout * (LONGER if longer else 1)
            if not first.becomes(lambda: _ready(first.process.pid, case.ready, int(port)), end):
                return (first.finish(time.monotonic()),)
            second = stack.enter_context(self._start(1, case.client, port))
            endless = case.ends is Ends.INTERRUPTED
            if endless and second.becomes(lambda: second.reports() >= REPORTS, end):
                for program in (second, first):
                    program.process.send_signal(signal.SIGINT)
            client = second.finish(end)
            if case.ends is Ends.CLIENT:
                first.process.send_signal(signal.SIGINT)
            # A server whose client has failed may wait for ever: that is no second failure.
            return (first.finish(end if client.status == 0 else min(end, time.monotonic() + 5)), client)

    def _start(
        self, end: int, command: tuple[str, ...], port: str
    ) -> contextlib.AbstractContextManager[Program]:
        given = {PORT: port, ADDRESS: self.nodes[0].address, ADDRESS6: self.address6}
        argv = [given.get(word, word) for word in command]
        settings = (
            f"LD_PRELOAD={self.library}",
            f"MIGROCE_ADDR={self.nodes[end].address}",
            "MIGROCE_AGENT=/nonexistent/agent.sock",
        )
        return started(self.nodes[end].command("env", "--default-signal=INT", *settings, *argv))


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs, its words kept in a file: a pipe could fill and hold it up."""

    process: subprocess.Popen[bytes]
    words: IO[bytes]

    def becomes(self, there: Callable[[], bool], end: float) -> bool:
        """Whether `there` comes true before the program or the time (monotonic) ends."""
        while time.monotonic() < end and self.process.poll() is None:
            if there():
                return True
            time.sleep(0.01)
        return False

    def finish(self, end: float) -> End:
        """How it ends, killed at `end`."""
        status: int | None
        try:
            status = self.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        return End(status, self._said())

    def reports(self) -> int:
        """Its lines of results so far."""
        return reports(self._said())

    def _said(self) -> str:
        return os.pread(self.words.fileno(), 1 << 20, 0).decode(errors="replace")


@contextlib.contextmanager
def started(argv: list[str]) -> Iterator[Program]:
    """A program that is gone when the block is left."""
    with tempfile.TemporaryFile() as words, tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, cwd=directory
        )
        try:
            yield Program(process, words)
        finally:
            process.kill()
            process.wait()


def reports(said: str) -> int:
    """perftest's lines of results: they begin with a size in bytes."""
    return sum(line.strip()[:1].isdigit() for line in said.splitlines())


def judge(case: Case, ends: tuple[End, ...]) -> tuple[Verdict, str]:
    """The verdict on how a case ended, and why."""
    entry = known(case, [end.said for end in ends if end.status != 0])
    # Newer perftest ends with 1 when the peer was interrupted before it.
    good = {
        Ends.ITSELF: {0},
        Ends.CLIENT: {0, -signal.SIGINT},
        Ends.INTERRUPTED: {0, 1, -signal.SIGINT} if reports(ends[-1].said) >= REPORTS else {0},
    }[case.ends]
    if len(ends) == 2 and all(end.status in good for end in ends):
        if entry is None or entry.sometimes:
            return Verdict.OK, ""
        return Verdict.FAILED, f"works, but is said not to: {entry.why}"
    refused = [refusal(end.said) for end in ends if end.status not in good]
    if ends[0].status not in {0, None} and None not in refused:
        return Verdict.REFUSED, refused[0] or ""
    if entry is not None:
        return Verdict.KNOWN, entry.why
    both = zip(("server", "client"), ends, strict=False)
    return Verdict.FAILED, "; ".join(_told(name, end) for name, end in both)


def _told(name: str, end: End) -> str:
    how = "killed, out of time" if end.status is None else f"status {end.status}"
    lines = [text for line in end.said.splitlines() if (text := line.strip()) and text[0] not in "-*#"]
    return f"{name}: {how}: {' | '.join(lines[-3:])}"


def _ready(pid: int, ready: Ready, port: int) -> bool:
    if ready is Ready.TCP:
        return _listens(pid, port)
    # rping of rdma-core 65 polls, too.
    return polls_a_listener(pid) or (ready is Ready.CM and waits_for_events(pid))


def _listens(pid: int, port: int) -> bool:
    """Whether a TCP socket listens on `port` in the network namespace of `pid`."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # the process is gone
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    return True
    return False
