# SPDX-License-Identifier: BSD-3-Clause
"""What was found, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import Section, Series
from bench.settings import Settings


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _range(series: Series) -> str:
    low, high = series.spread
    return f"{_number(low)} .. {_number(high)}"


def show(sections: Sequence[Section], console: Console) -> None:
    """Print one table per section and the targets below it."""
    for section in sections:
        if section.failed:
            why = f"[red]not measured[/]: {section.failed}"
            console.print(f"[bold]{section.title}[/]: {why}\n", highlight=False)
            continue
        table = Table(title=section.title, title_justify="left", caption=section.note, caption_justify="left")
        table.add_column("what")
        table.add_column("median", justify="right")
        table.add_column("", justify="left")
        table.add_column("smallest .. largest", justify="right")
        for series in section.series:
            table.add_row(series.name, _number(series.median), series.unit, _range(series))
        console.print(table)
        for target in section.targets:
            mark = "[green]met[/]" if target.met else "[red]missed[/]"
            console.print(f"  {mark}  {target.what} ({_number(target.series.median)})", highlight=False)
        console.print()


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(), "machine": platform.machine(), "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }  # fmt: skip


def write_json(sections: Sequence[Section], settings: Settings, path: Path) -> None:
    """All samples and targets, for comparing runs."""
    found = {
        "version": 1,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": settings.quick,
        "rounds": settings.rounds,
        "machine": _machine(),
        "sections": [section.as_json() for section in sections],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def write_plot(sections: Sequence[Section], path: Path) -> None:
    """One panel per section: each series' median as a bar, its samples as dots."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [
        (section, unit, [s for s in section.series if s.unit == unit])
        for section in sections
        for unit in dict.fromkeys(series.unit for series in section.series if series.samples)
    ]
    if not panels:
        return
    columns = 2 if len(panels) > 1 else 1
    rows = (len(panels) + columns - 1) // columns
    figure, axes = pyplot.subplots(rows, columns, figsize=(7 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (section, unit, series) in zip(axes.flat, panels, strict=False):
        names = [s.name for s in series]
        places = range(len(series))
        axis.barh(places, [s.median for s in series], color="#9ecae1", height=0.6)
        for place, s in zip(places, series, strict=True):
            axis.plot(s.samples, [place] * len(s.samples), ".", color="#08519c", markersize=4)
        for target in section.targets:
            if target.series.unit == unit:
                axis.axvline(target.bound, color="#d62728", linewidth=0.8, linestyle="--")
        axis.set_yticks(list(places), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(f"{section.title} [{unit}]", fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
