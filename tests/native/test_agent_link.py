# SPDX-License-Identifier: BSD-3-Clause
"""The library's side of the control protocol: open, stop, resume, and every way the agent can fail."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from migroce import control
from migroce.agent.standin import StandIn
from migroce.control import Hello, HelloState, Stop, Stopped, Welcome
from migroce.wire import Op, parse

from .fakeagent import WAIT, FakeAgent, Link, sockets_for, steer, udp_sockets, until
from .netns import Node
from .tool import Tool, ToolError, both, connect, connect_twin

pytestmark = pytest.mark.root


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    """An agent that listens."""
    with FakeAgent(tmp_path) as found:
        yield found


@contextlib.contextmanager
def opened(agent: FakeAgent, node: Node, socks: list[socket.socket], slot: int = 0,
           ) -> Iterator[tuple[Tool, Link]]:
    """A tool that has its device from the agent."""
    with Tool(node, MIGROCE_AGENT=str(agent.path)) as tool:
        link, hello = agent.accept(HelloState.FRESH)
        with link:
            link.welcome(hello, node, socks, slot)
            assert tool.ready.qpn >> control.SLOT_SHIFT == slot
            yield tool, link


def udp_inodes(tool: Tool) -> set[str]:
    """The sockets a process has open."""
    return {d for d in tool.descriptors() if d.startswith("socket:")}


def inodes(socks: list[socket.socket]) -> set[str]:
    return {f"socket:[{os.fstat(s.fileno()).st_ino}]" for s in socks}


def test_hello_says_who_comes_and_the_device_is_made_of_the_welcome(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, Tool(nodes[0], MIGROCE_AGENT=str(agent.path)) as tool:
        link, hello = agent.accept(HelloState.FRESH)
        with link:
            assert hello.comm == "mgtool"
            assert hello.pid == tool.pid
            assert hello.slot == control.NO_SLOT
            assert hello.gid == nodes[0].gid
            assert any(hello.instance)
            link.welcome(hello, nodes[0], socks, slot=5)
            assert tool.ready.qpn >> control.SLOT_SHIFT == 5
            assert inodes(socks) < udp_inodes(tool)
            assert len(udp_inodes(tool)) == 4  # the agent's, the interface's changes, two of UDP
            assert tool.quit() == 0
            link.wait_end()


def test_sockets_bound_to_no_address_work_too(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    socks = udp_sockets(nodes[0], wild=True)
    with opened(agent, nodes[0], socks) as (a, _), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 100 10000", "both 100 10000")
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("busy", ["", "spin 1"], ids=["idle", "polling"])
def test_a_process_is_stopped_and_goes_on_as_if_nothing_had_been(
        agent: FakeAgent, nodes: tuple[Node, Node], busy: str) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 100 10000", "both 100 10000")
        if busy:
            a(busy)
        agent.vanish()
        dump = link.stop()
        assert [qp.qpn for qp in dump.qps] == [a.ready.qpn]
        assert dump.qps[0].peer_capable
        assert udp_inodes(a) == set()
        assert not any("memfd" in d for d in a.descriptors())
        agent.listen()
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            assert hello.qpn_base == 0
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
            if busy:
                a("spin 0")
            both(a, b, "both 100 10000", "both 100 10000")


@pytest.mark.parametrize(
    ("meanwhile", "then"),
    [([], range(3000, 3601)), (["alarm 0"], [0]), (["alarm 50"], range(1, 51))],
    ids=["left alone", "ended", "set anew"],
)
def test_an_alarm_stands_still_from_stop_to_resume(
        agent: FakeAgent, nodes: tuple[Node, Node], meanwhile: list[str], then: Container[int]) -> None:
    """CRIU loses one that goes off while it dumps; what the program does about its alarm meanwhile counts."""
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link):
        assert a("alarm 3600") == ["before", "0"]
        agent.vanish()
        link.stop()
        assert a("left") == ["left", "0"]
        for command in meanwhile:
            a(command)
        agent.listen()
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
            assert int(a("left")[1]) in then


def test_an_alarm_goes_on_when_no_agent_comes(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link):
        a("alarm 3600")
        agent.vanish()
        link.stop()
        assert a("left") == ["left", "0"]
        until("its alarm", lambda: a("left") != ["left", "0"])


@pytest.mark.parametrize("end", ["quit", "exit"])
def test_a_program_that_closes_while_it_is_stopped_comes_back_first(
        agent: FakeAgent, nodes: tuple[Node, Node], end: str) -> None:
    """Where it goes on the agent waits for it: a move at a program's end failed."""
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link):
        agent.vanish()
        link.stop()
        a.put(end)
        agent.listen()
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
            again.wait_end()
        assert a.process.wait(WAIT) == 0


