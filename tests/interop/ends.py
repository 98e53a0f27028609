# SPDX-License-Identifier: BSD-3-Clause
"""The two ends of every case, and a program run between them.

`Ours`: a program of this machine with the library preloaded, in the namespace that the tests run in.
`Kernels`: the same program in the emulated machine, on rdma_rxe.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.interop.gate import gate
from tests.interop.guest import Ended, Guest, Running
from tests.native.procfs import listens, waits_for_events

V4, V6 = 4, 6
NO_CLOCK = "Can't produce a report"
"""perftest, whose measuring of the processor's clock an interruption of an emulated processor disturbs."""


class Started(Protocol):
    """A program that runs."""

    def wait(self, seconds: float) -> Ended | None: ...

    def kill(self) -> None: ...


class End(Protocol):
    """Where a program can run; `name` is what the tables call it."""

    name: str

    def address(self, family: int) -> str: ...

    def gid_index(self, family: int) -> int: ...

    def start(self, argv: Sequence[str], family: int = V4, **environment: str) -> Started: ...

    def listens(self, port: int, seconds: float) -> bool: ...

    def awaits_connections(self, program: Started, seconds: float) -> bool: ...


class _Local:
    """A program of this machine; it dies with the tests."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait and kill
        # setpriv and env are not what the library is for
        variables = [f"{name}={value}" for name, value in environment.items()]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "env", *variables, *argv],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
        )  # fmt: skip

    def wait(self, seconds: float) -> Ended | None:
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if self._output.closed:
            return Ended(status, "")
        self._output.seek(0)
        return Ended(status, self._output.read().decode(errors="replace"))

    def blocks(self) -> bool:
        """Whether it waits in the kernel for events of its connection manager."""
        return waits_for_events(self._process.pid)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()


@dataclass
class Ours:
    """This machine."""

    library: Path
    addresses: dict[int, str]
    gate: Path
    """c/gate.c as a library."""
    name: str = "migroce"

    def address(self, family: int) -> str:
        return self.addresses[family]

    def gid_index(self, family: int) -> int:  # noqa: ARG002 - the address in use is always there
        return 1

    def start(self, argv: Sequence[str], family: int = V4, **environment: str) -> _Local:
        wanted = {
            "LD_PRELOAD": str(self.library), "MIGROCE_ADDR": self.addresses[family],
            "MIGROCE_AGENT": "/nonexistent/agent.sock",
        }  # fmt: skip
        return _Local(argv, {**wanted, **environment})

    def listens(self, port: int, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (found := listens(port)) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def awaits_connections(self, program: Started, seconds: float) -> bool:
        assert isinstance(program, _Local)
        end = time.monotonic() + seconds
        while not (found := program.blocks()) and time.monotonic() < end and not program.wait(0.02):
            pass
        return found


@dataclass
class Kernels:
    """The emulated machine."""

    guest: Guest
    addresses: dict[int, str]
    name: str = "rdma_rxe"

    def address(self, family: int) -> str:
        return self.addresses[family]

    def gid_index(self, family: int) -> int:
        return {V4: 1, V6: 2}[family]  # after the link-local one, IPv4 first

    def start(self, argv: Sequence[str], family: int = V4, **_environment: str) -> Running:  # noqa: ARG002
        return self.guest.start(argv)

    def listens(self, port: int, seconds: float) -> bool:
        return self.guest.listens(port, seconds)

    def awaits_connections(self, program: Started, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not program.wait(0.02):
            if self.has_listener():
                return True
        return False

    def has_listener(self) -> bool:
        """Whether anything waits for connections of rdma_cm."""
        return "LISTEN" in self.guest.run(["rdma", "resource", "show", "cm_id"]).output


@dataclass(frozen=True)
class Outcome:
    """How both sides of a program ended."""

    server: Ended
    client: Ended

    @property
    def good(self) -> bool:
        return self.server.status == 0 and self.client.status == 0

    def __str__(self) -> str:
        sides = (("server", self.server), ("client", self.client))
        return "\n".join(f"--- {name}: status {end.status}\n{end.output}" for name, end in sides)


NO_END = -99


@contextlib.contextmanager
def _ending(program: Started) -> Iterator[Started]:
    try:
        yield program
    finally:
        program.kill()


def run(
    server: End, client: End, argv: Sequence[str], *, port: int, gid_option: str, family: int = V4,
    server_argv: Sequence[str] | None = None, seconds: float = 90, **environment: str,
) -> Outcome:  # fmt: skip
    """Run a program as a server at one end and as its client at the other.

    `environment` is for our end's program. A side that does not end in time has status NO_END.
    """
    own = [*(server_argv or argv), gid_option, str(server.gid_index(family))]
    with _ending(server.start(own, family, **environment)) as first:
        patience = time.monotonic() + 40
        while not server.listens(port, 2):
            ended = first.wait(0.01)
            if ended or time.monotonic() > patience:
                silent = Ended(NO_END, f"does not listen at port {port}")
                return Outcome(ended or silent, Ended(NO_END, "not started"))
        theirs = [*argv, gid_option, str(client.gid_index(family)), server.address(V4)]
        with _ending(client.start(theirs, family, **environment)) as second:
            return _ends(first, second, seconds)


def _ends(first: Started, second: Started, seconds: float) -> Outcome:
    """How a server and its client end, both started."""
    late = Ended(NO_END, f"still running after {seconds:.0f} s")
    ended_second = second.wait(seconds) or late
    # A client that failed leaves its server waiting for ever.
    ended_first = first.wait(20 if ended_second.status == 0 else 3) or late
    return Outcome(ended_first, ended_second)


def run_cm(
    server: End, client: End, server_argv: Sequence[str], client_argv: Sequence[str], *, family: int = V4,
    seconds: float = 60,
) -> Outcome:  # fmt: skip
    """Run a program on librdmacm, whose server listens at no TCP port."""
    with _patience(server, client) as environment, _ending(server.start(server_argv, family)) as first:
        if not server.awaits_connections(first, 40):
            return Outcome(first.wait(0.01) or Ended(NO_END, "does not listen"), Ended(NO_END, "not started"))
        with _ending(client.start(client_argv, family, **environment)) as second:
            return _ends(first, second, seconds)


def _patience(server: End, client: End) -> contextlib.AbstractContextManager[dict[str, str]]:
    """What makes a client wait for an emulated server."""
    if isinstance(server, Kernels) and isinstance(client, Ours):
        return gate(client.gate, client.library, server.has_listener)
    return contextlib.nullcontext({})
