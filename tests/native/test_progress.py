# SPDX-License-Identifier: BSD-3-Clause
"""The progress thread: it serves when nobody polls, and nobody else's business suffers by it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .netns import Node
from .tool import GO_ON, Tool, ToolError, both, connect, connected

pytestmark = pytest.mark.root
not_under_tsan = pytest.mark.skipif(os.environ.get("MIGROCE_SANITIZER") == "tsan",
                                    reason="TSan has a thread of its own and no threads after a fork")


@pytest.fixture
def duo(nodes: tuple[Node, Node]) -> Iterator[tuple[Tool, Tool]]:
    """Two connected devices."""
    with connected(*nodes) as tools:
        yield tools


def test_one_sided_requests_are_served_while_the_application_does_nothing(duo: tuple[Tool, Tool]) -> None:
    a, b = duo
    b("fill 60000")
    a("fill 60000")
    assert a("write 1 60000")[0] == "done"
    assert b("check 60000") == ["same"]
    assert a("read 1 60000")[0] == "done"
    assert a("check 60000") == ["same"]


@pytest.mark.skipif("MIGROCE_SANITIZER" in os.environ, reason="slower posts than those it is about")
@pytest.mark.parametrize(("size", "sleepy", "counts"), [(65536, 0, 1), (1000, 0, 0), (65536, 1, 0)],
                         ids=["bulk", "small messages", "before a sleep"])
def test_posting_bulk_data_counts_as_polling(
    duo: tuple[Tool, Tool], size: int, sleepy: int, counts: int
) -> None:
    """The progress thread keeps out of the way of who is in the library all the time anyhow."""
    a, _ = duo
    said = []
    for _ in range(100 if counts else 1):  # "in a row" means within 50 us: a busy machine may take longer
        said.append(a(f"bulk 100 {size} {sleepy}"))
        assert a.answer() == ["done"]
        if said[-1] == ["counts", "1"]:
            break
    assert said[-1] == ["counts", str(counts)]


def test_a_completion_event_comes_without_polling(duo: tuple[Tool, Tool]) -> None:
    a, b = duo
    assert b("event 100") == ["armed"]
    a("send 1 100")
    assert b.answer() == ["event", "1", "0"]


def test_a_peer_may_spin_while_messages_go_both_ways(duo: tuple[Tool, Tool]) -> None:
    """A second thread that polls all the time: the lock is shared, nothing is lost."""
    a, b = duo
    a("spin 1")
    b("spin 1")
    both(a, b, "both 200 5000", "both 200 5000")
    a("spin 0")
    b("spin 0")
    both(a, b, "both 200 5000", "both 200 5000")


@not_under_tsan
def test_the_application_gets_its_signals_itself(duo: tuple[Tool, Tool]) -> None:
    a, _ = duo
    a("counters")
    blocked = {}
    for task in Path(f"/proc/{a.pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        blocked[status["Name"]] = int(status["SigBlk"], 16)
    assert blocked.pop("migroce") & 1 << (signal.SIGTERM - 1)
    assert not any(mask & 1 << (signal.SIGTERM - 1) for mask in blocked.values())
    os.kill(a.pid, signal.SIGTERM)
    assert a.process.wait(GO_ON) == -signal.SIGTERM


def test_a_forked_child_holds_no_socket_and_is_refused(duo: tuple[Tool, Tool]) -> None:
    a, b = duo
    assert a("fork") == ["child", "0"]
    both(a, b, "both 100 1000", "both 100 1000")


@not_under_tsan
def test_a_forked_child_can_open_a_device_of_its_own(nodes: tuple[Node, Node]) -> None:
    """With another address: the parent keeps its port."""
    with Tool(nodes[0]) as a:
        assert a.ready.qpn
        assert a("childopen 127.0.0.1") == ["child", "0"]


def test_who_exits_without_closing_has_acknowledged_all_it_got(nodes: tuple[Node, Node]) -> None:
    with connected(*nodes) as (a, b):
        b.put("recv 50 100")
        b.put("exit")
        assert a("send 50 100")[:3] == ["done", "50", "0"]
        assert b.answer()[0] == "done"
        assert b.process.wait(GO_ON) == 0


def test_closing_and_ending_leaves_no_thread_waiting(duo: tuple[Tool, Tool]) -> None:
    a, b = duo
    assert a.quit() == 0
    assert b.quit() == 0


def test_who_comes_second_to_an_address_is_told_why_it_fails(nodes: tuple[Node, Node]) -> None:
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(Tool(nodes[0])).ready.ifname == "va"
        second = stack.enter_context(Tool(nodes[0]))
        with pytest.raises(ToolError, match="Address already in use"):
            second.answer()
        said = second.errors()
        assert "4791" in said
        assert "10.9.0.1" in said
        assert "migroce agent" in said


def test_the_address_can_be_chosen(nodes: tuple[Node, Node]) -> None:
    with Tool(nodes[0], MIGROCE_ADDR="127.0.0.7") as a, Tool(nodes[0], MIGROCE_IFACE="lo") as b:
        assert a.ready.gid.endswith("ffff7f000007")
        assert b.ready.gid.endswith("ffff7f000001")
        assert a.ready.ifname == b.ready.ifname == "lo"
        connect(a, b)
        both(a, b, "both 100 65536", "both 100 65536")


@pytest.mark.parametrize(("env", "said"), [
    ({"MIGROCE_ADDR": "10.1.2.3"}, "not an address of this machine"),
    ({"MIGROCE_ADDR": "here"}, "no IP address"),
    ({"MIGROCE_IFACE": "eth9"}, "no such interface"),
])
def test_a_choice_that_cannot_be_is_named(nodes: tuple[Node, Node], env: dict[str, str], said: str) -> None:
    with Tool(nodes[0], **env) as a:
        with pytest.raises(ToolError):
            a.answer()
        assert said in a.errors()
