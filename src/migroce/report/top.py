# SPDX-License-Identifier: BSD-3-Clause
"""Rates of processes with the device, from two looks at their queue pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from migroce.report.console import human_rate
from migroce.report.rdma import table

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One process's RDMA context between two looks."""

    container: str
    node: str
    program: str
    pid: int
    state: str
    qps: dict[str, int]
    """How many queue pairs are in each state; "paused" and the like before those of verbs."""
    tx_bits: float
    """Payload per second, as `rx_bits`; 0.0 at the first look."""
    rx_bits: float
    sent_again: float
    """Packets per second."""


def rows(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]], seconds: float) -> list[Row]:
    """The processes in `now`, the busiest first; `before` and `now` as `migroce ps --json` has containers.

    A process that was moved between the two looks goes on: its counters move along.
    """
    old = {(each["id"], context["slot"]): context for each in before for context in each["contexts"]}
    found = []
    for each in now:
        for context in each["contexts"]:
            qps = (context.get("dump") or {}).get("qps", [])
            last = {qp["qpn"]: qp for qp in (_dump(old.get((each["id"], context["slot"]))))}
            states = Counter(qp["state"] if qp["mstate"] == "normal" else qp["mstate"] for qp in qps)
            rate = {
                name: sum(
                    max(0, qp[name] - last[qp["qpn"]][name]) for qp in qps if qp["qpn"] in last
                ) / seconds
                for name in ("tx_bytes", "rx_bytes", "retransmits")
            }  # fmt: skip
            found.append(Row(
                each["id"], each["node"], context["comm"], context["pid"], context["state"],
                dict(sorted(states.items())), rate["tx_bytes"] * 8, rate["rx_bytes"] * 8, rate["retransmits"],
            ))  # fmt: skip
    return sorted(found, key=lambda row: (-(row.tx_bits + row.rx_bits), row.container, row.pid))


def _dump(context: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return list(((context or {}).get("dump") or {}).get("qps", []))


def view(found: Iterable[Row]) -> Table:
    """As a table for people."""
    shown = table("container|node|program|pid>|state|queue pairs|sends>|receives>|sent again/s>")
    for row in found:
        states = ", ".join(f"{count} {state}" for state, count in row.qps.items()) or "-"
        shown.add_row(
            row.container, row.node, row.program, str(row.pid), row.state, states, human_rate(row.tx_bits),
            human_rate(row.rx_bits), f"{row.sent_again:.0f}",
        )  # fmt: skip
    return shown
