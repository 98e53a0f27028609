# SPDX-License-Identifier: BSD-3-Clause
"""RDMA state as tables: what `migroce inspect` and `migroce ps` show.

They take the plain data of `Dump.to_json` (without secrets: who has a connection's token can
redirect it), which is what the agent's `ps` answers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from migroce.report.console import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Json = Mapping[str, Any]
_ACCESS = ((1, "local write"), (2, "remote write"), (4, "remote read"), (8, "remote atomic"))


def state_name(qp: Json) -> str:
    """The verbs state, and ours where it is not normal: `RTS`, `RTS, stopped`."""
    return str(qp["state"]) if qp["mstate"] == "normal" else f"{qp['state']}, {qp['mstate']}"


def table(columns: str, title: str | None = None) -> Table:
    """An open table of columns `a|b>|c`; those whose name ends in `>` are right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns.split("|"):
        right = name.endswith(">")
        made.add_column(name.rstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def _receives(qp: Json) -> str:
    """A QP's receive queue, or whose it shares."""
    if qp["srq"] or qp["type"] == "XRC_RECV":
        return f"SRQ {qp['srq']}" if qp["srq"] else "SRQs"
    return f"{qp['rq_fill']}/{qp['rq_depth']}"


def qp_table(qps: Sequence[Json]) -> Table:
    """Queue pairs with what a move must keep."""
    made = table(
        "QPN>|type|state|peer|peer QPN>|MTU>|unacked PSN>|next PSN>|expected PSN>|MSN>|send queue>"
        "|receive queue>|peer migrates",
        "Queue pairs",
    )
    for qp in qps:
        connected = qp["state"] in ("RTR", "RTS", "SQD")
        made.add_row(
            f"{qp['qpn']:#x}",
            qp["type"],
            state_name(qp),
            qp["peer_gid"] if connected else "-",
            f"{qp['peer_qpn']:#x}" if connected else "-",
            str(qp["path_mtu"]),
            f"{qp['una_psn']:#08x}",
            f"{qp['next_psn']:#08x}",
            f"{qp['epsn']:#08x}",
            str(qp["msn"]),
            f"{qp['sq_fill']}/{qp['sq_depth']}",
            _receives(qp),
            "yes" if qp["peer_capable"] else "not known",
        )
    return made


def live_table(qps: Sequence[Json]) -> Table:
    """Queue pairs as `ps` shows them: what is going on."""
    made = table("QPN>|type|state|peer|peer QPN>|MTU>|sent>|received>|sent again>|send queue>|receive queue>")
    for qp in qps:
        connected = qp["state"] in ("RTR", "RTS", "SQD")
        made.add_row(
            f"{qp['qpn']:#x}",
            qp["type"],
            state_name(qp),
            qp["peer_gid"] if connected else "-",
            f"{qp['peer_qpn']:#x}" if connected else "-",
            str(qp["path_mtu"]),
            human_bytes(qp["tx_bytes"]),
            human_bytes(qp["rx_bytes"]),
            f"{qp['retransmits']:,}",
            f"{qp['sq_fill']}/{qp['sq_depth']}",
            _receives(qp),
        )
    return made


def _srq_table(srqs: Sequence[Json]) -> Table:
    """Shared receive queues; XRC ones with their domain."""
    made = table("handle>|number>|XRC domain>|queued>|limit>|QPs>|taken ever>", "Shared receive queues")
    for srq in srqs:
        made.add_row(
            str(srq["handle"]), f"{srq['num']:#x}", str(srq["xrcd"] or "-"), f"{srq['fill']}/{srq['depth']}",
            str(srq["limit"] or "-"), str(srq["refs"]), f"{srq['total']:,}",
        )  # fmt: skip
    return made


def dump_tables(label: str, data: Json) -> list[RenderableType]:
    """What a person wants to see of a checkpoint's context."""
    ctx = data["context"]
    how = "stopped" if data["stopped"] else "live snapshot"
    last = ctx["qpn_base"] + ctx["qpn_count"] - 1
    head = (
        f"[bold]{label}[/]: {how}, address {ctx['gid']}, slot {ctx['slot']}, epoch {ctx['epoch']}, "
        f"path MTU up to {ctx['max_path_mtu']}, QPNs {ctx['qpn_base']:#x}..{last:#x}"
    )
    shown: list[RenderableType] = [head, qp_table(data["qps"])]
    mrs = table("lkey>|rkey>|address>|bytes>|access", "Memory regions")
    for mr in data["mrs"]:
        access = ", ".join(name for bit, name in _ACCESS if mr["access"] & bit) or "local read"
        mrs.add_row(f"{mr['lkey']:#x}", f"{mr['rkey']:#x}", f"{mr['addr']:#x}", str(mr["length"]), access)
    shown.append(mrs)
    if data["mws"]:
        mws = table("rkey>|type>|region>|QPN>|address>|bytes>|access", "Memory windows")
        for mw in data["mws"]:
            access = ", ".join(name for bit, name in _ACCESS if mw["access"] & bit) or "-"
            mws.add_row(
                f"{mw['rkey']:#x}", str(mw["type"]), f"{mw['mr']:#x}" if mw["mr"] else "not bound",
                f"{mw['qpn']:#x}" if mw["qpn"] else "-", f"{mw['addr']:#x}", str(mw["length"]), access,
            )  # fmt: skip
        shown.append(mws)
    cqs = table("handle>|waiting>|depth>|completions ever>|armed|channel|events>", "Completion queues")
    for cq in data["cqs"]:
        cqs.add_row(
            str(cq["handle"]), str(cq["fill"]), str(cq["depth"]), f"{cq['total']:,}", str(cq["armed"]),
            f"fd {cq['channel'] - 1}" if cq["channel"] else "-", str(cq["events"]),
        )  # fmt: skip
    shown.append(cqs)
    if data["srqs"]:
        shown.append(_srq_table(data["srqs"]))
    if data["resources"]:
        replay = table("QPN>|opcode>|PSNs|address>|bytes>", "Replay record (READs, atomics)")
        for r in data["resources"]:
            psns = f"{r['first_psn']:#x}..{r['last_psn']:#x}"
            replay.add_row(f"{r['qpn']:#x}", f"{r['opcode']:#x}", psns, f"{r['va']:#x}", str(r["length"]))
        shown.append(replay)
    shown.append("[bold]Counters[/]: " + counters_text(data["counters"]))
    return shown


def counters_text(counters: Mapping[str, int]) -> str:
    """The counters that are not zero, in one line."""
    seen = [f"{name.replace('_', ' ')} {value:,}" for name, value in counters.items() if value]
    return ", ".join(seen) or "all zero"
