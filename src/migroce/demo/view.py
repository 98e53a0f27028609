# SPDX-License-Identifier: BSD-3-Clause
"""Shows the demo: a live view on a terminal, a line now and then elsewhere; at the end the summary."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from migroce.report.console import console, human_bytes, human_rate

if TYPE_CHECKING:
    from migroce.demo.runner import Result
    from migroce.demo.state import DemoState

_REFRESH = 12  # a second; drawing takes time from the programs on a small machine
_LINE_EVERY = 1.0  # seconds


def watch(state: DemoState, over: threading.Event) -> None:
    """Show `state` until `over` is set."""
    if console().is_terminal:
        from rich.live import Live

        from migroce.report.live import render

        with Live(render(state), console=console(), auto_refresh=False) as live:
            while not over.wait(1 / _REFRESH):
                live.update(render(state), refresh=True)
            live.update(render(state), refresh=True)
    else:
        _lines(state, over)


def _lines(state: DemoState, over: threading.Event) -> None:
    started = time.monotonic()
    shown, message, due = 0, "", started
    finished = False
    while not finished:
        finished = over.wait(0.05)
        now = time.monotonic()
        if state.message != message:
            message = state.message
            print(f"{now - started:6.2f} s  {message}", flush=True)
        for span in state.spans[shown:]:
            print(
                f"{span.end - started:6.2f} s    {span.name}: {(span.end - span.start) * 1000:.1f} ms",
                flush=True,
            )
            shown += 1
        if now >= due and any(end.received.last for end in state.ends) and not finished:
            due = now + _LINE_EVERY
            parts = [
                f"{end.container} on {end.node} [{end.qps}] "
                + ("done" if end.done else human_rate(end.received.rate(now - 0.25, now - 0.02)))
                for end in state.ends
            ]
            print(f"{now - started:6.2f} s  {'   '.join(parts)}", flush=True)


def summary(result: Result) -> None:
    """The programs' own outputs, and what the move cost."""
    from rich import box
    from rich.table import Table

    out = console()
    for end, text in zip(result.state.ends, (result.server_output, result.client_output), strict=True):
        out.print(f"\n[bold]{end.container}[/] ({end.role}), its own output, exit status {end.exit_status}:")
        out.print(text.strip("\n"), markup=False)
    report = result.report
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="\nThe move", title_justify="left", title_style="bold"
    )
    table.add_column("phase")
    table.add_column("ms", justify="right")
    for name, took in report.phases.items():
        table.add_row(name, f"{took:.1f}")
    out.print(table)
    out.print(f"blackout (stopped until running)  [bold]{report.blackout:.0f} ms[/]")
    out.print(f"longest silence seen by the peer  {result.peer_silence * 1000:.0f} ms")
    out.print(
        f"moved                             {human_bytes(report.bytes_moved)}, "
        f"{human_bytes(report.rdma_bytes)} of it RDMA state"
    )
    out.print(f"packets sent again, both ends     {result.retransmissions:,}")
    out.print(
        f"payload delivered                 {human_bytes(sum(e.received.last for e in result.state.ends))}"
    )
    for picture in result.pictures:
        out.print(f"picture                           {picture}")
    verdict = "[green]both programs ended with status 0[/]" if result.ok else "[red]a program failed[/]"
    out.print(f"\n{verdict}")


def as_json(result: Result) -> dict[str, Any]:
    """For `migroce demo --json`."""
    return {
        "ok": result.ok,
        "exit_status": {end.container: end.exit_status for end in result.state.ends},
        "output": {
            result.state.moving.container: result.server_output,
            result.state.static.container: result.client_output,
        },
        "counters": {end.container: dict(end.counters) for end in result.state.ends},
        "report": result.report.as_dict(),
        "peer_silence_ms": result.peer_silence * 1000,
        "retransmissions": result.retransmissions,
        "received_bytes": {end.container: end.received.last for end in result.state.ends},
        "samples": {end.container: len(end.received) for end in result.state.ends},
        "pictures": [str(path) for path in result.pictures],
    }
