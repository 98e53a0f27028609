# SPDX-License-Identifier: BSD-3-Clause
"""The agent and the real library: unmodified perftest between two namespaces, stopped in mid-flight."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which

import pytest

from migroce import paths

from .rig import Agent, Wires, eventually
from .test_agent import contexts

pytestmark = pytest.mark.skipif(not which("ib_send_bw"), reason="needs perftest")


@pytest.fixture(scope="module")
def library() -> str:
    """libmigroce.so."""
    try:
        return str(paths.library())
    except paths.LibraryNotFoundError as e:
        pytest.skip(str(e))


class Bench:
    """Pairs of perftest programs: servers in container c1 (namespace a), clients in c2 (b)."""

    def __init__(self, agent: Agent, wires: Wires, library: str) -> None:
        self.agent, self.wires = agent, wires
        self.library = library
        self.socket = agent.client.container_add("c1", netns=wires.path(wires.a), gid=wires.A) / "agent.sock"
        clients = agent.client.container_add("c2", netns=wires.path(wires.b), gid=wires.B)
        self.clients = clients / "agent.sock"
        self.processes: list[subprocess.Popen[str]] = []
        self._ports = itertools.count(18515)

    def start(self, program: str, *args: str) -> None:
        """Start a server and its client, and wait until data flows."""
        port = str(next(self._ports))
        before = len(self.processes) // 2
        common = (program, "-d", "rxe0", "-x", "1", "-p", port, *args)
        self._spawn(self.wires.a, self.socket, *common)
        listening = f"{int(port):04X} 00000000:0000 0A"
        table = Path("/proc/thread-self/net/tcp")
        eventually(lambda: listening in self.wires.run(self.wires.a, table.read_text))
        self._spawn(self.wires.b, self.clients, *common, self.wires.A)
        eventually(lambda: sum(n > 100 for n in self.traffic()) == before + 1)

    def _spawn(self, where: str, sock: Path, *argv: str) -> None:
        env = [f"LD_PRELOAD={self.library}", f"MIGROCE_AGENT={sock}"]
        self.processes.append(subprocess.Popen(
            ["nsenter", f"--net={self.wires.path(where)}", "env", *env, *argv],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

    def traffic(self) -> list[int]:
        """Packets received so far by each process with a connected QP."""
        dumps = [ctx["dump"] for ctx in self.agent.client.ps("c1")[0]["contexts"]]
        return [dump["counters"]["rx_packets"] for dump in dumps if dump and dump["qps"]]

    def finish(self) -> None:
        """All end by themselves and well. Clients first: they are the first to notice a loss."""
        for process in reversed(self.processes):
            try:
                text = process.communicate(timeout=60)[0]
            except subprocess.TimeoutExpired:
                raise AssertionError(f"it hangs: {self.agent.client.ps()}") from None
            assert process.returncode == 0, text

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def bench(agent: Agent, wires: Wires, library: str) -> Iterator[Bench]:
    """See Bench."""
    made = Bench(agent, wires, library)
    yield made
    made.close()


def answered(agent: Agent, n: int) -> None:
    """Wait until the stand-in has sent so many answers."""
    eventually(lambda: agent.client.status()["containers"][0]["standin"]["sent"] >= n)


def stop_and_go(agent: Agent, directory: Path, n: int) -> None:
    assert agent.client.container_stop("c1", directory)["contexts"] == n
    assert agent.client.status()["containers"][0]["state"] == "stopped"
    assert agent.client.container_resume("c1")["contexts"] == n


@pytest.mark.parametrize("program", ["ib_send_bw", "ib_write_bw", "ib_read_bw"])
def test_a_stopped_server_goes_on(bench: Bench, agent: Agent, tmp_path: Path, program: str) -> None:
    bench.start(program, "-n", "10000", "-s", "65536")
    for _ in range(3):
        stop_and_go(agent, tmp_path, 1)
    bench.finish()
    eventually(lambda: not contexts(agent, "c1"))


def test_several_processes_behind_one_address_go_on(bench: Bench, agent: Agent, tmp_path: Path) -> None:
    for _ in range(3):
        bench.start("ib_send_bw", "-n", "20000", "-s", "65536")
    assert sorted(c["slot"] for c in contexts(agent, "c1")) == [0, 1, 2]  # type: ignore[type-var]
    stop_and_go(agent, tmp_path, 3)
    bench.finish()


def test_a_peer_waits_for_a_long_stop(bench: Bench, agent: Agent, tmp_path: Path) -> None:
    """Longer than all its retries: the peer lives on because the stand-in tells it to wait."""
    bench.start("ib_send_bw", "-n", "30000", "-s", "65536", "-u", "14")  # 8 times 67 ms
    agent.client.container_stop("c1", tmp_path)
    answered(agent, 8)  # at 20, 60, 140, 300, then each 200 ms: the retries would be over long since
    agent.client.container_resume("c1")
    bench.finish()


def test_a_killed_agent_is_not_missed(bench: Bench, agent: Agent, tmp_path: Path) -> None:
    bench.start("ib_send_bw", "-n", "60000", "-s", "65536")
    agent.restart()
    stop_and_go(agent, tmp_path, 1)  # waits for the process to come back by itself
    bench.finish()


def test_a_kill_of_the_agent_while_stopped_is_survived(
    bench: Bench, agent: Agent, tmp_path: Path
) -> None:
    bench.start("ib_send_bw", "-n", "5000", "-s", "65536")
    agent.client.container_stop("c1", tmp_path)
    answered(agent, 1)  # the peer knows; while there is no agent at all nobody tells it
    agent.restart()
    assert agent.client.container_resume("c1")["contexts"] == 1
    bench.finish()


def test_a_move_between_two_agents(
    bench: Bench, agent: Agent, tmp_path: Path, start_agent: Callable[..., Agent], wires: Wires
) -> None:
    """Without CRIU: the process looks for its agent at the same path, which leads to another agent."""
    moving = tmp_path / "here"
    moving.symlink_to(bench.socket.parent)
    bench.socket = moving / "agent.sock"
    bench.start("ib_send_bw", "-n", "5000", "-s", "65536")
    dumps = agent.client.container_stop("c1", tmp_path)["dumps"]
    other = start_agent(wires=wires)
    ready = other.client.container_prepare("c1", dumps=dumps, netns=wires.path(wires.a), gid=wires.A)
    agent.client.container_remove("c1")  # its sockets and the stand-in were in the same namespace
    moving.unlink()
    moving.symlink_to(ready["dir"])
    assert other.client.container_resume("c1")["contexts"] == 1
    bench.agent = other
    bench.finish()
