# SPDX-License-Identifier: BSD-3-Clause
"""The tests' own network namespace, without a name: it goes when the last process in it does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.interop.ends import V4, V6
from tests.interop.guest import DATA_MAC, MTU, TAP

BRIDGE = "br0"
OURS = {V4: "10.77.0.1", V6: "fd77::1"}
KERNELS = {V4: "10.77.0.2", V6: "fd77::2"}
LAB = {V4: "10.0.1.254", V6: "fd01::fe"}
"""The machine's addresses in the subnet of a lab."""
PREFIXES = {V4: 24, V6: 64}
_CLONE_NEWNET = 0x40000000
_TABLE = "interop"


def ip(*args: str) -> None:
    """ip(8). Raises CalledProcessError."""
    subprocess.run(["ip", *args], check=True)


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """Move the calling thread (and what it starts) into a namespace with a bridge and the machine's tap."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be made")
    try:
        tun = Path("/dev/net/tun")
        if not tun.exists():
            tun.parent.mkdir(exist_ok=True)
            os.mknod(tun, 0o600 | 0o020000, os.makedev(10, 200))
        ip("link", "set", "lo", "up")
        ip("link", "add", BRIDGE, "mtu", str(MTU), "type", "bridge", "forward_delay", "0")
        ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
        ip("link", "set", TAP, "mtu", str(MTU), "master", BRIDGE, "up")
        ip("addr", "add", f"{OURS[V4]}/24", "dev", BRIDGE)
        ip("addr", "add", f"{OURS[V6]}/64", "dev", BRIDGE, "nodad")
        ip("link", "set", BRIDGE, "up")
        # The machine may be too slow to tell; of a burst to an unknown neighbour the kernel keeps 200 KB.
        for address in KERNELS.values():
            ip("neigh", "replace", address, "lladdr", DATA_MAC, "dev", BRIDGE, "nud", "permanent")
        yield
    finally:
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)


@contextlib.contextmanager
def plugged_into(node: str) -> Iterator[None]:
    """A cable from our bridge to that of a lab's node (the name of its namespace)."""
    ip("link", "add", "cable0", "mtu", str(MTU), "type", "veth", "peer", "name", "cable1", "mtu", str(MTU))
    try:
        ip("link", "set", "cable0", "master", BRIDGE, "up")
        ip("link", "set", "cable1", "netns", node)
        ip("-n", node, "link", "set", "cable1", "master", BRIDGE, "up")
        yield
    finally:
        ip("link", "del", "cable0")


@contextlib.contextmanager
def loss(received: int | None = None, sent: int | None = None) -> Iterator[None]:
    """Lose every `received`th RoCE packet that comes from the machine and every `sent`th to it.

    Counted, not drawn by chance: the same packets are lost each time. A train (UDP segmentation) counts
    as one packet on its way out, and is lost as a whole.
    """
    every = (("input", received), ("output", sent))
    with _rules("inet", _TABLE, [(hook, f"{_each(n)} drop") for hook, n in every if n]):
        yield


@contextlib.contextmanager
def loss_on_the_cable(every: int | None, family: int) -> Iterator[None]:
    """Lose every `every`th RoCE packet between a lab and the machine, in each direction; None: none."""
    if every is None:
        yield
        return
    kind = {V4: "ip", V6: "ip6"}[family]
    rules = [
        ("forward", f'iifname "{port}" ether type {kind} {_each(every)} counter drop')
        for port in (TAP, "cable0")
    ]
    with _rules("bridge", _TABLE, rules, counted="lost"):
        yield


@contextlib.contextmanager
def damage(first: int, bits: int, value: int, *, every: int) -> Iterator[None]:
    """Overwrite bits (counted from the UDP header's first) of every `every`th RoCE packet, both ways.

    Of a train (UDP segmentation) the first packet is damaged.
    """
    rule = f"{_each(every)} counter @th,{first},{bits} set {value:#x}"
    with _rules("inet", f"{_TABLE}_damage", [("input", rule), ("output", rule)], counted="damaged"):
        yield


def _each(number: int) -> str:
    """What every `number`th RoCE packet matches."""
    return f"udp dport 4791 numgen inc mod {number} == {number - 1}"


@contextlib.contextmanager
def _rules(family: str, table: str, rules: Iterable[tuple[str, str]], *, counted: str = "") -> Iterator[None]:
    """nftables rules as (hook, rule). `counted`: what each must have done to a packet in the end."""
    script = f"add table {family} {table}\n"
    for hook, rule in rules:  # a chain that is there already is fine
        script += f"add chain {family} {table} {hook} {{ type filter hook {hook} priority 0; }}\n"
        script += f"add rule {family} {table} {hook} {rule}\n"
    _nft(script)
    try:
        yield
        if counted:
            listed = subprocess.run(
                ["nft", "list", "table", family, table], check=True, capture_output=True, text=True
            ).stdout
            assert listed.count("counter packets 0 ") == 0, f"nothing was {counted}: {listed}"
    finally:
        _nft(f"delete table {family} {table}\n")


def _nft(script: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True)
