# SPDX-License-Identifier: BSD-3-Clause
"""A container's network: a namespace whose interfaces are veths plugged into the node's bridge.

All functions run in a process that is in the node's network namespace. Plugging in and out is one ioctl
each, and an address moves with its MAC, so that peers need no ARP after a move: one gratuitous ARP tells
the bridges the new place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute, netns

from migroce.engines.context import NodeContext
from migroce.errors import EngineError

T = TypeVar("T")
IFNAME = "eth0"
_SIOCBRADDIF, _SIOCBRDELIF = 0x89A2, 0x89A3
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_SIOCGIFHWADDR = 0x8927
_ETH_P_ARP = 0x0806
_BROADCAST = b"\xff" * 6
_NUD_STALE, _NUD_USABLE = 0x04, 0x02 | 0x04 | 0x08 | 0x10


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One veth of a container."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    """IPv4 with prefix length, `10.0.1.7/24`."""
    outside: str = ""
    """Name of the other end, in the node's namespace."""
    plugged: bool = True

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> Interface:
        return cls(**{**raw, "addresses": tuple(raw["addresses"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the ARP cache."""

    ifname: str
    ip: str
    mac: str


def in_netns(path: Path | str, work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own inside the network namespace at `path`; its result."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            netns.setns(str(path))
            done.append(work())
        except BaseException as exc:  # noqa: BLE001 - handed to the caller
            failed.append(exc)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def outside_name(container: str, position: int = 0) -> str:
    """Name of the node's end of a container's interface."""
    return f"mv{hashlib.sha1(container.encode()).hexdigest()[:11]}{position:x}"


def mac_for(ip: str) -> str:
    """The MAC that belongs to an address: it moves along with it."""
    return "02:6d:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(ip).packed)


def interface_for(ctx: NodeContext, container: str, ip: str) -> Interface:
    """The one interface that containers made by us have."""
    return Interface(IFNAME, mac_for(ip), ctx.mtu, (f"{ip}/{ctx.prefixlen}",), outside_name(container))


def create(ctx: NodeContext, path: Path, interfaces: list[Interface], *, plugged: bool) -> None:
    """Make the namespace at `path` (below /run/netns) with `interfaces`. Raises EngineError."""
    if ctx.bridge is None and interfaces:
        mend = "bring up a lab, or make the network namespace yourself and name its path in the bundle"
        raise EngineError("network", f"node {ctx.name} has no bridge for containers", mend)
    try:
        netns.create(path.name)
    except OSError as exc:
        raise EngineError("network", f"namespace {path} cannot be made: {exc.strerror}") from exc
    try:
        in_netns(path, lambda: _create_inside(interfaces))
        if plugged:
            for interface in interfaces:
                plug(ctx, interface.outside)
    except Exception as exc:
        remove(path)
        names = " ".join(address for interface in interfaces for address in interface.addresses)
        raise EngineError("network", f"namespace {path.name} with {names} cannot be made: {exc}") from exc


def _create_inside(interfaces: list[Interface]) -> None:
    with IPRoute() as ipr:
        ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")
        for each in interfaces:
            # The other end goes to the node's namespace, in which the process as a whole is.
            peer = {"ifname": each.outside, "net_ns_pid": os.getpid(), "mtu": each.mtu}
            ipr.link("add", ifname=each.name, kind="veth", peer=peer, address=each.mac, mtu=each.mtu)
            index = ipr.link_lookup(ifname=each.name)[0]
            for address in each.addresses:
                ip, prefixlen = address.split("/")
                ipr.addr("add", index=index, address=ip, prefixlen=int(prefixlen))
            ipr.link("set", index=index, state="up")


def remove(path: Path) -> None:
    """Remove a namespace and its interfaces; not there is fine."""
    with contextlib.suppress(OSError):
        for each in inspect(path):
            delete_link(each.outside)
    with contextlib.suppress(OSError):
        netns.remove(path.name)


def delete_link(name: str) -> None:
    """Delete an interface of the node (and so its other end); not there is fine."""
    with contextlib.suppress(Exception), IPRoute() as ipr:
        ipr.link("del", index=socket.if_nametoindex(name))


def inspect(path: Path) -> list[Interface]:
    """The veths in a namespace whose other ends are on this node. Raises OSError."""
    return [_outside(raw) for raw in in_netns(path, _inspect_inside)]


def _inspect_inside() -> list[tuple[Interface, int]]:
    found = []
    with IPRoute() as ipr:
        addresses: dict[int, list[str]] = {}
        for addr in ipr.get_addr(family=socket.AF_INET):
            text = f"{addr.get_attr('IFA_ADDRESS')}/{addr['prefixlen']}"
            addresses.setdefault(addr["index"], []).append(text)
        for link in ipr.get_links():
            info = link.get_attr("IFLA_LINKINFO")
            if info is None or info.get_attr("IFLA_INFO_KIND") != "veth":
                continue
            name, mac = str(link.get_attr("IFLA_IFNAME")), str(link.get_attr("IFLA_ADDRESS"))
            own = tuple(addresses.get(link["index"], ()))
            inside = Interface(name, mac, int(link.get_attr("IFLA_MTU")), own)
            found.append((inside, int(link.get_attr("IFLA_LINK") or 0)))
    return found


def _outside(raw: tuple[Interface, int]) -> Interface:
    inside, index = raw
    try:
        name = socket.if_indextoname(index)
    except OSError:
        return dataclasses.replace(inside, plugged=False)
    with IPRoute() as ipr:
        plugged = any(link.get_attr("IFLA_MASTER") is not None for link in ipr.get_links(index))
    return dataclasses.replace(inside, outside=name, plugged=plugged)


def _control(request: int, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return fcntl.ioctl(control, request, argument)


def plug(ctx: NodeContext, outside: str) -> None:
    """Bring an interface into the node's bridge; in it already is fine. Raises OSError."""
    name = outside.encode()
    flags = struct.unpack_from("16sH", _control(_SIOCGIFFLAGS, struct.pack("16sH22x", name, 0)))[1]
    _control(_SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
    try:
        index = socket.if_nametoindex(outside)
        _control(_SIOCBRADDIF, struct.pack("16si20x", (ctx.bridge or "").encode(), index))
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise


def unplug(ctx: NodeContext, outside: str) -> None:
    """Take an interface out of the node's bridge; gone or out already is fine."""
    with contextlib.suppress(OSError):
        index = socket.if_nametoindex(outside)
        _control(_SIOCBRDELIF, struct.pack("16si20x", (ctx.bridge or "").encode(), index))


def _mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _arp(operation: int, sender_mac: bytes, sender_ip: str, target_ip: str) -> bytes:
    return (
        _BROADCAST
        + sender_mac
        + struct.pack(">HHHBBH", _ETH_P_ARP, 1, 0x0800, 6, 4, operation)
        + sender_mac
        + ipaddress.IPv4Address(sender_ip).packed
        + (_BROADCAST if operation == 2 else bytes(6))
        + ipaddress.IPv4Address(target_ip).packed
    )


class Announcer:
    """Sends gratuitous ARPs from inside a container's namespace; opened before it matters."""

    def __init__(self, path: Path, interfaces: list[Interface]) -> None:
        self._frames: list[tuple[socket.socket, bytes]] = []

        def open_sockets() -> None:
            for each in interfaces:
                raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                raw.bind((each.name, 0))
                for address in each.addresses:
                    ip = address.split("/")[0]
                    self._frames.append((raw, _arp(1, _mac_bytes(each.mac), ip, ip)))

        in_netns(path, open_sockets)

    def send(self) -> None:
        """One announcement per address; a full queue is no error."""
        for raw, frame in self._frames:
            with contextlib.suppress(OSError):
                raw.send(frame)

    def close(self) -> None:
        for raw, _ in self._frames:
            raw.close()


def owner_of(ctx: NodeContext, ip: str, timeout: float = 0.15, tries: int = 2) -> str | None:
    """Ask by ARP, from the node's bridge, who has `ip`: its MAC, or None if nobody answers.

    Takes `tries * timeout` seconds when nobody does. Raises OSError.
    """
    if ctx.bridge is None:
        return None
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP)) as raw:
        raw.bind((ctx.bridge, _ETH_P_ARP))
        own = _control(_SIOCGIFHWADDR, struct.pack("16s24x", ctx.bridge.encode()))[18:24]
        for _ in range(tries):
            raw.send(_arp(1, own, "0.0.0.0", ip))
            end = time.monotonic() + timeout
            while (left := end - time.monotonic()) > 0 and select.select([raw], [], [], left)[0]:
                frame = raw.recv(2048)
                answer = frame[20:22] == b"\0\2" and frame[28:32] == ipaddress.IPv4Address(ip).packed
                if frame[12:14] == b"\x08\x06" and answer:
                    return ":".join(f"{byte:02x}" for byte in frame[22:28])
    return None


def neighbours(path: Path) -> list[Neighbour]:
    """The usable entries of a namespace's ARP cache. Raises OSError."""

    def read() -> list[Neighbour]:
        with IPRoute() as ipr:
            names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in ipr.get_links()}
            return [
                Neighbour(names[entry["ifindex"]], str(entry.get_attr("NDA_DST")), str(mac))
                for entry in ipr.get_neighbours(family=socket.AF_INET)
                if entry["state"] & _NUD_USABLE and (mac := entry.get_attr("NDA_LLADDR"))
            ]

    return in_netns(path, read)


def add_neighbours(path: Path, entries: list[Neighbour]) -> None:
    """Put entries into a namespace's ARP cache as stale: used at once, checked soon after. Raises OSError."""

    def write() -> None:
        with IPRoute() as ipr:
            index = {str(link.get_attr("IFLA_IFNAME")): link["index"] for link in ipr.get_links()}
            for each in entries:
                if each.ifname in index:
                    ipr.neigh(
                        "replace", dst=each.ip, lladdr=each.mac, ifindex=index[each.ifname], state=_NUD_STALE
                    )

    in_netns(path, write)
