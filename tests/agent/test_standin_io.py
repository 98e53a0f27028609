# SPDX-License-Identifier: BSD-3-Clause
"""The stand-in on the wire: queued packets, trains, both families, CRIU's network lock, the IP id."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migroce import wire as w
from migroce.dump import gid_bytes

from .rig import SRC, Agent, Fake, Peer, Wires, ack_of, command_prefix, sh

EPSN = 1000  # of fakelib.py's QPs


@pytest.fixture
def stopped(
    agent: Agent, wires: Wires, start_fake: Callable[..., Fake], tmp_path: Path
) -> Callable[..., Fake]:
    """Makes a container with one process, stopped with QPs 0x11 and 0x12."""

    def make(*args: str, address: str = Wires.A, peer: str = Wires.B,
             before: Callable[[], object] = bool) -> Fake:
        gid = address if "." in address else None
        directory = agent.client.container_add("c1", netns=wires.path(wires.a), gid=gid)
        fake = start_fake(directory / "agent.sock", "0x11", "0x12", "--gid", address, "--peer", peer,
                          *args)
        fake.expect("welcome")
        before()
        agent.client.container_stop("c1", tmp_path / "d")
        return fake

    return make


def nak(peer: Peer) -> w.Packet:
    """The next answer, which must be an intact NAK stopped."""
    data = peer.receive()
    flow = w.Flow(gid_bytes(peer.target), gid_bytes(peer.address), 4791)
    assert w.icrc(flow, data[:-4]) == struct.unpack("<I", data[-4:])[0]
    got = w.parse(data)
    assert got.aeth is not None
    assert got.aeth.syndrome == w.Syndrome.NAK_STOPPED
    return got


def test_a_peer_is_told_that_the_container_is_stopped(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer]
) -> None:
    stopped()
    peer = start_peer()
    peer.send(ack_of(peer, 0x11), peer.packet(w.Op.SEND_ONLY, 0x12, 7), peer.packet(w.Op.SEND_ONLY, 0x11, 9))
    assert (nak(peer).psn, nak(peer).psn) == (7, 9)
    peer.nothing()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, EPSN, capable=False))
    got = w.parse(peer.receive())
    assert (got.aeth.syndrome & 0x60 if got.aeth else 0, got.psn) == (0x20, EPSN)


def test_peers_are_told_unasked_and_again(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer]
) -> None:
    peer = start_peer()
    stopped("--capable")
    got = [nak(peer) for _ in range(4)]
    assert {each.psn for each in got} == {EPSN}
    assert sorted(each.dest_qpn for each in got) == sorted([*{each.dest_qpn for each in got}] * 2)
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x12, 7))
    while nak(peer).psn != 7:
        pass


def test_ipv6_peers_are_told_too(stopped: Callable[..., Fake], start_peer: Callable[..., Peer]) -> None:
    stopped(address="fd07::1", peer="fd07::2")
    peer = start_peer("fd07::2", "fd07::1")
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x12, 7))
    assert nak(peer).psn == 7


def test_a_train_is_answered_once(stopped: Callable[..., Fake], start_peer: Callable[..., Peer]) -> None:
    """The network delivers a GSO train as one large packet; its packets have IP ids 0, 1, 2, ..."""
    stopped()
    peer = start_peer()
    train = [
        w.build(w.Packet(w.Op.SEND_MIDDLE, 0x11, EPSN + n, payload=b"x" * 1024, capable=True),
                w.Flow(gid_bytes(Wires.B), gid_bytes(Wires.A), 4791, ip_id=n))
        for n in range(8)
    ]
    peer.send_train(train)
    assert nak(peer).psn == EPSN
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x12, 5))
    assert nak(peer).dest_qpn == 0x900012
    peer.nothing()


def test_packets_queued_before_the_stop_are_answered(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer]
) -> None:
    """They came while the process was ending its work; nobody else will ever read them."""
    peer = start_peer()

    def flood() -> None:
        train = [w.build(w.Packet(w.Op.SEND_ONLY, 0x11, n, capable=True),
                         w.Flow(gid_bytes(Wires.B), gid_bytes(Wires.A), 4791, ip_id=n)) for n in range(4)]
        peer.send_train(train)
        peer.send(peer.packet(w.Op.SEND_ONLY, 0x12, 50))

    stopped("--deaf", before=flood)
    assert {nak(peer).psn, nak(peer).psn} == {0, 50}
    peer.nothing()


LOCK = """*filter
:CRIU - [0:0]
-I INPUT -j CRIU
-I OUTPUT -j CRIU
-A CRIU -m mark --mark 0xc114 -j ACCEPT
-A CRIU -j DROP
COMMIT
"""


def test_the_network_lock_of_criu_does_not_silence_it(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer], wires: Wires, tmp_path: Path, agent: Agent
) -> None:
    stopped()
    rules = tmp_path / "rules"
    rules.write_text(LOCK)
    sh("ip", "netns", "exec", wires.a, "sh", "-c", f"iptables-restore --noflush < {rules}")
    peer = start_peer()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 9))
    assert nak(peer).psn == 9
    assert agent.client.status()["containers"][0]["standin"]["sees_locked_network"]


def test_what_is_sent_has_df_and_ip_id_0(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer], wires: Wires
) -> None:
    """The ICRC covers both. Seen by a packet socket at the peer."""
    stopped()

    def sniffer() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        sock.settimeout(60)
        return sock

    with wires.run(wires.b, sniffer) as sniff:
        peer = start_peer()
        for psn in range(3):
            peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, psn))
            assert nak(peer).psn == psn
            while True:
                data, address = sniff.recvfrom(2000)
                if address[2] == socket.PACKET_HOST and data[9] == socket.IPPROTO_UDP:
                    break
            assert data[4:8] == b"\0\0\x40\0"
            assert struct.unpack(">HH", data[20:24]) == (4791, 4791)


def test_after_a_move_the_old_address_points_to_the_new_one(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer], agent: Agent
) -> None:
    stopped()
    agent.client.container_moved("c1", "10.7.0.9")
    peer = start_peer()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 5))
    got = w.parse(peer.receive())
    assert got.opcode == w.Op.RESUME
    assert got.meh is not None
    assert (got.meh.gid, got.meh.epoch) == (gid_bytes("10.7.0.9"), 5)


def test_after_resume_the_process_gets_the_packets(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer], agent: Agent
) -> None:
    fake = stopped()
    peer = start_peer()
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 5))
    nak(peer)
    agent.client.container_resume("c1")
    assert fake.until("welcome")["was"] == 1
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 6))
    got = fake.until("udp")
    assert int(got["hex"][18:24], 16) == 6
    peer.nothing()


def test_damaged_and_foreign_packets_are_not_answered(
    stopped: Callable[..., Fake], start_peer: Callable[..., Peer]
) -> None:
    stopped()
    peer = start_peer()
    bad = bytearray(peer.packet(w.Op.SEND_ONLY, 0x11, 5, payload=b"data"))
    bad[13] ^= 1
    peer.send(bytes(bad), b"", b"\0", b"x" * 5, b"\xff" * 8000, peer.packet(w.Op.SEND_ONLY, 0x11, 6)[:-1])
    stranger = start_peer(port=4792)
    stranger.send(stranger.packet(w.Op.SEND_ONLY, 0x99, 5))
    peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, 7))
    assert nak(peer).psn == 7
    peer.nothing()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that an unprivileged user can work in, with Python within reach."""
    path = Path(tempfile.mkdtemp(prefix="migroce-"))
    path.chmod(0o777)
    probe = [*command_prefix(None, 65534), sys.executable, "-c", "import migroce.wire"]
    env = os.environ | {"PYTHONPATH": str(SRC)}
    if subprocess.run(probe, env=env, check=False, capture_output=True).returncode:
        path.rmdir()
        pytest.skip("an unprivileged user cannot run this Python")
    yield path
    shutil.rmtree(path)


