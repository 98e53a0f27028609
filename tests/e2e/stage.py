# SPDX-License-Identifier: BSD-3-Clause
"""What the end-to-end tests are written with: containers of a lab that know where they are."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from migroce import paths
from migroce.errors import EngineError
from migroce.lab.api import Lab
from migroce.migration.api import Report, migrate
from migroce.migration.report import Progress
from migroce.nodes import LocalNode

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds that anything may take on a loaded machine."""


class NotSeenError(AssertionError):
    """What a test waited for did not come."""


def wait_for(what: str, look: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Look until there is something (true) to see; it. Raises NotSeenError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise NotSeenError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def built(name: str) -> Path:
    """A program of the test build. Skips the test if it was not built."""
    base = Path(os.environ.get("MIGROCE_BUILD", str((paths.source_tree() or Path()) / "build")))
    path = base / name
    if not path.is_file():
        pytest.skip(f"{path} is not built")
    return path


class Box:
    """A container of a test; `home` is the node that it is on."""

    def __init__(self, lab: Lab, name: str, home: str, ip: str) -> None:
        self.lab = lab
        self.name = name
        self.home = home
        self.ip = ip

    @property
    def node(self) -> LocalNode:
        return self.lab.node(self.home)

    def other(self) -> str:
        """A node that it is not on."""
        return next(name for name in self.lab.nodes if name != self.home)

    def move(
        self, to: str | None = None, progress: Progress = lambda _: None, ip: str | None = None
    ) -> Report:
        """Migrate it to another node, perhaps to another address."""
        to = to or self.other()
        report = migrate(self.name, self.node, self.lab.node(to), progress=progress, ip=ip)
        self.home, self.ip = to, ip or self.ip
        return report

    def info(self) -> dict[str, Any]:
        return dict(self.node.call("info", container=self.name))

    def log(self) -> str:
        return str(self.node.call("logs", container=self.name))

    def file(self, path: str) -> Path:
        """A file of the container's, as the node sees it."""
        return self.node.context.bundle(self.name) / "rootfs" / path.lstrip("/")

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit status, when it has ended."""
        status = self.node.call("wait", container=self.name, timeout=seconds)
        return None if status is None else int(status)

    def kill(self, signal: str = "TERM") -> None:
        self.node.call("kill", container=self.name, signal=signal)

    def qps(self) -> list[dict[str, Any]]:
        """Its QPs as the agent's live dump shows them."""
        found = self.node.call("agent", method="ps", container=self.name)
        contexts = [context for container in found for context in container["contexts"]]
        return [qp for context in contexts for qp in (context.get("dump") or {}).get("qps", [])]

    def packets(self) -> int:
        """Packets its QPs have sent and received."""
        return sum(qp["tx_packets"] + qp["rx_packets"] for qp in self.qps())

    def where(self) -> list[str]:
        """Nodes on which it runs (more than one would be a disaster)."""
        running = []
        for node in self.lab.nodes.values():
            info = node.call("info", container=self.name)
            if info["pid"] is not None and info["status"] == "running":
                running.append(node.name)
        return running

    def wait_for_traffic(self, packets: int = 50) -> None:
        """Wait until its QPs have sent or received so many more packets."""
        before = self.packets()
        wait_for(f"traffic of {self.name}", lambda: self.packets() >= before + packets)


class Stage:
    """A lab's containers for one test; all of them end with it."""

    _numbers = itertools.count(1)

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.boxes: list[Box] = []

    def box(self, role: str, node: str, args: list[str], **options: Any) -> Box:
        """Start a container."""
        number = next(self._numbers)
        ip = f"10.0.1.{number % 240 + 2}"
        options.setdefault("ip", ip)
        box = Box(self.lab, f"{role}-{number}", self.lab.node(node).name, options["ip"])
        self.lab.create(box.name, node, args, **options)
        self.boxes.append(box)
        return box

    def close(self) -> None:
        """Remove all containers, wherever they are."""
        for node in self.lab.nodes.values():
            for info in node.call("list"):
                node.call("delete", container=info["id"])


class Check:
    """Two containers that run mgcheck against each other until `finish`.

    They sleep for completions unless `polling`: two that poll leave nothing of a small machine.
    """

    def __init__(
        self, stage: Stage, server_on: str = "a", client_on: str = "b", *options: str,
        rate: int = 1500, polling: bool = False, further: tuple[list[str], list[str]] = ([], []),
    ) -> None:  # fmt: skip
        """`further`: more addresses of the server and the client; QPs are at the first of these, then."""
        program = "/usr/local/bin/mgcheck"
        files = {program: str(built("tests/workload/mgcheck"))}
        own = [program, "--rate", str(rate), "--progress", "/progress", "--stall", "60"]
        own += [] if polling else ["--events"]
        own += ["-x", "2"] if any(further) else []
        self.server = stage.box("server", server_on, own, files=files, further=further[0])
        end = ["--seconds", "600"]
        self.client = stage.box(
            "client", client_on, [*own, *end, *options, self.server.ip], files=files, further=further[1]
        )
        wait_for("mgcheck's beginning", lambda: self.state(self.client) in ("running", "idle"))

    @staticmethod
    def progress(box: Box) -> dict[str, Any]:
        """The counters that mgcheck keeps in a file."""
        try:
            found = json.loads(box.file("/progress").read_text())
        except (OSError, ValueError):
            return {}
        return dict(found)

    def state(self, box: Box) -> str:
        if box.info()["status"] == "exited":
            pytest.fail(f"mgcheck of {box.name} has ended: {box.log()}")
        return str(self.progress(box).get("state", ""))

    def done(self) -> int:
        """Messages verified by both."""
        return sum(int(self.progress(box).get("received", 0)) for box in (self.server, self.client))

    def more(self, messages: int = 100) -> None:
        """Wait until so many more messages were exchanged."""
        before = self.done()
        wait_for(f"{messages} more messages", lambda: self.done() >= before + messages)

    def finish(self) -> dict[str, Any]:
        """End both and see that nothing was wrong; the client's verdict."""
        for box in (self.server, self.client):
            with contextlib.suppress(EngineError):  # the first one's end may be the other's
                box.kill("TERM")
        return self.verify()

    def verify(self) -> dict[str, Any]:
        """See both end well; the client's verdict."""
        statuses = (self.client.wait(), self.server.wait())
        assert statuses == (0, 0), f"client: {self.client.log()}\nserver: {self.server.log()}"
        verdict = json.loads(self.client.log().strip().splitlines()[-1])
        assert verdict["errors"] == 0
        return dict(verdict)


class Binder:
    """A process that runs cmports."""

    def __init__(self, directory: Path, process: subprocess.Popen[str] | None = None) -> None:
        self.directory, self.process = directory, process
        self.n = 0

    def do(self, *command: str | int) -> str:
        """Have a command carried out: "0 PORT" or the errno's name."""
        path = self.directory / str(self.n)
        self.n += 1
        new = path.with_suffix(".new")
        new.write_text(" ".join(map(str, command)))
        new.rename(path)
        said = path.with_suffix(".said")

        def there() -> bool:
            assert self.process is None or self.process.poll() is None
            return said.exists()

        wait_for(f"an answer to {command}", there)
        return said.read_text()


def table(output: str) -> list[str]:
    """The last line of numbers of a perftest program."""
    rows = [line.split() for line in output.splitlines() if re.match(r"\s*\d+\s+\d+\s+[\d.]+", line)]
    return rows[-1] if rows else []
