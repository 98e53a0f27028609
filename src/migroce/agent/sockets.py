# SPDX-License-Identifier: BSD-3-Clause
"""The UDP sockets behind port 4791: one per process, steered to by the destination QPN.

Processes that share an address are an SO_REUSEPORT group with a classic BPF program which turns the
top six bits of the destination QPN (byte 5 of the UDP payload) into an index of the group. The kernel
appends new sockets and, when one is closed, moves the last one into its place; the agent keeps a
duplicate of each socket, so it decides when that happens, and follows it in `Group.members`. No socket
without a process stays in a group: so when the agent is killed no index changes and steering goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from migroce.agent import addresses, netns
from migroce.agent.errors import AgentError, errno_name
from migroce.agent.slots import SlotTable
from migroce.control import MAX_FURTHER, SLOT_SHIFT
from migroce.icrc import ROCE_PORT

RCVBUF = 64 << 20  # what UC and UD may have under way: nothing holds their senders back
SNDBUF = 4 << 20

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_SO_ATTACH_REUSEPORT_CBPF = 51
_IP_FREEBIND, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 15, 10, 2
_IPV6_MTU_DISCOVER, _IPV6_FREEBIND = 23, 78
UDP_GRO = 104
UDP_NO_CHECK6_RX = 102

_V4_PREFIX = b"\0" * 10 + b"\xff\xff"
ANY4, ANY6 = b"\0" * 4, b"\0" * 16

Insn = tuple[int, int, int, int]
"""A classic BPF instruction: code, jump if true, jump if false, constant."""

LDW, LDH, LDB, RSH, AND, JA, JEQ, RET_A, RET_K = 0x20, 0x28, 0x30, 0x74, 0x54, 0x05, 0x15, 0x16, 0x06


def attach_bpf(sock: socket.socket, option: int, program: list[Insn]) -> None:
    """Attach a classic BPF program with one of the SO_ATTACH_* options."""
    code = create_string_buffer(b"".join(struct.pack("HBBI", *insn) for insn in program))
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HL", len(program), addressof(code)))


def attach_filter(sock: socket.socket, program: list[Insn]) -> None:
    """Let the socket receive only what the program accepts."""
    attach_bpf(sock, _SO_ATTACH_FILTER, program)


def drop_all(sock: socket.socket) -> None:
    """Let the socket receive nothing more: it only keeps the port."""
    attach_filter(sock, [(RET_K, 0, 0, 0)])


def accept_all(sock: socket.socket) -> None:
    """Undo `drop_all`."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


_CM_REQ, _CM_SIDR_REQ, _CM_SIDR_REP = 0x10, 0x17, 0x18


def _by_slot(index_of: dict[int, int]) -> list[Insn]:
    """From the slot in A to the index. Packets for other slots go to anyone, who drops them."""
    if all(slot == index for slot, index in index_of.items()):
        return [(RET_A, 0, 0, 0)]
    chain: list[Insn] = []
    for slot, index in index_of.items():
        chain += [(JEQ, 0, 1, slot), (RET_K, 0, 0, index)]
    return [*chain, (RET_K, 0, 0, 0)]


def steering(index_of: dict[int, int], services: dict[int, int] | None = None) -> list[Insn]:
    """The program for slots at these indices. `services`: who listens on what, by slot.

    Packets are for the slot in the destination QPN. Those for QP 1 are CM datagrams: requests are
    for who listens on their service id (its low half is at byte 56), or for the lowest slot, which refuses
    them; all others carry an id that their receiver has drawn, with its slot on top: SIDR_REP at byte 44,
    the others at 48.
    """
    by_slot = _by_slot(index_of)
    ports: list[Insn] = [(LDW, 0, 0, 56)]
    for service, slot in (services or {}).items():
        if slot in index_of:
            ports += [(JEQ, 0, 1, service), (RET_K, 0, 0, index_of[slot])]
    ports.append((RET_K, 0, 0, index_of[min(index_of)] if index_of else 0))
    head: list[Insn] = [(LDW, 0, 0, 4), (AND, 0, 0, 0xFFFFFF), (JEQ, 2, 0, 1), (RSH, 0, 0, SLOT_SHIFT)]
    requests: list[Insn] = [(LDH, 0, 0, 36), (JEQ, 7, 0, _CM_REQ), (JEQ, 6, 0, _CM_SIDR_REQ)]
    answers: list[Insn] = [
        (JEQ, 0, 2, _CM_SIDR_REP), (LDB, 0, 0, 44), (JA, 0, 0, 1), (LDB, 0, 0, 48), (RSH, 0, 0, 2),
    ]  # fmt: skip
    # head | jump to by_slot | requests (to ports) | answers | jump to by_slot | ports | by_slot
    return [
        *head, (JA, 0, 0, len(requests) + len(answers) + 1 + len(ports)), *requests, *answers,
        (JA, 0, 0, len(ports)), *ports, *by_slot,
    ]  # fmt: skip


