# SPDX-License-Identifier: BSD-3-Clause
"""An interface's further IPv4 addresses: sockets for processes that want them, shared, kept, given back."""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which

import pytest

from migroce import control as c
from migroce import paths
from migroce.dump import gid_bytes
from migroce.wire import Op

from .rawlib import RawLib
from .rig import Agent, Peer, Wires, eventually, sh
from .test_agent import container, contexts
from .test_real import Bench, stop_and_go

FURTHER = "10.7.1.1"
PEERS = "10.7.1.2"
LATER = "10.7.2.1"
Libs = Callable[[Path], RawLib]


def address(wires: Wires, action: str, text: str) -> None:
    sh("ip", "-n", wires.a, "addr", action, f"{text}/24", "dev", "eth0")


@pytest.fixture
def wires(wires: Wires) -> Wires:
    """Each end has a second address."""
    address(wires, "add", FURTHER)
    sh("ip", "-n", wires.b, "addr", "add", f"{PEERS}/24", "dev", "eth0")
    return wires


@pytest.fixture
def connect() -> Iterator[Libs]:
    """Makes connections."""
    libs: list[RawLib] = []

    def start(path: Path) -> RawLib:
        libs.append(RawLib(path))
        return libs[-1]

    yield start
    for lib in libs:
        lib.close()


def bound(lib: RawLib) -> list[str]:
    """What the sockets that came are bound to."""
    found = []
    for fd in lib.fds:
        with socket.socket(fileno=fd) as sock:
            found.append(sock.getsockname()[0])
            sock.detach()
    return found


def ports(wires: Wires, text: str) -> int:
    """How many sockets have the RoCE port of an address."""
    local = f"{int.from_bytes(socket.inet_aton(text), 'little'):08X}:12B7"
    return wires.run(wires.a, Path("/proc/thread-self/net/udp").read_text).count(f" {local} ")


def test_who_wants_further_addresses_gets_them_and_others_do_not(
    agent: Agent, wires: Wires, connect: Libs
) -> None:
    path = container(agent, wires)
    plain, one, two = connect(path), connect(path), connect(path)
    plain.hello()
    assert bound(plain) == [Wires.A, "::"]
    for lib in (one, two):
        lib.hello(flags=c.HELLO_FURTHER)
        assert bound(lib) == [Wires.A, "::", FURTHER]
    assert ports(wires, FURTHER) == 2


def test_sockets_follow_the_interfaces_addresses(agent: Agent, wires: Wires, connect: Libs) -> None:
    lib = connect(container(agent, wires))
    lib.hello(flags=c.HELLO_FURTHER)
    assert lib.addresses(gid_bytes(FURTHER)) == []
    address(wires, "add", LATER)
    sh("ip", "-n", wires.a, "addr", "add", "10.7.3.1/24", "dev", "lo")  # another interface's
    (sock,) = lib.addresses(gid_bytes(FURTHER))
    with sock:
        assert sock.getsockname() == (LATER, 4791)
    address(wires, "del", FURTHER)
    assert lib.addresses(gid_bytes(FURTHER), gid_bytes(LATER)) == []
    assert ports(wires, FURTHER) == 1  # the process has it still
    lib.close()
    eventually(lambda: ports(wires, FURTHER) + ports(wires, LATER) == 0)


