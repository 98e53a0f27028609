# SPDX-License-Identifier: BSD-3-Clause
"""Two devices over real sockets: sizes, directions, MTUs, the ICRC and IP ids of what is sent."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import zlib
from collections.abc import Iterator

import pytest

from .netns import Node, ip
from .tool import Tool, ToolError, both, connected

ETH_P_IP, ETH_P_ALL = 0x0800, 3
SO_RCVBUFFORCE = 33
SIZES = (0, 1, 2, 3, 4, 252, 253, 1000, 4096, 4097, 65536, 1 << 20)

pytestmark = pytest.mark.root


@pytest.fixture
def duo(nodes: tuple[Node, Node]) -> Iterator[tuple[Tool, Tool]]:
    """Two connected devices."""
    with connected(*nodes) as tools:
        yield tools


@pytest.mark.parametrize("size", SIZES)
def test_messages_of_every_size_arrive_whole_and_in_order(duo: tuple[Tool, Tool], size: int) -> None:
    a, b = duo
    count = 20 if size > 65536 else 300
    both(a, b, f"send {count} {size}", f"recv {count} {size}")
    both(a, b, f"both {count} {size}", f"both {count} {size}")
    assert a.counters()["rx_icrc"] == b.counters()["rx_icrc"] == 0


@pytest.mark.parametrize("mtu", [256, 512, 1024, 2048])
def test_every_path_mtu_works(nodes: tuple[Node, Node], mtu: int) -> None:
    with connected(*nodes, mtu=mtu) as (a, b):
        both(a, b, "both 50 10000", "both 50 10000")


def test_it_works_without_gso(nodes: tuple[Node, Node]) -> None:
    with connected(*nodes, env={"MIGROCE_NO_GSO": "1"}) as (a, b):
        both(a, b, "both 50 65536", "both 50 65536")


def test_a_link_without_segmentation_offload_is_served_too(nodes: tuple[Node, Node]) -> None:
    """The kernel cuts the trains itself (as for a NIC that cannot) and the ICRCs still hold."""
    offload(nodes, "off")
    try:
        with connected(*nodes) as (a, b):
            both(a, b, "both 50 65536", "both 50 65536")
            assert a.counters()["rx_icrc"] == b.counters()["rx_icrc"] == 0
    finally:
        offload(nodes, "on")


def test_a_packet_too_large_for_the_link_is_an_error_and_said_once(nodes: tuple[Node, Node]) -> None:
    a_node = nodes[0]
    with connected(*nodes, timeout=12) as (a, b):
        ip("-n", a_node.netns, "link", "set", a_node.iface, "mtu", "1500")
        try:
            b.put("recv 1 4096")
            with pytest.raises(ToolError, match="status 12"):  # IBV_WC_RETRY_EXC_ERR
                a("send 1 4096")
            assert a.errors().count("does not fit the MTU of va") == 1
        finally:
            ip("-n", a_node.netns, "link", "set", a_node.iface, "mtu", "9000")


# ---- what is on the wire ----------------------------------------------------------------------


def offload(nodes: tuple[Node, Node], state: str) -> None:
    """Let the kernel cut trains before the veth pair, so that a capture shows single packets."""
    for node in nodes:
        subprocess.run(node.command("ethtool", "-K", node.iface, "tx-udp-segmentation", state, "gro", state),
                       check=True, capture_output=True)


@contextlib.contextmanager
def capture(node: Node) -> Iterator[socket.socket]:
    """A packet socket that sees all IPv4 packets of the node's interface, in and out, whole."""
    with node.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 128 << 20)
        sock.bind((node.iface, ETH_P_ALL))
        sock.settimeout(60)
        yield sock


def roce_packets(sock: socket.socket, count: int) -> Iterator[bytes]:
    """The next `count` RoCEv2 packets, from the IP header on. TimeoutError when there are fewer."""
    while count:
        packet, (_, protocol, *_) = sock.recvfrom(1 << 16)
        if protocol == ETH_P_IP and packet[9] == socket.IPPROTO_UDP and packet[22:24] == b"\x12\xb7":
            count -= 1
            yield packet


def icrc(packet: bytes) -> int:
    """The ICRC that an IPv4 RoCEv2 packet (without it) should have: IBA annex A17.3.3, by zlib."""
    b = bytearray(packet)
    b[1] = b[8] = b[10] = b[11] = b[26] = b[27] = b[32] = 0xFF
    return zlib.crc32(bytes(b), zlib.crc32(b"\xff" * 8))


@pytest.mark.parametrize("gso", [True, False])
def test_every_packet_on_the_wire_has_a_valid_icrc(nodes: tuple[Node, Node], gso: bool) -> None:
    env = {} if gso else {"MIGROCE_NO_GSO": "1"}
    offload(nodes, "off")
    try:
        with capture(nodes[1]) as sock, connected(*nodes, env=env) as (a, b):
            for size in (0, 1, 2, 3, 4096, 10000, 65536):
                both(a, b, f"both 20 {size}", f"both 20 {size}")
            a("write 5 10000")
            a("read 5 10000")
            count = a.counters()["tx_packets"] + b.counters()["tx_packets"]
            ids = set()
            for packet in roce_packets(sock, count):
                assert packet[6:8] == b"\x40\x00"  # DF
                assert struct.unpack("<I", packet[-4:])[0] == icrc(packet[:-4])
                ids.add(struct.unpack_from(">H", packet, 4)[0])
            assert (ids == {0}) is not gso
    finally:
        offload(nodes, "on")
