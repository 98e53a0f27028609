# SPDX-License-Identifier: BSD-3-Clause
"""Who follows a container to another address, which networks its QPs fit, and what they sent again."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from migroce.errors import EngineError, MigrationError
from migroce.migration import connections


def _about(*addresses: str, ip: str | None = None, engine: str = "oci") -> dict[str, Any]:
    interfaces = [
        {"name": f"eth{n}", "mac": "02:00:00:00:00:01", "mtu": 1500, "addresses": [each]}
        for n, each in enumerate(addresses)
    ]
    return {"container": "c", "engine": engine, "interfaces": interfaces, "metadata": {"ip": ip}}


def _qp(**changes: Any) -> dict[str, Any]:
    fields = {
        "qpn": 17, "type": "RC", "state": "RTS", "mstate": "normal", "peer_gid": "10.0.1.3", "peer_qpn": 18,
        "peer_capable": True, "token_acked": True, "retransmits": 0, "duplicates": 0, "una_psn": 5,
        "next_psn": 9,
    }  # fmt: skip
    return {**fields, **changes}


def test_only_the_known_address_changes_and_its_mac_with_it() -> None:
    about = _about("10.0.1.7/24", "192.168.3.4/16", ip="10.0.1.7")
    changed = connections.at_another_address(about, "10.0.1.9")
    first, second = changed["interfaces"]
    assert first["addresses"] == ["10.0.1.9/24"]
    assert first["mac"] == "02:6d:0a:00:01:09"
    assert second == about["interfaces"][1]
    assert changed["metadata"]["ip"] == "10.0.1.9"
    assert about["interfaces"][0]["addresses"] == ["10.0.1.7/24"]  # not changed in place


@pytest.mark.parametrize(
    ("about", "ip", "words"),
    [
        (_about("10.0.1.7/24", ip="10.0.1.7"), "10.0.2.9", "not in c's network 10.0.1.0/24"),
        (_about("10.0.1.7/24", ip="10.0.1.7"), "fd00::1", "no IPv4 address"),
        (_about("10.0.1.7/24", "10.2.0.1/8"), "10.0.1.9", "not clear"),
        (_about(), "10.0.1.9", "it has none"),
        (_about("10.0.1.7/24", ip="10.0.1.7", engine="docker"), "10.0.1.9", "as Docker has given it"),
    ],
)
def test_an_address_that_cannot_be_is_refused(about: dict[str, Any], ip: str, words: str) -> None:
    with pytest.raises(MigrationError, match=words):
        connections.at_another_address(about, ip)


def test_capable_peers_with_our_token_follow_and_unconnected_qps_do_not_matter() -> None:
    idle = _qp(state="INIT", peer_capable=False)
    connections.check_peers("c", [_qp(), _qp(state="RTR"), idle, _qp(state="ERR", token_acked=False)])


@pytest.mark.parametrize(
    "qp",
    [
        _qp(peer_capable=False),
        _qp(token_acked=False),
        _qp(type="UD"),
        _qp(type="UC", state="RTR"),
    ],
)
def test_a_peer_that_would_not_follow_is_named(qp: dict[str, Any]) -> None:
    with pytest.raises(MigrationError, match="1 QPs of c cannot take their peers along"):
        connections.check_peers("c", [_qp(), qp])


def test_a_network_whose_packets_are_too_small_for_the_qps_is_refused() -> None:
    qps = [_qp(path_mtu=1024), _qp(path_mtu=2048), _qp(path_mtu=4096, state="INIT")]
    ps = [{"contexts": [{"dump": {"qps": qps}}, {"dump": None, "error": "it does not answer"}]}]
    about = {"path_mtu": connections.path_mtu(ps)}
    connections.check_mtu(about, 2128, "node-b's network")
    with pytest.raises(EngineError, match="packets of 2127 bytes, the container's QPs need 2128"):
        connections.check_mtu(about, 2127, "node-b's network")


def test_without_connected_qps_any_network_will_do() -> None:
    connections.check_mtu({"path_mtu": connections.path_mtu([])}, 576, "node-b's network")
    connections.check_mtu({}, 576, "node-b's network")


def test_a_socket_bound_to_the_old_address_is_refused_and_one_bound_to_any_is_not() -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as bound:
            bound.bind(("127.0.0.83", 0))
            if kind is socket.SOCK_STREAM:
                bound.listen()
            port = bound.getsockname()[1]
            with pytest.raises(EngineError, match=f"bound to 127.0.0.83 \\(port {port}\\)"):
                connections.check_sockets("c", "127.0.0.83", os.getpid())
            connections.check_sockets("c", "127.0.0.84", os.getpid())
    with socket.socket() as any_address:
        any_address.bind(("0.0.0.0", 0))
        any_address.listen()
        connections.check_sockets("c", "127.0.0.83", os.getpid())


def test_a_dual_stack_connection_counts_as_bound() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with (
            socket.create_connection(("127.0.0.85", port)),
            server.accept()[0],
            pytest.raises(EngineError, match="1 TCP sockets bound to 127\\.0\\.0\\.85"),
        ):
            connections.check_sockets("c", "127.0.0.85", os.getpid())


def test_settled_is_when_no_connected_qp_waits_for_its_peer() -> None:
    assert connections.settled([_qp(), _qp(mstate="paused"), _qp(state="ERR", mstate="resuming")])
    assert not connections.settled([_qp(), _qp(mstate="resuming")])


def test_whole_again_is_when_what_was_in_flight_is_acknowledged() -> None:
    before = [_qp(qpn=1, next_psn=9), _qp(qpn=2, next_psn=0xFFFFFE)]
    assert not connections.repaired(before, [_qp(qpn=1, una_psn=8)])
    assert connections.repaired(before, [_qp(qpn=1, una_psn=9), _qp(qpn=2, una_psn=1), _qp(qpn=3)])
    assert not connections.repaired(before, [_qp(qpn=2, una_psn=0xFFFFFD)])
    assert connections.repaired(before, [_qp(qpn=1, una_psn=8, state="ERR")])


def test_only_what_was_added_counts_and_only_of_qps_that_are_still_there() -> None:
    before = connections.counters([_qp(qpn=1, retransmits=5, duplicates=1), _qp(qpn=2), _qp(qpn=3)])
    after = connections.counters([_qp(qpn=1, retransmits=9, duplicates=4), _qp(qpn=2), _qp(qpn=4)])
    peers = {("10.0.1.3", 18): 5}, {("10.0.1.3", 18): 8}
    again = connections.compare(before, after, *peers)
    assert [(each.qpn, each.sent_again, each.received_again) for each in again] == [(1, 4, 3), (2, 0, 0)]
    assert [each.peer_sent_again for each in again] == [3, 3]
    assert connections.compare(before, after, peers[0], {})[0].peer_sent_again is None


def test_a_process_that_tells_nothing_is_an_error() -> None:
    silent = [{"contexts": [{"comm": "ib_send_bw", "dump": None, "error": "timed out"}]}]
    with pytest.raises(EngineError, match="ib_send_bw shows no QPs: timed out"):
        connections.of_container(silent)