def bind_address(gid: bytes) -> bytes | None:
    """The IPv4 address to bind for a GID; None when it is not an IPv4 one."""
    return gid[12:] if gid[:12] == _V4_PREFIX else None


def make_udp(family: socket.AddressFamily, address: bytes, *, freebind: bool) -> socket.socket:
    """A bound UDP socket of a group, in the calling thread's namespace. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for forced, plain, size in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF, RCVBUF),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF, SNDBUF),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, plain, size)
        # GRO asks any socket of the group, so all must agree, also before a process set its own up.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_RX, 1)  # other RoCE devices send no checksum
        if freebind:  # at a destination the address may come up a little later
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        dont_fragment(sock)
        sock.bind((socket.inet_ntop(family, address), ROCE_PORT))
    except BaseException:
        sock.close()
        raise
    return sock


def dont_fragment(sock: socket.socket) -> None:
    """DF set, and with it IP id 0: the ICRC covers both."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_DO)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)


@dataclass(slots=True, eq=False)
class Member:
    """A socket's place in its group.

    Without `sock` it is either awaited (`slot` >= 0: its process has not come back to a restarted
    agent yet) or a ghost (`slot` -1: closed by us, but somebody, such as a forked child, keeps it open).
    """

    slot: int
    inode: int
    sock: socket.socket | None


def after_closing(members: list[Member], gone: Sequence[Member]) -> list[Member] | None:
    """The kernel's order after `gone` were closed: each time the last takes the place of the closed.

    None when the result depends on the order of closing, which is not known.
    """
    if len(gone) > 5:
        return None
    results = []
    for order in permutations(gone):
        left = list(members)
        for member in order:
            at = left.index(member)
            last = left.pop()
            if last is not member:
                left[at] = last
        results.append(left)
    return results[0] if all(r == results[0] for r in results) else None


@dataclass(slots=True, eq=False)
class Group:
    """The sockets of one family and address, in the kernel's order."""

    family: socket.AddressFamily
    address: bytes
    members: list[Member] = field(default_factory=list)
    services: dict[int, list[int]] = field(default_factory=dict)
    """Who listens on what, the first before others: the port's table, shared by its groups."""
    mains: dict[int, bytes] = field(default_factory=dict)
    """Each slot's main address: the port's table, too."""
    uncertain: bool = False
    """The kernel's order is not known: the sockets must be made anew."""

    def find(self, slot: int) -> socket.socket | None:
        """The slot's socket, or None."""
        return next((m.sock for m in self.members if m.slot == slot and m.sock is not None), None)

    def append(self, slot: int, sock: socket.socket) -> None:
        """A socket just bound: the kernel has put it at the end."""
        self.members.append(Member(slot, inode_of(sock), sock))
        self.attach()

    def adopt(self, slot: int, sock: socket.socket) -> None:
        """A socket that was there before the agent was restarted."""
        inode = inode_of(sock)
        for member in self.members:
            if member.inode == inode:
                member.slot, member.sock = slot, sock
                break
        else:
            self.uncertain = self.uncertain or bool(self.members)
            self.members.append(Member(slot, inode, sock))
        self.attach()

    def remove(self, slot: int) -> bool:
        """Close a slot's socket; its place remains until `sweep`. False: it had none."""
        for member in self.members:
            if member.slot == slot:
                if member.sock is not None:
                    member.sock.close()
                member.sock, member.slot = None, -1
                return True
        return False

    def sweep(self, open_inodes: set[int]) -> bool:
        """Follow the kernel: drop members whose socket is gone. True: some are still kept open."""
        gone = [m for m in self.members if m.sock is None and m.inode not in open_inodes]
        if gone:
            left = after_closing(self.members, gone)
            if left is None:
                self.uncertain = True
                left = [m for m in self.members if m not in gone]
            self.members = left
            self.attach()
        return any(m.sock is None for m in self.members)

    def attach(self) -> None:
        """Tell the kernel the order, unless that is uncertain: then what it has is the better guess."""
        sock = next((m.sock for m in self.members if m.sock is not None), None)
        if sock is None or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
            return
        if len(self.members) == 1:
            self.uncertain = False
        if not self.uncertain:
            index_of = {m.slot: i for i, m in enumerate(self.members) if m.slot >= 0}
            attach_bpf(sock, _SO_ATTACH_REUSEPORT_CBPF, steering(index_of, self._listeners(index_of)))

    def _listeners(self, index_of: Iterable[int]) -> dict[int, int]:
        """The slot for each service: one whose main address this is, or who came first."""
        found = {}
        for service, slots in self.services.items():
            if here := [slot for slot in slots if slot in index_of]:
                found[service] = next((s for s in here if self.mains.get(s) == self.address), here[0])
        return found


