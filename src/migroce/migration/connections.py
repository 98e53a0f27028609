# SPDX-License-Identifier: BSD-3-Clause
"""What the connections of a moving container ask for: who follows to another address, what was sent again."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from migroce.engines import network
from migroce.errors import EngineError, MigrationError

ROCE_PORT = 4791
_CONNECTED = ("RTR", "RTS", "SQD", "SQE")
_TCP_TIME_WAIT = 6
_HEADERS = 80
"""Bytes of an IP packet that are not RDMA payload, at most: as rdma_rxe and native/net/addr.c have it."""


# -- another address ---------------------------------------------------------------------------------------


def at_another_address(about: Mapping[str, Any], ip: str) -> dict[str, Any]:
    """What a source says of its container (`describe`), as if it had the address `ip`. Raises MigrationError.

    The interface that has the container's address gets the new one, with the same prefix length, and the
    MAC that belongs to it; its other addresses it keeps, which are at the old one until the move
    (`macs_before`).
    """
    name, old = about["container"], own_address(about)
    try:
        new = ipaddress.IPv4Address(ip)
    except ValueError as exc:
        raise MigrationError("check", f"{ip} is no IPv4 address", "give one like 10.0.1.9") from exc
    interfaces = []
    for raw in about["interfaces"]:
        addresses = list(raw["addresses"])
        for position, each in enumerate(addresses):
            if each.split("/")[0] != old:
                if each.split("/")[0] == ip:
                    raise MigrationError("check", f"{ip} is an address of {name} already")
                continue
            subnet = ipaddress.IPv4Interface(each).network
            if new not in subnet:
                mend = f"take a free one of {subnet}"
                raise MigrationError("check", f"{ip} is not in {name}'s network {subnet}", mend)
            addresses[position] = f"{ip}/{subnet.prefixlen}"
            raw = {**raw, "mac": network.mac_for(ip)}
        interfaces.append({**raw, "addresses": addresses})
    before = [raw["mac"] for raw in about["interfaces"]]
    metadata = {**about["metadata"], "ip": ip}
    return {**about, "interfaces": interfaces, "macs_before": before, "metadata": metadata}


def own_address(about: Mapping[str, Any]) -> str:
    """The address that a container is known by. Raises MigrationError if there is no single one of ours."""
    if about.get("engine", "oci") != "oci":
        reason = f"{about['container']} keeps its address, as Docker has given it"
        raise MigrationError("check", reason, "move it without --ip; only plain containers can take another")
    every = (each.split("/")[0] for raw in about["interfaces"] for each in raw["addresses"])
    known = [each for each in every if ":" not in each]
    named = about["metadata"].get("ip")
    if named in known:
        return str(named)
    if len(known) == 1:
        return str(known[0])
    has = ", ".join(known) or "none"
    reason = f"which address of {about['container']} is to change is not clear (it has {has})"
    raise MigrationError("check", reason, "move it without --ip")


def check_sockets(container: str, old: str, pid: int) -> None:
    """Refuse a change of the address `old` for processes with sockets bound to it. Raises EngineError.

    The device's own do not count. `pid` is any process of the container.
    """
    for kind in ("tcp", "udp"):
        bound = []
        for table in (kind, f"{kind}6"):
            with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                bound += _bound(Path(f"/proc/{pid}/net/{table}").read_text(), kind, old)
        if bound:
            ports = ", ".join(str(port) for port in sorted(set(bound))[:5])
            reason = f"{container} has {len(bound)} {kind.upper()} sockets bound to {old} (port {ports})"
            mend = "they cannot change their address: end those connections first, or move without --ip"
            raise EngineError("check", reason, mend)


def _bound(table: str, kind: str, address: str) -> list[int]:
    """Local ports of the sockets in a /proc/net/{tcp,udp}{,6} `table` that are bound to `address`."""
    want = f"{int.from_bytes(ipaddress.IPv4Address(address).packed, sys.byteorder):08X}"
    mapped = f"{0:016X}{int.from_bytes(bytes((0, 0, 255, 255)), sys.byteorder):08X}{want}"
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        ip, port = fields[1].split(":")
        waiting = kind == "tcp" and int(fields[3], 16) == _TCP_TIME_WAIT
        device = kind == "udp" and int(port, 16) == ROCE_PORT
        if ip in (want, mapped) and not waiting and not device:
            found.append(int(port, 16))
    return found


def check_peers(container: str, qps: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a change of address if some peer of `qps` (as `Dump.to_json`) would not follow. Raises."""
    stuck = [qp for qp in qps if qp["state"] in _CONNECTED and not _follows(qp)]
    if not stuck:
        return
    first = stuck[0]
    peer = f"QP {first['qpn']:#x} ({first['type']})"
    if first["type"] != "UD":
        peer += f" to {first['peer_gid']}"
    reason = f"{len(stuck)} QPs of {container} cannot take their peers along to another address, like {peer}"
    mend = "move it without --ip; or with --force, and these connections end"
    raise MigrationError("check", reason, mend)


