# SPDX-License-Identifier: BSD-3-Clause
"""ibv_asyncwatch sees what happens to the interface, and nothing of a stop that changes none of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest

from migroce import paths
from migroce.agent.sockets import make_udp
from migroce.control import HELLO_FURTHER, Addresses, HelloState, Sockets

from .fakeagent import FakeAgent, sockets_for, until
from .netns import Node, ip, pair

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not which("ibv_asyncwatch"), reason="needs ibverbs-utils"),
]


@pytest.fixture
def two() -> Iterator[tuple[Node, Node]]:
    """Namespaces of the test's own: their interfaces go down."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    with pair(f"mgw{os.getpid()}") as found:
        plugged(found[0], True)
        yield found


def link(node: Node, state: str) -> None:
    ip("-n", node.netns, "link", "set", node.iface, state)


def plugged(node: Node, expected: bool) -> None:
    """Wait until the interface has, or has not, noticed its other end (the kernel takes up to a second)."""
    flag = "LOWER_UP" if expected else "NO-CARRIER"
    show = ["ip", "-n", node.netns, "link", "show", node.iface]
    until(flag, lambda: flag in subprocess.run(show, check=True, capture_output=True, text=True).stdout)


@dataclass(frozen=True, slots=True)
class Watch:
    """A running ibv_asyncwatch."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def event(self) -> str:
        """The next event's name."""
        return self.line().split()[1].removeprefix("IBV_EVENT_")


@contextlib.contextmanager
def watching(node: Node, agent: str, *, by_interface: bool = False) -> Iterator[Watch]:
    libraries = [os.environ.get("MIGROCE_SANITIZER_RUNTIME", ""), str(paths.library())]
    env = {
        "LD_PRELOAD": ":".join(filter(None, libraries)),
        "MIGROCE_AGENT": agent,
        **({"MIGROCE_IFACE": node.iface} if by_interface else {"MIGROCE_ADDR": node.address}),
    }
    command = node.command("env", *(f"{k}={v}" for k, v in env.items()), "ibv_asyncwatch")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Watch(process)
        finally:
            process.kill()


def test_a_program_that_waits_is_told(two: tuple[Node, Node]) -> None:
    node = two[0]
    with watching(node, "") as watch:
        assert "async event FD" in watch.line()
        link(node, "down")
        assert watch.event() == "PORT_ERR"
        link(node, "up")
        assert watch.event() == "PORT_ACTIVE"
        ip("-n", node.netns, "address", "add", "fd97::1/64", "dev", node.iface, "nodad")
        assert watch.event() == "GID_CHANGE"
        ip("-n", node.netns, "address", "del", "fd97::1/64", "dev", node.iface)
        assert watch.event() == "GID_CHANGE"


class Stopping:
    """ibv_asyncwatch under an agent that stops and resumes it."""

    def __init__(self, node: Node, directory: Path, stack: contextlib.ExitStack) -> None:
        self._node, self._stack = node, stack
        self._agent = stack.enter_context(FakeAgent(directory))
        self._socks = stack.enter_context(sockets_for(node))
        self.watch = stack.enter_context(watching(node, str(self._agent.path)))
        self._link, hello = self._agent.accept(HelloState.FRESH)
        stack.enter_context(self._link)
        self._link.welcome(hello, node, self._socks)
        assert "async event FD" in self.watch.line()

    def stop_and_resume(self, meanwhile: Callable[[], None]) -> None:
        """Both done when it returns."""
        self._agent.vanish()
        self._link.stop()
        meanwhile()
        self._agent.listen()
        self._link, hello = self._agent.accept(HelloState.STOPPED)
        self._stack.enter_context(self._link)
        self._link.welcome(hello, self._node, self._socks)
        assert self._link.resumed().status == 0


@pytest.fixture
def stopping(two: tuple[Node, Node], tmp_path: Path) -> Iterator[Stopping]:
    with contextlib.ExitStack() as stack:
        yield Stopping(two[0], tmp_path, stack)


def unplug(two: tuple[Node, Node]) -> None:
    link(two[1], "down")
    plugged(two[0], False)


def test_a_stop_is_no_event_but_what_has_changed_in_it_is(two: tuple[Node, Node], stopping: Stopping) -> None:
    node = two[0]
    stopping.stop_and_resume(lambda: None)
    stopping.stop_and_resume(
        lambda: ip("-n", node.netns, "address", "add", "fd97::1/64", "dev", node.iface, "nodad")
    )
    assert stopping.watch.event() == "GID_CHANGE"
    link(node, "down")
    assert stopping.watch.event() == "PORT_ERR"


def test_a_port_that_is_plugged_in_after_the_move_has_not_failed(
    two: tuple[Node, Node], stopping: Stopping
) -> None:
    node, peer = two
    stopping.stop_and_resume(lambda: unplug(two))
    link(peer, "up")
    plugged(node, True)
    ip("-n", node.netns, "address", "add", "fd97::1/64", "dev", node.iface, "nodad")
    assert stopping.watch.event() == "GID_CHANGE"


def test_a_port_that_stays_unplugged_has(two: tuple[Node, Node], stopping: Stopping) -> None:
    stopping.stop_and_resume(lambda: unplug(two))
    assert stopping.watch.event() == "PORT_ERR"
    link(two[1], "up")
    assert stopping.watch.event() == "PORT_ACTIVE"


def further(node: Node, text: str) -> socket.socket:
    """A socket as the agent makes it."""
    return node.call(lambda: make_udp(socket.AF_INET, socket.inet_aton(text), freebind=False))


def test_further_addresses_are_asked_for_and_those_that_come_are_gids(
    two: tuple[Node, Node], tmp_path: Path
) -> None:
    node, second = two[0], "10.9.1.1"
    gid = bytes(10) + b"\xff\xff" + socket.inet_aton(second)
    with FakeAgent(tmp_path) as agent, sockets_for(node) as socks, \
            watching(node, str(agent.path), by_interface=True) as watch:  # fmt: skip
        link, hello = agent.accept(HelloState.FRESH)
        with link:
            assert hello.flags == HELLO_FURTHER
            link.welcome(hello, node, socks)
            assert "async event FD" in watch.line()
            ip("-n", node.netns, "address", "add", f"{second}/24", "dev", node.iface)
            assert link.receive(Addresses).gids == ()
            with further(node, second) as sock, further(node, "127.0.0.9") as other, \
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unbound:  # fmt: skip
                # What it has already, what is no socket of the interface's, and what is none at all.
                sent = [socks[0], other, unbound, sock, sock]
                link.send(Sockets(0, len(sent)), fds=[s.fileno() for s in sent])
                assert watch.event() == "GID_CHANGE"
                ip("-n", node.netns, "address", "add", "fd97::1/64", "dev", node.iface, "nodad")
                assert watch.event() == "GID_CHANGE"
                agent.vanish()
                link.stop()
                agent.listen()
                again, hello = agent.accept(HelloState.STOPPED)
                with again:
                    assert hello.flags == HELLO_FURTHER
                    again.welcome(hello, node, [*socks, sock])
                    assert again.resumed().status == 0
                    ip("-n", node.netns, "address", "add", "10.9.2.1/24", "dev", node.iface)
                    assert again.receive(Addresses).gids == (gid,)
                    ip("-n", node.netns, "address", "del", f"{second}/24", "dev", node.iface)
                    assert watch.event() == "GID_CHANGE"
                    assert again.receive(Addresses).gids == ()
                    again.send(Sockets(0, 2))  # without the descriptors
                    again.wait_end()
                    back, hello = agent.accept(HelloState.RUNNING)
                    with back:
                        assert len(back.fds) == len(socks)