@pytest.mark.parametrize("end", ["quit", "exit"])
def test_one_that_nobody_moves_is_closed_though_it_is_stopped(
        agent: FakeAgent, nodes: tuple[Node, Node], end: str) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link):
        agent.vanish()
        link.stop()
        a.put(end)
        assert a.process.wait(WAIT) == 0


def test_a_peer_with_nothing_under_way_is_told_unasked_and_waits_when_it_has(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    """Nobody answers it from then on, for longer than its retries last (8 times 268 ms)."""
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b, timeout=16)
        until("the peer is known", lambda: link.live_dump().qps[0].peer_capable)
        agent.vanish()
        (reply,) = StandIn([link.stop()]).announce()
        socks[0].sendto(reply.data, (nodes[1].address, reply.dst_port))
        until("b has heard it", lambda: b.counters()["nak_stopped_rx"])
        b.put("both 1 1000")
        # Probes after 20, 60, 140, 300 ms and then each 200 ms: 15 take as long as all its retries.
        heard = 0
        while heard < 15:
            assert select.select([socks[0], b.process.stdout], [], [], WAIT)[0] == [socks[0]]
            heard += parse(socks[0].recv(2048)).opcode == Op.SEND_ONLY
        agent.listen()
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
            a("both 1 1000")
            assert b.answer()[0] == "done"