def _follows(qp: Mapping[str, Any]) -> bool:
    """Its peer speaks the extension and holds our token: it believes a RESUME from elsewhere."""
    return qp["type"] not in ("UD", "UC") and bool(qp["peer_capable"]) and bool(qp["token_acked"])


def settled(qps: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all capable peers have acknowledged the move."""
    return not any(qp["mstate"] in ("stopped", "resuming") for qp in qps if qp["state"] in _CONNECTED)


def of_container(ps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The QPs in an agent's answer to `ps`. Raises EngineError if a process did not tell them."""
    found = []
    for container in ps:
        for context in container["contexts"]:
            if context.get("dump") is None:
                raise EngineError("check", f"{context['comm']} shows no QPs: {context.get('error')}")
            found += context["dump"]["qps"]
    return found


# -- a smaller MTU -----------------------------------------------------------------------------------------


def path_mtu(ps: Iterable[Mapping[str, Any]]) -> int:
    """The largest path MTU, in bytes, of the connected QPs in an agent's answer to `ps`; 0: none."""
    dumps = (context.get("dump") for container in ps for context in container["contexts"])
    qps = (qp for each in dumps if each is not None for qp in each["qps"])
    return max((int(qp["path_mtu"]) for qp in qps if qp["state"] in _CONNECTED), default=0)


def users(ps: Iterable[Mapping[str, Any]]) -> list[int]:
    """The processes that have the device open, in an agent's answer to `ps`."""
    return [int(context["pid"]) for container in ps for context in container["contexts"]]


def check_mtu(about: Mapping[str, Any], mtu: int, where: str) -> None:
    """Refuse a network whose packets of `mtu` bytes do not hold those of the QPs. Raises EngineError.

    A QP's path MTU is agreed on when it connects and cannot change: its packets would never arrive.
    """
    needed = int(about.get("path_mtu", 0))  # 0: no QPs, or an older migroce that does not say
    if needed and needed + _HEADERS > mtu:
        reason = f"{where} carries packets of {mtu} bytes, the container's QPs need {needed + _HEADERS}"
        raise EngineError("check", reason, "give it a larger MTU")


# -- what was sent again -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class QpCount:
    """Packets of one moved QP that went twice because of the move."""

    qpn: int
    peer: str
    peer_qpn: int
    sent_again: int
    received_again: int
    """The peer's, as far as they came twice."""
    peer_sent_again: int | None
    """By the peer, if it is on one of the two nodes."""


_COUNTED = ("qpn", "peer_gid", "peer_qpn", "retransmits", "duplicates", "una_psn", "next_psn")


def counters(qps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each QP what `compare` needs."""
    return [{name: qp[name] for name in _COUNTED} for qp in qps]


def repaired(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> bool:
    """Whether everything that was in flight at the stop (`before`) has been acknowledged."""
    sent = {int(qp["qpn"]): int(qp["next_psn"]) for qp in before}
    return all(
        (int(qp["una_psn"]) - sent.get(int(qp["qpn"]), int(qp["una_psn"]))) & 0xFFFFFF < 1 << 23
        for qp in now if qp["state"] in _CONNECTED
    )  # fmt: skip


Peers = Mapping[tuple[str, int], int]
"""What QPs that are known have sent again in all, by address and QPN."""


def peers(ps: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    """Those in an agent's answer to `ps`, as far as their processes tell."""
    return {
        (str(qp["local_gid"]), int(qp["qpn"])): int(qp["retransmits"])
        for container in ps
        for context in container["contexts"]
        for qp in (context.get("dump") or {}).get("qps", [])
    }


def compare(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]],
    peers_before: Peers, peers_after: Peers,
) -> list[QpCount]:  # fmt: skip
    """What the QPs that were and are still there, and their peers, have sent and received again meanwhile."""

    def by_peer(qp: Mapping[str, Any]) -> int | None:
        key = str(qp["peer_gid"]), int(qp["peer_qpn"])
        if key not in peers_before or key not in peers_after:
            return None
        return max(0, peers_after[key] - peers_before[key])

    old = {int(qp["qpn"]): qp for qp in before}
    return [
        QpCount(
            qpn, str(qp["peer_gid"]), int(qp["peer_qpn"]),
            max(0, int(qp["retransmits"]) - int(old[qpn]["retransmits"])),
            max(0, int(qp["duplicates"]) - int(old[qpn]["duplicates"])),
            by_peer(qp),
        )
        for qp in after if (qpn := int(qp["qpn"])) in old
    ]  # fmt: skip