def test_an_address_that_is_gone_is_closed_when_the_process_has_done_so(
    agent: Agent, wires: Wires, connect: Libs
) -> None:
    lib, other = connect(container(agent, wires)), connect(container(agent, wires))
    for each in (lib, other):
        each.hello(flags=c.HELLO_FURTHER)
    address(wires, "del", FURTHER)
    socket.socket(fileno=lib.fds.pop()).close()
    assert lib.addresses() == []
    eventually(lambda: ports(wires, FURTHER) == 1)
    address(wires, "add", FURTHER)
    (sock,) = lib.addresses()
    with sock:
        assert sock.getsockname() == (FURTHER, 4791)
    with wires.run(wires.b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as knock:
        for slot, each in enumerate((lib, other)):
            knock.sendto(bytes([0, 0, 0, 0, 0, slot << 2, 0, 17]) + bytes(16), (FURTHER, 4791))
            assert select.select([each.fds[-1]], [], [], 60)[0]


def test_an_address_whose_port_somebody_has_is_left_out(agent: Agent, wires: Wires, connect: Libs) -> None:
    lib = connect(container(agent, wires))
    with wires.run(wires.a, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as squatter:
        squatter.bind((FURTHER, 4791))
        lib.hello(flags=c.HELLO_FURTHER)
        assert bound(lib) == [Wires.A, "::"]
    (sock,) = lib.addresses()
    sock.close()


def test_requests_to_an_address_are_for_whose_main_one_it_is(
    agent: Agent, wires: Wires, connect: Libs
) -> None:
    """Two containers in one namespace that listen on the same port, each at its own address."""
    first, second = connect(container(agent, wires)), None
    first.hello(flags=c.HELLO_FURTHER)
    path = agent.client.container_add("c3", netns=wires.path(wires.a), gid=FURTHER) / "agent.sock"
    second = connect(path)
    second.hello(flags=c.HELLO_FURTHER)
    assert bound(second) == [FURTHER, "::", Wires.A]
    service = 0x01061388
    for lib in (first, second):
        lib.sock.send(c.encode(c.Listens((service,))))
        lib.addresses(*map(gid_bytes, (FURTHER, Wires.A)))  # it has been heard
    request = bytearray(280)
    request[7], request[37] = 1, 0x10
    request[56:60] = service.to_bytes(4, "big")
    with wires.run(wires.b, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as knock:
        for lib, target in ((first, Wires.A), (second, FURTHER)):
            knock.sendto(request, (target, 4791))
            assert select.select([lib.fds[0]], [], [], 60)[0]


def test_more_addresses_than_there_can_be_end_the_connection(
    agent: Agent, wires: Wires, connect: Libs
) -> None:
    lib = connect(container(agent, wires))
    lib.hello(flags=c.HELLO_FURTHER)
    lib.sock.send(c.encode(c.Addresses((bytes(16),) * (c.MAX_FURTHER + 1))))
    assert lib.ended()


# ---- the library --------------------------------------------------------------------------------------


@pytest.fixture
def bench(agent: Agent, wires: Wires) -> Iterator[Bench]:
    """Pairs of perftest programs."""
    if not which("ib_send_bw"):
        pytest.skip("needs perftest")
    made = Bench(agent, wires, str(paths.library()))
    yield made
    made.close()


def at(agent: Agent) -> list[str]:
    """The addresses of the container's QPs."""
    dumps = [ctx["dump"] for ctx in agent.client.ps("c1")[0]["contexts"]]
    return [qp["local_gid"] for dump in dumps if dump for qp in dump["qps"]]


def test_programs_at_a_further_address_are_stopped_and_go_on(
    bench: Bench, agent: Agent, tmp_path: Path
) -> None:
    for _ in range(2):
        bench.start("ib_send_bw", "-n", "10000", "-s", "65536", "-x", "2")
    assert at(agent) == [FURTHER] * 2
    for _ in range(2):
        stop_and_go(agent, tmp_path, 2)
    assert at(agent) == [FURTHER] * 2
    bench.finish()


def test_a_killed_agent_takes_further_addresses_up_again(bench: Bench, agent: Agent, tmp_path: Path) -> None:
    bench.start("ib_send_bw", "-n", "60000", "-s", "65536", "-x", "2")
    agent.restart()
    stop_and_go(agent, tmp_path, 1)  # waits for the process to come back by itself
    bench.finish()


def test_a_peer_without_the_extension_is_held_at_a_further_address(
    bench: Bench, agent: Agent, tmp_path: Path, start_peer: Callable[..., Peer]
) -> None:
    """The request is the peer's by its address alone: nobody looks at its port."""
    bench.start("ib_send_bw", "-n", "10000", "-s", "65536", "-x", "2")
    agent.client.container_stop("c1", tmp_path)
    (dump,) = (ctx["dump"] for ctx in agent.client.ps("c1")[0]["contexts"])
    qp = dump["qps"][0]
    peer = start_peer(PEERS, FURTHER, 50000)
    peer.send(peer.packet(Op.SEND_ONLY, qp["qpn"], qp["epsn"], capable=False))

    def held() -> bool:
        found = next(each for each in agent.client.status()["containers"] if each["id"] == "c1")
        return bool(found["standin"]["packets"].get("rnr_nak"))

    eventually(held)


@pytest.mark.skipif(not which("ibv_asyncwatch"), reason="needs ibverbs-utils")
def test_addresses_come_and_go_under_an_agent(agent: Agent, wires: Wires) -> None:
    env = [f"LD_PRELOAD={paths.library()}", f"MIGROCE_AGENT={container(agent, wires)}"]
    argv = ["nsenter", f"--net={wires.path(wires.a)}", "env", *env, "ibv_asyncwatch"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watch:
        try:
            assert watch.stdout is not None
            assert "async event FD" in watch.stdout.readline()
            assert ports(wires, FURTHER) == 1
            address(wires, "add", LATER)
            assert "GID_CHANGE" in watch.stdout.readline()
            assert ports(wires, LATER) == 1
            address(wires, "del", LATER)
            assert "GID_CHANGE" in watch.stdout.readline()
            eventually(lambda: ports(wires, LATER) == 0)
            assert len(contexts(agent, "c1")) == 1
        finally:
            watch.kill()
