# SPDX-License-Identifier: BSD-3-Clause
"""kill -9 of the agent at each point, and its return: nobody loses anything by it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from migroce import wire as w
from migroce.control import SLOT_SHIFT

from .rig import Agent, Fake, Peer, Wires, eventually
from .test_agent import container, contexts, knock, received
from .test_standin_io import nak

Fakes = Callable[..., Fake]
Peers = Callable[..., Peer]

STOPPER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(sys.argv[2].encode())
sock.recv(9)
"""


def start(agent: Agent, wires: Wires, start_fake: Fakes, n: int) -> dict[int, Fake]:
    sock = container(agent, wires)
    fakes = {}
    for slot in range(n):
        fakes[slot] = start_fake(sock, "0x11", "--gid", Wires.A, "--peer", Wires.B)
        assert fakes[slot].expect("welcome")["slot"] == slot
    return fakes


def all_reached(fakes: dict[int, Fake], peer: Peer) -> None:
    for slot, fake in fakes.items():
        knock(peer, slot << SLOT_SHIFT | 5)
        assert received(fake) == slot << SLOT_SHIFT | 5


def adopted(agent: Agent, n: int) -> None:
    eventually(lambda: sum(bool(c["connected"]) for c in contexts(agent, "c1")) == n)


def test_running_processes_go_on_and_are_adopted(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers, tmp_path: Path
) -> None:
    fakes = start(agent, wires, start_fake, 3)
    peer = start_peer()
    agent.kill()
    for fake in fakes.values():
        fake.expect("lost")
    all_reached(fakes, peer)
    agent.start()
    for slot, fake in fakes.items():
        got = fake.expect("welcome")
        assert (got["was"], got["slot"]) == (2, slot)
    all_reached(fakes, peer)
    fakes[3] = start_fake(container(agent, wires))
    assert fakes[3].expect("welcome")["slot"] == 3
    all_reached(fakes, peer)
    assert agent.client.container_stop("c1", tmp_path / "d")["contexts"] == 4
    assert agent.client.container_resume("c1")["contexts"] == 4


def test_steering_stays_right_when_a_process_had_ended_before(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    fakes = start(agent, wires, start_fake, 4)
    fakes.pop(1).kill()
    adopted(agent, 3)
    peer = start_peer()
    agent.kill()
    for fake in fakes.values():
        fake.expect("lost")
    all_reached(fakes, peer)
    agent.start()
    adopted(agent, 3)
    for fake in fakes.values():
        fake.expect("welcome")
    all_reached(fakes, peer)


def test_a_process_that_ends_while_no_agent_runs_is_noticed(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    fakes = start(agent, wires, start_fake, 4)
    agent.kill()
    fakes.pop(0).kill()
    agent.start()
    adopted(agent, 3)
    for fake in fakes.values():
        assert fake.until("welcome")["was"] == 2
    peer = start_peer()
    all_reached(fakes, peer)
    fakes[0] = start_fake(container(agent, wires))
    assert fakes[0].expect("welcome")["slot"] == 0
    all_reached(fakes, peer)


def test_a_stop_right_after_the_restart_waits_for_the_processes(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    """Else a process without connection would be dumped with its sockets open."""
    start(agent, wires, start_fake, 2)
    agent.restart()
    assert agent.client.container_stop("c1", tmp_path / "d")["contexts"] == 2
    assert agent.client.container_resume("c1")["contexts"] == 2


def test_a_stopped_container_stays_stopped_and_is_stood_in_for(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers, tmp_path: Path
) -> None:
    fakes = start(agent, wires, start_fake, 2)
    agent.client.container_stop("c1", tmp_path / "d")
    for path in (tmp_path / "d").iterdir():
        path.unlink()  # the orchestrator may have moved them on
    agent.restart()
    peer = start_peer()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 5), peer.packet(w.Op.SEND_ONLY, 1 << SLOT_SHIFT | 0x11, 6))
    assert {nak(peer).psn, nak(peer).psn} == {5, 6}
    status = agent.client.status()["containers"][0]
    assert (status["state"], status["standin"]["qps"]) == ("stopped", 2)
    agent.client.container_moved("c1", "10.7.0.9")
    agent.restart()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 5))
    assert w.parse(peer.receive()).opcode == w.Op.RESUME
    assert agent.client.container_resume("c1")["contexts"] == 2
    for fake in fakes.values():
        assert fake.until("welcome")["was"] == 1
    all_reached(fakes, peer)