class Port:
    """Port 4791 of one network namespace: its slots and groups. Closed when the last slot is free."""

    def __init__(self, netns_fd: int) -> None:
        self.netns_fd = netns_fd
        self.key = netns.key_of(netns_fd)
        self.slots: SlotTable[object] = SlotTable()
        self.groups: dict[bytes, Group] = {}
        self.services: dict[int, list[int]] = {}
        self.mains: dict[int, bytes] = {}
        self._interfaces: dict[int, str] = {}
        """The interface that a slot's main address is or was on."""
        self.no_ipv6 = False

    def group(self, address: bytes) -> Group:
        """The group of an IPv4 (4 bytes) or IPv6 (16 bytes) address, made when needed."""
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        if address not in self.groups:
            self.groups[address] = Group(family, address, services=self.services, mains=self.mains)
        return self.groups[address]

    def sockets(self, slot: int, *, further: bool = True) -> list[socket.socket]:
        """The slot's sockets: v4 of the main address, v6, then further ones of v4."""
        main = self.mains.get(slot)
        order = sorted(self.groups.values(), key=lambda g: (g.address != main, g.family == socket.AF_INET))
        wanted = [g for g in order if further or g.address == main or g.family == socket.AF_INET6]
        return [s for g in wanted if (s := g.find(slot)) is not None]

    def open(self, slot: int, gid: bytes, *, fixed: bool) -> list[socket.socket]:
        """The slot's main sockets, made if need be: v4 bound to `gid` (wildcard when it is none), v6.

        `fixed`: the address was given by the administrator and need not be up yet. AgentError.
        """
        have = self.sockets(slot, further=False)
        if have:
            return have
        try:
            return netns.run_in(self.netns_fd, lambda: self._open(slot, gid, fixed))
        except OSError as e:
            self.release_sockets(slot)
            raise AgentError(f"cannot open UDP port {ROCE_PORT}: {_why(e)}", errno_name(e.errno)) from None

    def _open(self, slot: int, gid: bytes, fixed: bool) -> list[socket.socket]:
        address = bind_address(gid) or ANY4
        try:
            sock = make_udp(socket.AF_INET, address, freebind=fixed)
        except OSError as e:
            if fixed or address == ANY4 or e.errno != errno.EADDRNOTAVAIL:
                raise  # a process may claim an address that is not here; then it gets the wildcard
            address = ANY4
            sock = make_udp(socket.AF_INET, address, freebind=False)
        self.mains[slot] = address
        self.group(address).append(slot, sock)
        made = [sock]
        if not self.no_ipv6:
            try:
                sock = make_udp(socket.AF_INET6, ANY6, freebind=False)
                self.group(ANY6).append(slot, sock)
                made.append(sock)
            except OSError as e:
                if e.errno == errno.EADDRINUSE:
                    raise
                self.no_ipv6 = True
        return made

    def follow(self, slot: int, have: Collection[bytes]) -> list[socket.socket]:
        """The slot's sockets of the other addresses on its main one's interface, but those of `have`.

        They are made if need be; those of addresses that have gone and are not in `have` any more are closed
        (then `sweep`). An address that somebody else has the port of is left out. GIDs; AgentError.
        """
        main = self.mains.get(slot)
        if main is None or main == ANY4:
            return []
        try:
            return netns.run_in(self.netns_fd, lambda: self._follow(slot, main, have))
        except OSError as e:
            raise AgentError(f"no addresses of interfaces: {e.strerror}", errno_name(e.errno)) from None

    def _follow(self, slot: int, main: bytes, have: Collection[bytes]) -> list[socket.socket]:
        listed = addresses.listed()
        for interface in [name for name, address in listed if address == main]:
            self._interfaces[slot] = interface
        on = self._interfaces.get(slot)
        here = [address for name, address in listed if name == on and address != main][:MAX_FURTHER]
        for address, group in self.groups.items():
            if len(address) == 4 and address not in (*here, main) and _V4_PREFIX + address not in have:
                group.remove(slot)
        found = []
        for address in here:
            sock = self.group(address).find(slot)
            if sock is None:
                try:
                    sock = make_udp(socket.AF_INET, address, freebind=False)
                except OSError:
                    continue
                self.group(address).append(slot, sock)
            if _V4_PREFIX + address not in have:
                found.append(sock)
        return found

    def adopt(self, slot: int, socks: list[socket.socket]) -> None:
        """Take in sockets that a process brought along (the agent was restarted), the main ones first."""
        for sock in socks:
            if sock.family == socket.AF_INET:
                self.mains.setdefault(slot, _bound(sock))
            self.group(_bound(sock)).adopt(slot, sock)

    def listens(self, slot: int, services: Sequence[int]) -> None:
        """A process says all that it listens on. What another one has stays the other's (`_listeners`)."""
        self._listen_no_more(slot, services)
        for service in services:
            slots = self.services.setdefault(service, [])
            if slot not in slots:
                slots.append(slot)
        for group in self.groups.values():
            group.attach()

    def _listen_no_more(self, slot: int, but: Sequence[int] = ()) -> None:
        for service, slots in list(self.services.items()):
            if slot in slots and service not in but:
                slots.remove(slot)
                if not slots:
                    del self.services[service]

    def release_sockets(self, slot: int) -> bool:
        """Close the slot's sockets. True: `sweep` should be called now and then until it is False."""
        self._listen_no_more(slot)
        self.mains.pop(slot, None)
        self._interfaces.pop(slot, None)
        found = [group.remove(slot) for group in self.groups.values()]
        return any(found) and self.sweep()

    def sweep(self) -> bool:
        """Follow the kernel's order after closed sockets; True while others keep some open."""
        waiting = [g for g in self.groups.values() if any(m.sock is None for m in g.members)]
        if not waiting:
            return False
        inodes: set[int] = set()
        with contextlib.suppress(OSError):  # cannot be looked at: believe that what we close is gone
            inodes = netns.run_in(self.netns_fd, udp_inodes)
        left = [group.sweep(inodes) for group in waiting]
        return any(left)

    @property
    def uncertain(self) -> bool:
        """Whether packets may be steered to the wrong process."""
        return any(group.uncertain for group in self.groups.values())

    def to_state(self) -> dict[str, list[list[int]]]:
        """The groups' order, for the state file."""
        return {a.hex(): [[m.slot, m.inode] for m in g.members] for a, g in self.groups.items()}

    def from_state(self, state: dict[str, list[list[int]]]) -> None:
        """The order that a killed agent left: its sockets are awaited."""
        for address, members in state.items():
            self.group(bytes.fromhex(address)).members = [Member(slot, ino, None) for slot, ino in members]

    def close(self) -> None:
        """Close everything."""
        for group in self.groups.values():
            for member in group.members:
                if member.sock is not None:
                    member.sock.close()
        self.groups.clear()
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


