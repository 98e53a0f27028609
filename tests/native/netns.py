# SPDX-License-Identifier: BSD-3-Clause
"""Two network namespaces joined by a veth pair; everything goes when the block ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from migroce.agent import netns

T = TypeVar("T")


def ip(*args: str) -> None:
    """Run ip(8); CalledProcessError when it fails."""
    subprocess.run(["ip", *args], check=True, capture_output=True)


@dataclass(frozen=True, slots=True)
class Node:
    """One namespace with one interface that is up."""

    netns: str
    iface: str
    address: str

    @property
    def path(self) -> Path:
        """Where the namespace is mounted."""
        return Path("/run/netns") / self.netns

    @property
    def gid(self) -> bytes:
        """The address as an IPv4-mapped GID."""
        return bytes(10) + b"\xff\xff" + bytes(map(int, self.address.split(".")))

    def command(self, *argv: str) -> list[str]:
        """`argv` so that it runs in here."""
        return ["nsenter", f"--net={self.path}", *argv]

    def call(self, function: Callable[[], T]) -> T:
        """The function's result, run in a thread of its own in here."""
        fd = netns.open_path(str(self.path))
        try:
            return netns.run_in(fd, function)
        finally:
            os.close(fd)


@contextlib.contextmanager
def pair(name: str, mtu: int = 9000) -> Iterator[tuple[Node, Node]]:
    """Nodes a (10.9.0.1) and b (10.9.0.2); `name` tells them from others on the machine."""
    a = Node(f"{name}a", "va", "10.9.0.1")
    b = Node(f"{name}b", "vb", "10.9.0.2")
    with contextlib.ExitStack() as stack:
        for node in (a, b):
            ip("netns", "add", node.netns)
            stack.callback(ip, "netns", "del", node.netns)
        ip("-n", a.netns, "link", "add", a.iface, "mtu", str(mtu), "type", "veth",
           "peer", "name", b.iface, "netns", b.netns, "mtu", str(mtu))
        for node in (a, b):
            ip("-n", node.netns, "addr", "add", f"{node.address}/24", "dev", node.iface)
            ip("-n", node.netns, "link", "set", "lo", "up")
            ip("-n", node.netns, "link", "set", node.iface, "up")
        yield a, b
