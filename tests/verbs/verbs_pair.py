# SPDX-License-Identifier: BSD-3-Clause
"""Two network namespaces with a link, and client/server programs run in them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.native.perftest import NO_CLOCK
from tests.native.procfs import listens
from verbs_programs import Preload, sanitized

ADDRESSES = ("10.99.0.1", "10.99.0.2")
FURTHER = ("10.99.1.1", "10.99.1.2")
"""The interfaces' second IPv4 addresses, which only programs without MIGROCE_ADDR have."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What both ends of a run said."""

    server: subprocess.CompletedProcess[str]
    client: subprocess.CompletedProcess[str]

    @property
    def had_no_clock(self) -> bool:
        """perftest could not measure the clock: to be run again."""
        return NO_CLOCK in self.server.stderr + self.client.stderr

    def check(self) -> None:
        """Both ended well."""
        told = "\n".join(
            f"{end} {run.args} -> {run.returncode}\n{run.stdout}{run.stderr}"
            for end, run in (("server", self.server), ("client", self.client))
        )
        assert self.server.returncode == 0, told
        assert self.client.returncode == 0, told


@dataclass(frozen=True, slots=True)
class Pair:
    """Namespaces 0 (server) and 1 (client)."""

    preload: Preload
    by_interface: bool = False
    """Programs have the interface with all its addresses, not one address."""

    @staticmethod
    def names() -> tuple[str, str]:
        """Names of the namespaces, this process's own."""
        return (f"mgv{os.getpid()}s", f"mgv{os.getpid()}c")

    @classmethod
    def up(cls, preload: Preload) -> Pair:
        """Make them. Raises CalledProcessError when `ip` fails."""
        server, client = cls.names()
        for name in (server, client):
            _ip("netns", "add", name)
        _ip("link", "add", "veth", "netns", server, "type", "veth", "peer", "name", "veth", "netns", client)
        for name, address, second in zip((server, client), ADDRESSES, FURTHER, strict=True):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "veth", "mtu", "9000", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth")
            _ip("-n", name, "address", "add", f"{second}/24", "dev", "veth")
            _ip("-n", name, "address", "add", f"fd99::{address[-1]}/64", "dev", "veth", "nodad")
        return cls(preload)

    def down(self) -> None:
        """Take them away with all that is in them."""
        for name in self.names():
            _ip("netns", "del", name)

    def run(
        self,
        command: Sequence[str],
        *,
        server: Sequence[str] = (),
        client: Sequence[str] = (),
        port: int,
        timeout: float = 100,
    ) -> Outcome:
        """Run `command` as a server and, once that listens on TCP `port`, a client; `timeout` s for both."""
        end = time.monotonic() + timeout * (1.5 if sanitized() else 1)
        with _ended(self._start(0, [*command, *server])) as first:
            self._wait_for_listener(first, port, end)
            with _ended(self._start(1, [*command, *client, ADDRESSES[0]])) as second:
                return Outcome(client=_finish(second, end), server=_finish(first, end))

    def _start(self, end: int, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.names()[end]}", "env", *self._settings(end), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _settings(self, end: int) -> list[str]:
        environment = self.preload.environment(ADDRESSES[end], MIGROCE_IFACE="veth")
        which = "MIGROCE_IFACE" if self.by_interface else "MIGROCE_ADDR"
        return [f"{name}={environment[name]}" for name in ("LD_PRELOAD", which, "MIGROCE_AGENT")]

    def _wait_for_listener(self, process: subprocess.Popen[str], port: int, end: float) -> None:
        """Until /proc/net/tcp of the server's namespace shows the port: no connection is made."""
        while time.monotonic() < end and process.poll() is None:
            if listens(port, of=process.pid):
                return
            time.sleep(0.01)
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the server does not listen on {port}: {out}{err}")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone, and its pipes closed, when the block is left."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _finish(process: subprocess.Popen[str], end: float) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\n[killed: out of time]"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)
