# SPDX-License-Identifier: BSD-3-Clause
"""mgtool (mgtool.c) as an object: one process with one device and one QP, driven line by line."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from migroce import paths

from .netns import Node

GO_ON = 60.0
"""Seconds to wait for a process that should end by itself."""


class ToolError(Exception):
    """The tool said `error ...` or ended; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What the tool says first."""

    qpn: int
    gid: str
    rkey: int
    addr: int
    ifname: str
    mtu: int
    n_gid: int


def binary() -> Path:
    """mgtool of the build that the library under test comes from."""
    path = paths.library().parent.parent / "tests" / "native" / "mgtool"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not built: run `make build` (it needs -Ddev=true)")
    return path


class Tool:
    """A running mgtool. Calling it sends a command and returns the words of the answer."""

    def __init__(self, node: Node, **env: str) -> None:
        merged = {"MIGROCE_AGENT": "", **os.environ, **env}
        self.process = subprocess.Popen(node.command(str(binary())), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=merged)
        self._pending: Ready | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    @property
    def ready(self) -> Ready:
        """What it opened; ToolError when it could not."""
        if self._pending is None:
            word, qpn, gid, rkey, addr, ifname, mtu, n_gid = self.answer()
            assert word == "ready"
            self._pending = Ready(int(qpn), gid, int(rkey), int(addr), ifname, int(mtu), int(n_gid))
        return self._pending

    def put(self, command: str) -> None:
        """Send a command without waiting for its answer."""
        self._stdin.write(command + "\n")
        self._stdin.flush()

    def answer(self) -> list[str]:
        """The next answer's words; ToolError when it is an error."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line or line.startswith("error"):
            raise ToolError(line.strip() or f"ended: {self.errors()}")
        return line.split()

    def __call__(self, command: str) -> list[str]:
        self.put(command)
        return self.answer()

    def counters(self) -> dict[str, int]:
        """The engine's counters by name."""
        return {k: int(v) for k, v in (word.split("=") for word in self("counters")[1:])}

    def errors(self) -> str:
        """What an ended process wrote to stderr."""
        self._stdin.close()
        self.process.wait(GO_ON)
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def quit(self) -> int:
        """Close the device; the exit status."""
        assert self("quit") == ["closed"]
        return self.process.wait(GO_ON)

    def descriptors(self) -> list[str]:
        """What its open descriptors are: socket:[1], anon_inode:[eventfd], ..."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if int(fd.name) > 2:
                    found.append(str(fd.readlink()))
        return found

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin


def connect(a: Tool, b: Tool, mtu: int = 4096, psn: int = 0xFFFFF0, timeout: int = 18) -> None:
    """Bring both QPs to RTS. The PSNs start shortly before they wrap.

    `timeout` is IBA's, 4.096 us * 2^timeout; a machine under load or a sanitizer is no reason to fail.
    """
    for tool, other, mine, theirs in ((a, b, psn, psn - 100), (b, a, psn - 100, psn)):
        r = other.ready
        tool.put(f"connect {r.qpn} {r.gid} {r.rkey} {r.addr} {mine} {theirs} {mtu} {timeout}")
    assert a.answer() == b.answer() == ["connected"]


def connect_twin(a: Tool, b: Tool, mtu: int = 4096) -> None:
    """Give `a` a second QP, connected to b's: what it sends goes to both."""
    qpn, r, mine = a("twin")[1], b.ready, a.ready
    a.put(f"connect-twin {r.qpn} {r.gid} {r.rkey} {r.addr} 5 6 {mtu} 18")
    b.put(f"connect {qpn} {mine.gid} {mine.rkey} {mine.addr} 6 5 {mtu} 18")
    assert a.answer() == b.answer() == ["connected"]


def both(a: Tool, b: Tool, command_a: str, command_b: str) -> None:
    """Run a command on each at the same time."""
    a.put(command_a)
    b.put(command_b)
    a.answer()
    b.answer()


@contextlib.contextmanager
def connected(a: Node, b: Node, mtu: int = 4096, timeout: int = 18, env: dict[str, str] | None = None,
              ) -> Iterator[tuple[Tool, Tool]]:
    """Two tools without agents, connected."""
    with Tool(a, **env or {}) as left, Tool(b, **env or {}) as right:
        connect(left, right, mtu, timeout=timeout)
        yield left, right