def _why(e: OSError) -> str:
    if e.errno == errno.EADDRINUSE:
        return "it is in use by a process outside the agent (or by the kernel's rdma_rxe)"
    return str(e.strerror)


def inode_of(sock: socket.socket) -> int:
    """A socket's identity, as /proc/net/udp shows it."""
    return os.fstat(sock.fileno()).st_ino


def _bound(sock: socket.socket) -> bytes:
    name: str = sock.getsockname()[0]
    return socket.inet_pton(sock.family, name.split("%")[0])


def udp_inodes() -> set[int]:
    """Inodes of all UDP sockets of the calling thread's namespace."""
    found: set[int] = set()
    for name in ("udp", "udp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
                found.add(int(line.split()[9]))
    return found


def check_adopted(fds: list[int]) -> list[socket.socket]:
    """Sockets from descriptors that a process sent; they must be UDP sockets on our port.

    Takes the descriptors over from the list. AgentError EINVAL otherwise (all are closed then).
    """
    socks: list[socket.socket] = []
    try:
        while fds:
            sock = socket.socket(fileno=fds.pop(0))
            socks.append(sock)
            if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_DGRAM:
                raise ValueError("not a UDP socket")
            if sock.proto != socket.IPPROTO_UDP or sock.getsockname()[1] != ROCE_PORT:
                raise ValueError("not a UDP socket on our port")
            sock.setblocking(False)
        six = [s for s in socks if s.family == socket.AF_INET6]
        if not socks or len(six) > 1 or len({_bound(s) for s in socks}) != len(socks):
            raise ValueError("not one socket of each address")
    except (OSError, ValueError) as e:
        for sock in socks:
            sock.close()
        raise AgentError(f"the process sent bad sockets: {e}", "EINVAL") from None
    return socks