def test_an_unprivileged_agent_stands_in_too(
    public: Path, wires: Wires, start_fake: Callable[..., Fake], start_peer: Callable[..., Peer]
) -> None:
    """Without packet sockets, network namespaces, marks: it reads the process's UDP sockets, trains too."""
    agent = Agent(public / "run", wires=wires, user=65534)
    try:
        directory = agent.client.container_add("c1", gid=Wires.A)
        fake = start_fake(directory / "agent.sock", "0x11", "--gid", Wires.A, "--peer", Wires.B, wires=wires,
                          user=65534)
        fake.expect("welcome")
        agent.client.container_stop("c1", public / "d")
        peer = start_peer()
        peer.send_train([
            w.build(w.Packet(w.Op.SEND_MIDDLE, 0x11, EPSN + n, payload=b"x" * 1024, capable=True),
                    w.Flow(gid_bytes(Wires.B), gid_bytes(Wires.A), 4791, ip_id=n))
            for n in range(8)
        ])
        assert nak(peer).psn == EPSN
        peer.send(peer.packet(w.Op.SEND_ONLY, 0x11, EPSN, capable=False))
        got = w.parse(peer.receive())
        assert (got.aeth.syndrome & 0x60 if got.aeth else 0, got.psn) == (0x20, EPSN)
        assert not agent.client.status()["containers"][0]["standin"]["sees_locked_network"]
        agent.client.container_resume("c1")
        assert fake.until("welcome")["was"] == 1
    finally:
        agent.close()
