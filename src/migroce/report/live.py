# SPDX-License-Identifier: BSD-3-Clause
"""The live view of a migration in a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from migroce.report.console import human_bytes, human_rate

if TYPE_CHECKING:
    from rich.console import RenderableType

    from migroce.demo.state import DemoState, End

_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 6.0  # seconds in the sparkline
_CELLS = 60


def sparkline(end: End, now: float, top: float) -> str:
    """Received rate of the last seconds as bars; `top` in bit/s is a full one."""
    _, rates = end.received.rates(now - _HISTORY, now, _HISTORY / _CELLS)
    steps = len(_BARS) - 1
    return "".join(_BARS[min(steps, max(0, round(rate / top * steps)))] for rate in rates)


def render(state: DemoState) -> RenderableType:
    """The whole view at this moment."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    now = time.monotonic()
    top = 1e9
    for end in state.ends:
        top = max([top, *end.received.rates(now - _HISTORY, now, _HISTORY / _CELLS)[1]])
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for name in ("container", "node", "QP", "receives"):
        grid.add_column(name, justify="right" if name == "receives" else "left", no_wrap=True)
    grid.add_column(f"last {_HISTORY:.0f} s, up to {human_rate(top)}", no_wrap=True)
    for end, colour in ((state.moving, "blue"), (state.static, "yellow")):
        rate = end.received.rate(now - 0.12, now - 0.02)
        shown = "done" if end.done else human_rate(rate)
        grid.add_row(
            f"[bold]{end.container}[/] {end.role}", end.node, _qp_text(end), shown,
            Text(sparkline(end, now, top), style=colour),
        )  # fmt: skip
    phases = Text("  ")
    for span in state.spans:
        phases.append(f"{span.name} ", style="green")
        phases.append(f"{(span.end - span.start) * 1000:.0f} ms  ", style="dim")
    if state.current is not None:
        name, since = state.current
        phases.append(f"{name} {(now - since) * 1000:.0f} ms ...", style="bold yellow")
    if state.failed is not None:
        phases.append(f"  failed in {state.failed}", style="bold red")
    total = human_bytes(sum(end.received.last for end in state.ends))
    return Panel(
        Group(
            grid, Text("Migration:") + phases, Text(f"\n{state.message}   ({total} delivered)", style="dim")
        ),
        title="migroce demo: ib_send_bw -b, moved while it runs",
        box=box.ROUNDED,
    )


def _qp_text(end: End) -> str:
    if "stopped" in end.qps or "resuming" in end.qps:
        return f"[red]{end.qps}[/]"
    return f"[yellow]{end.qps}[/]" if "paused" in end.qps else end.qps