def test_messages_under_way_at_the_stop_arrive_once(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    """Stopped in the middle of two-way traffic, again and again; the peer's retries bridge the gap."""
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        for tool in (a, b):
            tool.put("both 5000 20000")
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                agent.vanish()
                link.stop()
                agent.listen()
                link, hello = agent.accept(HelloState.STOPPED)
                stack.enter_context(link)
                link.welcome(hello, nodes[0], socks)
                assert link.resumed().n_qp == 1
            assert a.answer()[0] == "done"
            assert b.answer()[0] == "done"
        assert b.counters()["resumes_rx"] >= 1


def test_the_same_address_elsewhere_is_found_again(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    """New sockets and another address: peers follow the Resume."""
    a_node, b_node = nodes
    moved = Node(a_node.netns, a_node.iface, "10.9.0.99")
    with sockets_for(a_node) as socks, opened(agent, a_node, socks) as (a, link), Tool(b_node) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        agent.vanish()
        link.stop()
        with added_address(moved), sockets_for(moved) as new:
            agent.listen()
            again, hello = agent.accept(HelloState.STOPPED)
            with again:
                again.welcome(hello, moved, new)
                assert again.resumed().status == 0
                both(a, b, "both 100 1000", "both 100 1000")
                assert b.counters()["rx_bad_source"] == 0


@contextlib.contextmanager
def added_address(node: Node) -> Iterator[None]:
    """The interface carries one more address."""
    from .netns import ip

    ip("-n", node.netns, "addr", "add", f"{node.address}/24", "dev", node.iface)
    try:
        yield
    finally:
        ip("-n", node.netns, "addr", "del", f"{node.address}/24", "dev", node.iface)


def test_a_live_dump_stops_nothing(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        dump = link.live_dump()
        assert [qp.qpn for qp in dump.qps] == [a.ready.qpn]
        both(a, b, "both 10 1000", "both 10 1000")


# ---- agents that fail -------------------------------------------------------------------------


def test_without_an_agent_one_process_works_and_a_later_agent_takes_it_in(
        tmp_path: Path, nodes: tuple[Node, Node]) -> None:
    with Tool(nodes[0], MIGROCE_AGENT=str(tmp_path / "agent.sock")) as a, Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        with FakeAgent(tmp_path) as agent:
            link, hello = agent.accept(HelloState.RUNNING)
            with link:
                assert (hello.qpn_base, hello.qpn_count) == (0, 1 << 24)
                assert hello.slot == control.NO_SLOT
                assert len(link.fds) == 2
                link.welcome(hello, nodes[0], [])
                both(a, b, "both 10 1000", "both 10 1000")
                agent.vanish()
                link.stop()
                assert udp_inodes(a) == set()


def test_the_agents_death_goes_unnoticed_and_a_new_one_gets_the_sockets(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks, 3) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        link.sock.close()
        both(a, b, "both 10 1000", "both 10 1000")
        again, hello = agent.accept(HelloState.RUNNING)
        with again:
            assert hello.slot == 3
            assert {os.fstat(fd).st_ino for fd in again.fds} == {os.fstat(s.fileno()).st_ino for s in socks}
            again.welcome(hello, nodes[0], [], slot=3)
            assert [qp.qpn for qp in again.live_dump().qps] == [a.ready.qpn]
            both(a, b, "both 10 1000", "both 10 1000")


def test_an_agent_that_dies_while_stopping_leaves_the_process_running(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    """It has asked to stop and is gone before the answer: nobody would resume the process."""
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        link.sock.shutdown(socket.SHUT_RD)  # it will not hear the answer
        link.send(Stop(0, 0))
        link.sock.close()
        both(a, b, "both 100 1000", "both 100 1000")
        again, hello = agent.accept(HelloState.RUNNING)
        with again:
            again.welcome(hello, nodes[0], [])
            both(a, b, "both 100 1000", "both 100 1000")


def test_an_agent_that_refuses_to_resume_is_asked_again(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        both(a, b, "both 10 1000", "both 10 1000")
        link.stop()
        for answer in (Welcome(11), Welcome(0, 0, 1 << 18, 1 << 18), None):
            again, hello = agent.accept(HelloState.STOPPED)
            with again:
                if answer:
                    again.send(answer)
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
            both(a, b, "both 10 1000", "both 10 1000")


def test_unusable_sockets_at_resume_are_reported_and_the_process_waits_on(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        link.stop()
        again, hello = agent.accept(HelloState.STOPPED)
        with again, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong:
            again.welcome(hello, nodes[0], [wrong])
            assert again.resumed().status == 22
        again, hello = agent.accept(HelloState.STOPPED)
        with again:
            again.welcome(hello, nodes[0], socks)
            assert again.resumed().status == 0
        both(a, b, "both 10 1000", "both 10 1000")


@pytest.mark.parametrize("message", [
    b"", b"MGR1", b"\0" * 64,
    control.encode(Stop(0, 100))[:-1],
    control.encode(Stop(0, 100)) + b"more than it says",
    control.encode(Hello(bytes(16), 0, 0)).replace(b"MGR1", b"MGR2"),
    b"MGR1" + b"\xff" * 4092,
])
def test_nonsense_ends_the_connection_and_nothing_else(
        agent: FakeAgent, nodes: tuple[Node, Node], message: bytes) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        if message:
            link.sock.send(message)
            link.wait_end()
        both(a, b, "both 10 1000", "both 10 1000")


def test_unknown_messages_and_stray_descriptors_do_not_matter(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with sockets_for(nodes[0]) as socks, opened(agent, nodes[0], socks) as (a, link), Tool(nodes[1]) as b:
        connect(a, b)
        before = len(a.descriptors())
        unknown = bytearray(control.encode(Stop(0, 100)))
        unknown[4] = 99
        socket.send_fds(link.sock, [bytes(unknown)], [s.fileno() for s in socks])
        link.welcome(Hello(bytes(16), 0, HelloState.FRESH), nodes[0], socks)
        link.send(Stopped(0, 0, 0))
        assert [qp.qpn for qp in link.live_dump().qps] == [a.ready.qpn]
        until("the descriptors are closed", lambda: len(a.descriptors()) == before)
        both(a, b, "both 10 1000", "both 10 1000")


def test_an_agent_that_refuses_is_named_with_its_reason(agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with Tool(nodes[0], MIGROCE_AGENT=str(agent.path)) as a:
        link, _ = agent.accept(HelloState.FRESH)
        with link:
            link.send(Welcome(28))
            with pytest.raises(ToolError, match="No space left"):
                a.answer()
        assert f"{agent.path} gives no device: No space left" in a.errors()


# ---- several processes behind one address ---------------------------------------------------------


def test_processes_share_an_address_by_the_top_bits_of_their_qpns(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with contextlib.ExitStack() as stack:
        groups = []
        for _ in range(3):
            groups.append(udp_sockets(nodes[0], ipv6=False))
            stack.callback(groups[-1][0].close)
        steer([g[0] for g in groups])
        left = [stack.enter_context(opened(agent, nodes[0], g, slot))[0] for slot, g in enumerate(groups)]
        # All three talk to one process each behind the other address, in the other order.
        others = [udp_sockets(nodes[1], ipv6=False) for _ in range(3)]
        for g in others:
            stack.callback(g[0].close)
        steer([g[0] for g in others])
        right = [stack.enter_context(opened(agent, nodes[1], g, slot))[0] for slot, g in enumerate(others)]
        for a, b in zip(left, reversed(right), strict=True):
            connect(a, b)
        # A QP that is connected first says so to one that is not yet.
        early = [a.counters()["rx_no_qp"] for a in left + right]
        for a in left + right:
            a.put("both 300 5000")
        for a in left + right:
            assert a.answer()[0] == "done"
        assert [a.counters()["rx_no_qp"] for a in left + right] == early


@pytest.mark.parametrize("size", [8, 4000, 20000])
def test_one_process_may_send_to_several_behind_one_address(
        agent: FakeAgent, nodes: tuple[Node, Node], size: int) -> None:
    """Packets for both stand side by side in its batches; none may come to the wrong process."""
    with contextlib.ExitStack() as stack:
        groups = []
        for _ in range(2):
            groups.append(udp_sockets(nodes[0], ipv6=False))
            stack.callback(groups[-1][0].close)
        steer([g[0] for g in groups])
        left = [stack.enter_context(opened(agent, nodes[0], g, slot))[0] for slot, g in enumerate(groups)]
        b = stack.enter_context(Tool(nodes[1]))
        connect(b, left[0])
        connect_twin(b, left[1])
        early = [a.counters()["rx_no_qp"] for a in left]
        for a in left:
            a.put(f"recv 300 {size}")
        assert b(f"send 300 {size}")[:3] == ["done", "300", "0"]
        for a in left:
            assert a.answer()[0] == "done"
        assert [a.counters()["rx_no_qp"] for a in left] == early


def test_a_process_that_ends_does_not_disturb_its_neighbours(
        agent: FakeAgent, nodes: tuple[Node, Node]) -> None:
    with contextlib.ExitStack() as stack:
        groups = []
        for _ in range(2):
            groups.append(udp_sockets(nodes[0], ipv6=False))
            stack.callback(groups[-1][0].close)
        steer([g[0] for g in groups])
        first, _ = stack.enter_context(opened(agent, nodes[0], groups[0], 0))
        second, _ = stack.enter_context(opened(agent, nodes[0], groups[1], 1))
        b = stack.enter_context(Tool(nodes[1]))
        connect(second, b)
        assert first.quit() == 0
        until("the first process has ended", lambda: first.process.poll() is not None)
        both(second, b, "both 100 5000", "both 100 5000")
