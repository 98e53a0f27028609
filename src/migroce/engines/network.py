# SPDX-License-Identifier: BSD-3-Clause
"""A container's network: a namespace whose interfaces are veths plugged into the node's bridge.

All functions run in a process that is in the node's network namespace. Plugging in and out is one ioctl
each, and an address moves with its MAC, so that peers need no ARP after a move: one gratuitous ARP (or
unsolicited neighbour advertisement, RFC 4861) tells the bridges the new place.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError, netns

from migroce.engines.context import NodeContext
from migroce.errors import EngineError

T = TypeVar("T")
IFNAME = "eth0"
_SIOCBRADDIF, _SIOCBRDELIF = 0x89A2, 0x89A3
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_SIOCGIFHWADDR = 0x8927
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_BROADCAST = b"\xff" * 6
_ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
_SOLICITATION, _ADVERTISEMENT = 135, 136
_IFA_F_NODAD, _IFA_F_PERMANENT = 0x02, 0x80
_SCOPE_LINK = 253
_ANNOUNCE_GAPS = (0.005, 0.02, 0.08, 0.32)
_NUD_STALE, _NUD_USABLE = 0x04, 0x02 | 0x04 | 0x08 | 0x10


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One veth of a container."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    """With prefix length: IPv4, `10.0.1.7/24`, and IPv6 but for what the kernel makes by itself."""
    outside: str = ""
    """Name of the other end, in the node's namespace."""
    plugged: bool = True

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> Interface:
        return cls(**{**raw, "addresses": tuple(raw["addresses"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the ARP cache, or of IPv6's."""

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


def interface_for(
    ctx: NodeContext, container: str, ip: str, ip6: str | None = None, further: Sequence[str] = ()
) -> Interface:
    """The one interface that containers made by us have, with `ip` as its main address."""
    addresses = (*(f"{each}/{ctx.prefixlen}" for each in (ip, *further)), *([f"{ip6}/64"] if ip6 else []))
    return Interface(IFNAME, mac_for(ip), ctx.mtu, addresses, outside_name(container))


def create(ctx: NodeContext, path: Path, interfaces: list[Interface], *, plugged: bool) -> None:
    """Make the namespace at `path` (below /run/netns) with `interfaces`. Raises EngineError."""
    if ctx.bridge is None and interfaces:
        mend = "bring up a lab, or make the network namespace yourself and name its path in the bundle"
        raise EngineError("network", f"node {ctx.name} has no bridge for containers", mend)
    try:
        netns.create(path.name)
    except OSError as exc:
        raise EngineError("network", f"namespace {path} cannot be made: {exc.strerror or exc}") from exc
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
                _change_address(ipr, "add", index, address)
            ipr.link("set", index=index, state="up")


def _change_address(ipr: IPRoute, action: str, index: int, address: str) -> None:
    ip, prefixlen = address.split("/")
    six = {"family": socket.AF_INET6, "flags": _IFA_F_NODAD} if ":" in ip else {}
    ipr.addr(action, index=index, address=ip, prefixlen=int(prefixlen), **six)


def set_addresses(path: Path, interfaces: list[Interface]) -> None:
    """Give the interfaces in a namespace those addresses, and no others of those `inspect` tells. OSError."""
    now = {each.name: each.addresses for each in inspect(path)}

    def change() -> None:
        with IPRoute() as ipr:
            for each in interfaces:
                index = ipr.link_lookup(ifname=each.name)[0]
                for address in now[each.name]:
                    if address not in each.addresses:
                        _change_address(ipr, "del", index, address)
                for address in each.addresses:  # the first of a subnet takes the others along when it goes
                    with contextlib.suppress(NetlinkError):
                        _change_address(ipr, "add", index, address)

    in_netns(path, change)


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
        for addr in (*ipr.get_addr(family=socket.AF_INET), *ipr.get_addr(family=socket.AF_INET6)):
            lasting = addr["flags"] & _IFA_F_PERMANENT and addr["scope"] != _SCOPE_LINK
            if addr["family"] == socket.AF_INET6 and not lasting:
                continue
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


def _neighbour_discovery(kind: int, mac: str, source: bytes, group: bytes, target: bytes) -> bytes:
    """A solicitation without, an advertisement with the sender's link-layer address (RFC 4861, 4.3, 4.4)."""
    told = kind == _ADVERTISEMENT
    body = struct.pack(">BBHI", kind, 0, 0, 0x20000000 if told else 0) + target  # override: as the MAC says
    if told:
        body += b"\2\1" + _mac_bytes(mac)
    words = source + group + struct.pack(">II", len(body), socket.IPPROTO_ICMPV6) + body
    total = sum(struct.unpack(f">{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack(">H", ~total & 0xFFFF) + body[4:]
    header = struct.pack(">IHBB", 0x60000000, len(body), socket.IPPROTO_ICMPV6, 255) + source + group
    ether = b"\x33\x33" + group[12:] + _mac_bytes(mac) + struct.pack(">H", _ETH_P_IPV6)
    return ether + header + body


def _announcement(mac: str, ip: str) -> bytes:
    if ":" not in ip:
        return _arp(1, _mac_bytes(mac), ip, ip)
    own = ipaddress.IPv6Address(ip).packed
    return _neighbour_discovery(_ADVERTISEMENT, mac, own, _ALL_NODES, own)


class Announcer:
    """Announces addresses (ARP, ND) from inside a container's namespace; opened before it matters."""

    def __init__(self, path: Path, interfaces: list[Interface]) -> None:
        self._frames: list[tuple[socket.socket, bytes]] = []
        self._closed = threading.Event()
        self._repeating: threading.Thread | None = None

        def open_sockets() -> None:
            for each in interfaces:
                raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                raw.bind((each.name, 0))
                for address in each.addresses:
                    ip = address.split("/")[0]
                    self._frames.append((raw, _announcement(each.mac, ip)))

        in_netns(path, open_sockets)

    def send(self) -> None:
        """One announcement per address; a full queue is no error."""
        for raw, frame in self._frames:
            with contextlib.suppress(OSError):
                raw.send(frame)

    def send_on(self) -> None:
        """Several, the first at once: an interface just plugged in drops what it is given for a moment."""
        self.send()
        if self._repeating is None:
            self._repeating = threading.Thread(target=self._repeat, name="announcer", daemon=True)
            self._repeating.start()

    def _repeat(self) -> None:
        for gap in _ANNOUNCE_GAPS:
            if self._closed.wait(gap):
                return
            self.send()

    def close(self) -> None:
        self._closed.set()
        if self._repeating is not None:
            self._repeating.join()
        for raw, _ in self._frames:
            raw.close()


def owner_of(ctx: NodeContext, ip: str, timeout: float = 0.15, tries: int = 2) -> str | None:
    """Ask, from the node's bridge, who has `ip`: its MAC, or None if nobody answers.

    By ARP or, of an IPv6 address, as duplicate address detection does (RFC 4862, 5.4).
    Takes `tries * timeout` seconds when nobody answers. Raises OSError.
    """
    if ctx.bridge is None:
        return None
    protocol = _ETH_P_IPV6 if ":" in ip else _ETH_P_ARP
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol)) as raw:
        raw.bind((ctx.bridge, protocol))
        own = _control(_SIOCGIFHWADDR, struct.pack("16s24x", ctx.bridge.encode()))[18:24]
        if protocol == _ETH_P_ARP:
            question, answerer = _arp(1, own, "0.0.0.0", ip), _arp_answerer
        else:
            target = ipaddress.IPv6Address(ip).packed
            group = bytes.fromhex("ff0200000000000000000001ff") + target[13:]
            question = _neighbour_discovery(_SOLICITATION, own.hex(":"), bytes(16), group, target)
            answerer = _advertiser
        for _ in range(tries):
            raw.send(question)
            end = time.monotonic() + timeout
            while (left := end - time.monotonic()) > 0 and select.select([raw], [], [], left)[0]:
                if (owner := answerer(raw.recv(2048), ip)) is not None:
                    return owner.hex(":")
    return None


def _arp_answerer(frame: bytes, ip: str) -> bytes | None:
    wanted = b"\x08\x06", b"\0\2", ipaddress.IPv4Address(ip).packed
    return frame[22:28] if (frame[12:14], frame[20:22], frame[28:32]) == wanted else None


def _advertiser(frame: bytes, ip: str) -> bytes | None:
    wanted = socket.IPPROTO_ICMPV6, _ADVERTISEMENT, ipaddress.IPv6Address(ip).packed
    return frame[6:12] if len(frame) >= 78 and (frame[20], frame[54], frame[62:78]) == wanted else None


def neighbours(path: Path) -> list[Neighbour]:
    """The usable entries of a namespace's ARP cache, and of IPv6's. Raises OSError."""

    def read() -> list[Neighbour]:
        with IPRoute() as ipr:
            names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in ipr.get_links()}
            return [
                Neighbour(names[entry["ifindex"]], str(entry.get_attr("NDA_DST")), str(mac))
                for family in (socket.AF_INET, socket.AF_INET6)
                for entry in ipr.get_neighbours(family=family)
                if entry["state"] & _NUD_USABLE and (mac := entry.get_attr("NDA_LLADDR"))
            ]

    return in_netns(path, read)


def add_neighbours(path: Path, entries: list[Neighbour]) -> None:
    """Put entries into the ARP cache (or IPv6's) as stale: used, and checked soon after. Raises OSError."""

    def write() -> None:
        with IPRoute() as ipr:
            index = {str(link.get_attr("IFLA_IFNAME")): link["index"] for link in ipr.get_links()}
            for each in entries:
                if each.ifname in index:
                    ipr.neigh(
                        "replace", dst=each.ip, lladdr=each.mac, ifindex=index[each.ifname],
                        state=_NUD_STALE, family=socket.AF_INET6 if ":" in each.ip else socket.AF_INET,
                    )  # fmt: skip

    in_netns(path, write)
