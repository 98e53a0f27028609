# SPDX-License-Identifier: BSD-3-Clause
"""Processes and an agent: slots, steering, stop, resume, undo, and what happens when somebody dies."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from migroce import dump as d
from migroce.agent.client import AgentError
from migroce.control import SLOT_SHIFT
from migroce.wire import Op, parse

from .rawlib import RawLib
from .rig import Agent, Fake, Peer, Wires, eventually, unix_sockets

Fakes = Callable[..., Fake]
Peers = Callable[..., Peer]


def contexts(agent: Agent, container: str) -> list[dict[str, object]]:
    found = [c for c in agent.client.status()["containers"] if c["id"] == container]
    return list(found[0]["contexts"]) if found else []


def received(fake: Fake) -> int:
    """The QPN of the packet it gets next."""
    return int(fake.expect("udp")["hex"][10:16], 16)


def knock(peer: Peer, qpn: int) -> None:
    peer.send(peer.packet(Op.SEND_ONLY, qpn, 0))


def container(agent: Agent, wires: Wires, name: str = "c1") -> Path:
    return agent.client.container_add(name, netns=wires.path(wires.a), gid=Wires.A) / "agent.sock"


def test_a_process_gets_a_slot_and_a_bound_socket(agent: Agent, wires: Wires, start_fake: Fakes) -> None:
    got = start_fake(container(agent, wires)).expect("welcome")
    assert (got["slot"], got["base"], got["count"], got["gid"]) == (0, 0, 1 << 18, Wires.A)
    assert got["bound"] == [[Wires.A, 4791], ["::", 4791]]
    assert [c["comm"] for c in contexts(agent, "c1")] == ["fake"]


def test_packets_reach_the_process_that_has_the_qpn(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    sock = container(agent, wires)
    fakes = []
    for slot in range(5):
        fakes.append(start_fake(sock))
        assert fakes[slot].expect("welcome")["slot"] == slot
    peer, peer6 = start_peer(), start_peer("fd07::2", "fd07::1")
    for slot in (3, 0, 4, 1, 2):
        for p in (peer, peer6):
            knock(p, (slot << SLOT_SHIFT) + 17)
            assert received(fakes[slot]) == (slot << SLOT_SHIFT) + 17
    assert all(f.quiet() for f in fakes)


def test_steering_follows_when_processes_come_and_go(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    sock = container(agent, wires)
    fakes = {}
    for slot in range(5):
        fakes[slot] = start_fake(sock)
        fakes[slot].expect("welcome")
    peer = start_peer()
    for victim in (1, 3, 0):
        fakes.pop(victim).kill()
        eventually(lambda: len(contexts(agent, "c1")) == len(fakes))
        for slot, fake in fakes.items():
            knock(peer, slot << SLOT_SHIFT | 5)
            assert received(fake) == slot << SLOT_SHIFT | 5
    fakes[0] = start_fake(sock)
    assert fakes[0].expect("welcome")["slot"] == 0
    for slot, fake in fakes.items():
        knock(peer, slot << SLOT_SHIFT | 6)
        assert received(fake) == slot << SLOT_SHIFT | 6


def test_steering_goes_on_right_when_a_forked_child_keeps_the_socket(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    sock = container(agent, wires)
    fakes = [start_fake(sock) for _ in range(1)]
    fakes[0].expect("welcome")
    for _ in range(2):
        fakes.append(start_fake(sock))
        fakes[-1].expect("welcome")
    peer = start_peer()
    fakes[0].tell("fork")
    child = fakes[0].expect("forked")["pid"]
    try:
        fakes[0].kill()
        eventually(lambda: len(contexts(agent, "c1")) == 2)
        for slot in (1, 2):
            knock(peer, slot << SLOT_SHIFT | 5)
            assert received(fakes[slot]) == slot << SLOT_SHIFT | 5
    finally:
        os.kill(child, signal.SIGKILL)

    def steered() -> bool:  # the agent looks for such sockets each second
        for slot in (1, 2):
            knock(peer, slot << SLOT_SHIFT | 5)
        return all(not fakes[s].quiet() and received(fakes[s]) >> SLOT_SHIFT == s for s in (1, 2))

    eventually(steered)


def test_when_the_slots_are_used_up_the_next_process_is_told(agent: Agent, wires: Wires) -> None:
    agent.client.container_add("c1", netns=wires.path(wires.a))
    libs = [RawLib(agent.run_dir / "c/c1/agent.sock") for _ in range(64)]
    assert [lib.hello().slot for lib in libs] == list(range(64))
    extra = RawLib(agent.run_dir / "c/c1/agent.sock")
    assert extra.hello().status == errno.ENOSPC
    for lib in [*libs, extra]:
        lib.close()
    eventually(lambda: not contexts(agent, "c1"))


def test_processes_without_a_container_share_the_port(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    fakes = [start_fake(agent.run_dir / "agent.sock", wires=wires) for _ in range(2)]
    slots = [f.expect("welcome")["slot"] for f in fakes]
    assert sorted(slots) == [0, 1]
    peer = start_peer()
    for fake, slot in zip(fakes, slots, strict=True):
        knock(peer, slot << SLOT_SHIFT | 9)
        assert received(fake) == slot << SLOT_SHIFT | 9
    assert [c["id"] for c in agent.client.status()["containers"]] == ["host"]
    for fake in fakes:
        fake.close()
    eventually(lambda: not agent.client.status()["containers"])


def test_stop_gives_the_dumps_and_resume_the_same_ids(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path, start_peer: Peers
) -> None:
    sock = container(agent, wires)
    first, second = start_fake(sock, "0x11", "0x12"), start_fake(sock, "5")
    bases = {f: f.expect("welcome")["base"] for f in (first, second)}
    events: list[dict[str, object]] = []
    got = agent.client.container_stop("c1", tmp_path / "d", on_event=events.append)
    assert (got["contexts"], got["qps"]) == (2, 3)
    assert {e["event"] for e in events} == {"stopped"}
    assert not sock.exists()
    for name in got["dumps"]:
        dump = d.read(name)
        assert dump.stopped
        assert Path(name).name == f"rdma-{dump.context.slot}.dump"
        assert Path(name).stat().st_mode & 0o777 == 0o600
    for fake in (first, second):
        fake.expect("stop")
        fake.expect("stopped")
    got = agent.client.container_resume("c1")
    assert (got["contexts"], got["qps"]) == (2, 3)
    peer = start_peer()
    for fake in (first, second):
        again = fake.expect("welcome")
        assert (again["was"], again["base"]) == (1, bases[fake])
        knock(peer, again["base"] + 5)
        assert received(fake) == again["base"] + 5
    assert agent.client.container_resume("c1")["contexts"] == 2  # idempotent
    assert not (agent.run_dir / "stopped" / "c1").exists()


def test_a_container_is_stopped_ten_times(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    fake = start_fake(container(agent, wires), "1")
    fake.expect("welcome")
    for _ in range(10):
        agent.client.container_stop("c1", tmp_path / "d")
        assert agent.client.container_resume("c1")["qps"] == 1
        assert fake.until("welcome")["was"] == 1


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("never", "did not stop within"),
        ("fails", "could not stop: Input/output error"),
        ("garbage", "could not be stopped: its connection a message starts with"),
        ("baddump", "the dump is damaged"),
        ("short", "bytes for a dump of"),
        ("pipe", "cannot be read"),
        ("live", "sent a live snapshot"),
    ],
)
def test_when_one_process_cannot_stop_all_go_on(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path, start_peer: Peers, how: str, says: str
) -> None:
    sock = container(agent, wires)
    good = start_fake(sock, "1")
    slot = good.expect("welcome")["slot"]
    bad = start_fake(sock, "1", "--stop", how)
    bad.expect("welcome")
    with pytest.raises(AgentError, match=says):
        agent.client.container_stop("c1", tmp_path / "d", timeout_ms=300)
    assert good.until("welcome")["slot"] == slot
    eventually(lambda: all(c["state"] == "running" and c["connected"] for c in contexts(agent, "c1")))
    assert agent.client.status()["containers"][0]["state"] == "running"
    peer = start_peer()
    for fake, at in ((good, slot), (bad, 1)):
        knock(peer, at << SLOT_SHIFT | 7)
        assert int(fake.until("udp")["hex"][10:16], 16) == at << SLOT_SHIFT | 7


def test_a_process_that_dies_while_it_is_stopped_does_not_hinder_the_stop(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    sock = container(agent, wires)
    start_fake(sock, "1").expect("welcome")
    start_fake(sock, "1", "--stop", "dies").expect("welcome")
    assert agent.client.container_stop("c1", tmp_path / "d")["contexts"] == 1
    assert agent.client.container_resume("c1")["contexts"] == 1


def test_a_full_disk_undoes_the_stop(agent: Agent, wires: Wires, start_fake: Fakes) -> None:
    fake = start_fake(container(agent, wires), *(str(n) for n in range(2, 40)))
    fake.expect("welcome")
    with pytest.raises(AgentError, match="cannot write the dump to /dev/full") as e:
        agent.client.container_stop("c1", "/dev/full/x")
    assert e.value.errno == "ENOTDIR"
    assert fake.until("welcome")["was"] == 1


def test_a_resume_names_the_process_that_does_not_come(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    sock = container(agent, wires)
    start_fake(sock, "1").expect("welcome")
    frozen = start_fake(sock, "1", "--comm", "ib_send_bw")
    frozen.expect("welcome")
    agent.client.container_stop("c1", tmp_path / "d")
    frozen.process.send_signal(signal.SIGSTOP)
    says = r"1 of 2 processes did not come back within 0\.2 s: ib_send_bw \(pid"
    with pytest.raises(AgentError, match=says):
        agent.client.container_resume("c1", timeout_ms=200)
    frozen.process.send_signal(signal.SIGCONT)
    assert agent.client.container_resume("c1")["contexts"] == 2


def test_a_process_that_cannot_resume_yet_tries_again(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    fake = start_fake(container(agent, wires), "1", "--resume-fails", "3")
    fake.expect("welcome")
    agent.client.container_stop("c1", tmp_path / "d")
    assert agent.client.container_resume("c1")["contexts"] == 1


def test_a_container_moves_to_another_agent(
    agent: Agent, wires: Wires, start_agent: Callable[..., Agent], start_fake: Fakes, tmp_path: Path
) -> None:
    """The process is told of its new agent by a symlink here, by its new mount namespace in reality."""
    link = tmp_path / "here"
    link.symlink_to(container(agent, wires).parent)
    fake = start_fake(link / "agent.sock", "7")
    start_fake(link / "agent.sock").expect("welcome")
    slot = fake.expect("welcome")["slot"]
    dumps = agent.client.container_stop("c1", tmp_path / "d")["dumps"]
    other = start_agent()
    ready = other.client.container_prepare("c1", dumps=dumps, netns=wires.path(wires.b), gid=Wires.B)
    assert not (Path(ready["dir"]) / "agent.sock").exists()
    with pytest.raises(AgentError, match="did not come back"):
        other.client.container_resume("c1", timeout_ms=50)
    link.unlink()
    link.symlink_to(ready["dir"])
    assert other.client.container_resume("c1")["contexts"] == 2
    again = fake.until("welcome")
    assert (again["slot"], again["gid"], again["bound"][0]) == (slot, Wires.B, [Wires.B, 4791])
    agent.client.container_moved("c1", Wires.B)
    assert agent.client.container_remove("c1")
    assert not agent.client.status()["containers"]


def test_prepare_refuses_what_cannot_be_resumed(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path, start_agent: Callable[..., Agent]
) -> None:
    start_fake(container(agent, wires)).expect("welcome")
    dump = Path(agent.client.container_stop("c1", tmp_path / "d")["dumps"][0])
    other = start_agent()
    with pytest.raises(AgentError, match="two dumps are for the same slot"):
        other.client.container_prepare("c1", dumps=[dump, dump])
    dump.write_bytes(dump.read_bytes()[:-3])
    with pytest.raises(AgentError, match="truncated"):
        other.client.container_prepare("c1", dumps=[dump])
    assert not other.client.status()["containers"]
    with pytest.raises(AgentError, match="no container 'c1' is known"):
        other.client.container_resume("c1")


def test_a_new_process_can_come_while_others_resume(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    sock = container(agent, wires)
    start_fake(sock).expect("welcome")
    agent.client.container_stop("c1", tmp_path / "d")
    agent.client.container_resume("c1")
    assert start_fake(sock).expect("welcome")["slot"] == 1


def test_a_device_closed_and_opened_again_has_its_slot(
    agent: Agent, wires: Wires, start_fake: Fakes
) -> None:
    fake = start_fake(container(agent, wires))
    fake.expect("welcome")
    fake.tell("close")
    fake.expect("closed")
    eventually(lambda: not contexts(agent, "c1"))  # kept for a while, then given back
    assert start_fake(agent.run_dir / "c/c1/agent.sock").expect("welcome")["slot"] == 0


def test_ps_shows_live_and_stopped_qps(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    sock = container(agent, wires)
    start_fake(sock, "0x11", "0x12", "--peer", Wires.B).expect("welcome")
    for stopped in (False, True):
        ctx = agent.client.ps("c1")[0]["contexts"][0]
        assert [qp["qpn"] for qp in ctx["dump"]["qps"]] == [0x11, 0x12]
        assert ctx["dump"]["stopped"] is stopped
        assert ctx["dump"]["qps"][0]["peer_gid"] == Wires.B
        if not stopped:
            agent.client.container_stop("c1", tmp_path / "d")


def test_a_container_can_be_restored_where_it_was_stopped(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path, start_peer: Peers
) -> None:
    """The stand-in answers until the resume, though the container is prepared already."""
    fake = start_fake(container(agent, wires), "0x11", "--gid", Wires.A, "--peer", Wires.B)
    fake.expect("welcome")
    dumps = agent.client.container_stop("c1", tmp_path / "d")["dumps"]
    agent.client.container_prepare("c1", dumps=dumps, netns=wires.path(wires.a), gid=Wires.A)
    peer = start_peer()
    knock(peer, 0x11)
    assert parse(peer.receive()).opcode == Op.ACK
    assert agent.client.container_resume("c1")["qps"] == 1
    knock(peer, 0x11)
    assert int(fake.until("udp")["hex"][10:16], 16) == 0x11


def test_a_process_that_ran_without_an_agent_can_join_with_all_its_qpns(agent: Agent, wires: Wires) -> None:
    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((Wires.A, 4791))
        return sock

    path = container(agent, wires)
    alone, other = RawLib(path), RawLib(path)
    with wires.run(wires.a, bound) as sock:
        assert alone.hello(2, base=0, count=1 << 24, fds=(sock.fileno(),)).status == 0
        assert contexts(agent, "c1")[0]["qpn_count"] == 1 << 24
        assert other.hello().status == errno.ENOSPC
        alone.close()
    other.close()
    eventually(lambda: not contexts(agent, "c1"))
    again = RawLib(path)
    assert again.hello().slot == 0
    again.close()


def test_nothing_is_left_behind(start_agent: Callable[..., Agent], wires: Wires, start_fake: Fakes) -> None:
    agent = start_agent(wires=wires)
    fake = start_fake(container(agent, wires))
    fake.expect("welcome")
    fake.close()
    agent.client.container_remove("c1")
    assert agent.end() == 0
    assert not list(agent.run_dir.iterdir())
    assert not wires.run(wires.a, lambda: Path("/proc/thread-self/net/udp").read_text().count("12B7"))


def test_an_idle_agent_ends_by_itself(
    start_agent: Callable[..., Agent], start_fake: Fakes, wires: Wires
) -> None:
    agent = start_agent("--idle-exit", "2", wires=wires)
    fake = start_fake(agent.run_dir / "agent.sock", wires=wires)
    fake.expect("welcome")
    fake.close()
    agent.client.close()
    assert agent.process.wait(60) == 0
    assert not list(agent.run_dir.iterdir())


def test_two_agents_cannot_share_a_run_directory(start_agent: Callable[..., Agent]) -> None:
    agent = start_agent()
    with pytest.raises(AssertionError, match="another agent has"):
        Agent(agent.run_dir)
    assert agent.client.status()["containers"] == []
    assert {p.name for p in unix_sockets(agent.run_dir)} == {"agent.sock", "admin.sock"}
