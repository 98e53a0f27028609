# SPDX-License-Identifier: BSD-3-Clause
"""Progress and result of a checkpoint, restore or migration on the terminal, or as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Self

from migroce.report.console import console, human_bytes

if TYPE_CHECKING:
    from migroce.migration.report import Event, Report


class Printer:
    """Shows events as they come: a spinner on a terminal, otherwise a line at the end of each phase."""

    def __init__(self) -> None:
        from rich.status import Status

        self._status: Status | None = None
        self._began = 0.0

    def __call__(self, event: Event) -> None:
        """Show one."""
        if event.state == "start":
            self._began = event.monotonic
            self._wait(f"{event.phase}{f': {event.detail}' if event.detail else ''} ...")
            return
        self._end()
        took = f"{(event.monotonic - self._began) * 1000:7.1f} ms" if event.state == "done" else "   failed"
        style = "green" if event.state == "done" else "red"
        detail = f"  [dim]{event.detail}[/]" if event.detail and event.state == "done" else ""
        console().print(f"[{style}]{event.phase:10}[/] {took}{detail}", highlight=False)

    def _wait(self, text: str) -> None:
        if not console().is_terminal:
            return
        if self._status is None:
            self._status = console().status(text)
            self._status.start()
        else:
            self._status.update(text)

    def _end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()


def json_event(event: Event) -> None:
    """One line of JSON, `{"event": {...}}`."""
    print(json.dumps({"event": dataclasses.asdict(event)}), flush=True)


def json_report(report: Report) -> None:
    """The last line of JSON, `{"report": {...}}`."""
    print(json.dumps({"report": report.as_dict()}), flush=True)


def show(report: Report) -> None:
    """The result in a few lines."""
    out = console()
    what = {"migrate": "moved", "checkpoint": "saved", "restore": "restored"}[report.kind]
    out.print(f"[bold]{report.container}[/] {what}: {report.source} -> {report.destination}", highlight=False)
    facts = []
    if report.blackout:
        facts.append(f"blackout {report.blackout:.0f} ms")
    facts += [f"total {report.total:.0f} ms", f"{human_bytes(report.bytes_moved)} moved"]
    if report.contexts:
        facts.append(f"{report.qps} QPs in {report.contexts} processes")
    if report.retransmissions is not None:
        known = [each["peer_sent_again"] for each in report.qps_again if each["peer_sent_again"] is not None]
        by_peers = f", {sum(known)} by peers" if known else ""
        facts.append(f"{report.retransmissions} packets sent again{by_peers}")
    if report.ip:
        facts.append(f"now at {report.ip}")
    out.print("  " + ", ".join(facts), highlight=False)
    for warning in report.warnings:
        print(f"migroce: note: {warning}", file=sys.stderr)
