# SPDX-License-Identifier: BSD-3-Clause
r"""The lab's network.

    migroce-LAB.net        underlay: one bridge, MTU 9050
      |            |
    eth0         eth0      192.168.77.1, .2, ...   migroce-LAB.node-a, .node-b, ...
    ov0 (VXLAN)  ov0       id 4096, flooding to all other nodes
      |            |
    br0          br0       MTU 9000: what containers' eth0 are plugged into (10.0.1.0/24)

Without overlay, eth0 is a port of br0 itself. All is in namespaces of ours, so that no name, address or rule
can clash with anything of the machine's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
from pathlib import Path

from pyroute2 import IPRoute, netns

from migroce.engines.network import in_netns

MTU = 9000
"""Of containers' interfaces: RDMA packets of 4096 bytes fit, and UDP segmentation has room."""
VXLAN_OVERHEAD = 50
VXLAN_ID = 4096
VXLAN_PORT = 4789
BRIDGE = "br0"
UNDERLAY = ipaddress.IPv4Network("192.168.77.0/24")
"""The nodes' own network."""
_NETNS_DIR = Path("/run/netns")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Names and addresses of a lab."""

    lab: str
    nodes: tuple[str, ...]
    overlay: bool
    docker: bool = False
    """Docker makes the nodes' bridges and the overlay itself."""

    def underlay_ns(self) -> str:
        return f"migroce-{self.lab}.net"

    def node_ns(self, node: str) -> str:
        return f"migroce-{self.lab}.{node}"

    def underlay_ip(self, node: str) -> str:
        return str(UNDERLAY[self.nodes.index(node) + 1])


def netns_path(name: str) -> Path:
    """Path of a named namespace."""
    return _NETNS_DIR / name


def namespaces(lab: str) -> list[Path]:
    """Every namespace of a lab, containers' too, made by whichever version of it."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in _NETNS_DIR.iterdir() if path.name.startswith(f"migroce-{lab}."))
    return []


def build(plan: Plan) -> None:
    """Make all of it. Raises OSError, pyroute2's NetlinkError."""
    for name in (plan.underlay_ns(), *(plan.node_ns(node) for node in plan.nodes)):
        netns.create(name)
    underlay = netns_path(plan.underlay_ns())
    in_netns(underlay, _underlay)
    for position, node in enumerate(plan.nodes):
        path = netns_path(plan.node_ns(node))
        fd = os.open(path, os.O_RDONLY)
        try:
            in_netns(underlay, lambda position=position, fd=fd: _cable(position, fd))  # type: ignore[misc]
        finally:
            os.close(fd)
        in_netns(path, lambda node=node: _node(plan, node))  # type: ignore[misc]


def _up(ipr: IPRoute, name: str) -> int:
    index = int(ipr.link_lookup(ifname=name)[0])
    ipr.link("set", index=index, state="up")
    return index


def _add_bridge(ipr: IPRoute, mtu: int) -> int:
    ipr.link(
        "add", ifname=BRIDGE, kind="bridge", mtu=mtu, br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0
    )
    return _up(ipr, BRIDGE)


def _underlay() -> None:
    with IPRoute() as ipr:
        _up(ipr, "lo")
        _add_bridge(ipr, MTU + VXLAN_OVERHEAD)


def _cable(position: int, node_fd: int) -> None:
    with IPRoute() as ipr:
        mtu = MTU + VXLAN_OVERHEAD
        peer = {"ifname": "eth0", "net_ns_fd": node_fd, "mtu": mtu}
        ipr.link("add", ifname=f"node{position}", kind="veth", peer=peer, mtu=mtu)
        index = _up(ipr, f"node{position}")
        ipr.link("set", index=index, master=ipr.link_lookup(ifname=BRIDGE)[0])


def _node(plan: Plan, node: str) -> None:
    with IPRoute() as ipr:
        _up(ipr, "lo")
        eth0 = _up(ipr, "eth0")
        if plan.docker:
            ipr.addr("add", index=eth0, address=plan.underlay_ip(node), prefixlen=24)
            return
        bridge = _add_bridge(ipr, MTU)
        if not plan.overlay:
            ipr.link("set", index=eth0, mtu=MTU, master=bridge)
            return
        own = plan.underlay_ip(node)
        ipr.addr("add", index=eth0, address=own, prefixlen=24)
        ipr.link(
            "add", ifname="ov0", kind="vxlan", mtu=MTU,
            vxlan_id=VXLAN_ID, vxlan_port=VXLAN_PORT, vxlan_local=own, vxlan_link=eth0,
            vxlan_learning=1, vxlan_ttl=64,
        )  # fmt: skip
        ov0 = _up(ipr, "ov0")
        ipr.link("set", index=ov0, master=bridge)
        for other in plan.nodes:
            if other != node:  # broadcasts and what is not learned yet go to everyone
                ipr.fdb("append", ifindex=ov0, lladdr="00:00:00:00:00:00", dst=plan.underlay_ip(other))


def destroy(lab: str) -> None:
    """Remove every namespace of the lab, and its interfaces with them; not there is fine."""
    for path in namespaces(lab):
        with contextlib.suppress(OSError):
            netns.remove(path.name)
    with contextlib.suppress(OSError):
        _NETNS_DIR.rmdir()  # stays if the machine has others