def test_a_kill_during_the_stop_leaves_a_running_container(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers, tmp_path: Path
) -> None:
    """One context has stopped, the other has not answered: both run again without anybody's help."""
    sock = container(agent, wires)
    first = start_fake(sock)
    first.expect("welcome")
    second = start_fake(sock, "--stop", "never")
    second.expect("welcome")
    caller = subprocess.Popen(
        ["python3", "-c", STOPPER, str(agent.run_dir / "admin.sock"),
         f'{{"cmd":"container.stop","container":"c1","dump_dir":"{tmp_path}/d","timeout_ms":20000}}\n'])
    first.expect("stop")
    first.expect("stopped")
    second.expect("stop")
    agent.restart()
    caller.wait()
    assert first.until("welcome")["was"] == 1
    assert second.until("welcome")["was"] == 2
    adopted(agent, 2)
    assert agent.client.status()["containers"][0]["state"] == "running"
    all_reached({0: first, 1: second}, start_peer())


def test_a_kill_during_the_resume_can_be_resumed_again(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path
) -> None:
    fakes = start(agent, wires, start_fake, 2)
    agent.client.container_stop("c1", tmp_path / "d")
    sh_stop(fakes[1], "STOP")
    with pytest.raises(Exception, match="1 of 2 processes did not come back"):
        agent.client.container_resume("c1", timeout_ms=300)
    agent.restart()
    sh_stop(fakes[1], "CONT")
    assert agent.client.container_resume("c1")["contexts"] == 2


def sh_stop(fake: Fake, signal: str) -> None:
    subprocess.run(["kill", f"-{signal}", str(fake.process.pid)], check=True)


def test_a_prepared_container_survives_a_restart(
    agent: Agent, wires: Wires, start_fake: Fakes, tmp_path: Path, start_agent: Callable[..., Agent]
) -> None:
    link = tmp_path / "here"
    link.symlink_to(container(agent, wires).parent)
    fake = start_fake(link / "agent.sock", "7")
    fake.expect("welcome")
    dumps = agent.client.container_stop("c1", tmp_path / "d")["dumps"]
    other = start_agent()
    directory = other.client.container_prepare("c1", dumps=dumps, netns=wires.path(wires.b))["dir"]
    other.restart()
    link.unlink()
    link.symlink_to(directory)
    assert other.client.container_resume("c1")["contexts"] == 1


def test_processes_without_container_are_adopted_too(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    fakes = {}
    for slot in range(2):
        fakes[slot] = start_fake(agent.run_dir / "agent.sock", wires=wires)
        fakes[slot].expect("welcome")
    agent.restart()
    for fake in fakes.values():
        assert fake.until("welcome")["was"] == 2
    all_reached(fakes, start_peer())


def test_a_terminated_agent_leaves_what_its_successor_needs(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    fakes = start(agent, wires, start_fake, 2)
    assert agent.end() == 0
    agent.start()
    adopted(agent, 2)
    for fake in fakes.values():
        assert fake.until("welcome")["was"] == 2
    all_reached(fakes, start_peer())


def test_a_damaged_state_file_is_said_and_survived(
    agent: Agent, wires: Wires, start_fake: Fakes, start_peer: Peers
) -> None:
    """The processes tell all that is needed; only the containers must be added again."""
    fakes = start(agent, wires, start_fake, 1)
    for text in ("{", '{"version":1,"containers":[{"id":"c1"}],"ports":{},"migrations":[]}', '{"version":9}'):
        agent.kill()
        (agent.run_dir / "state.json").write_text(text)
        agent.start()
        assert "state" in agent.log.read_text()
        container(agent, wires)
        adopted(agent, 1)
        assert fakes[0].until("welcome")["was"] == 2
    all_reached(fakes, start_peer())
