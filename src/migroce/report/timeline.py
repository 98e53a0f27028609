# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a migration: bandwidth of both ends over time, the phases marked. PNG and SVG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migroce.report.series import Series


@dataclass(frozen=True, slots=True)
class Span:
    """A phase: its name, and when it began and ended (seconds, the clock of the series)."""

    name: str
    start: float
    end: float


_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1")
_PHASES = {
    "check": "#d9d9d9", "prepare": "#c6dbef", "stop": "#fdd0a2", "dump": "#fdae6b",
    "transfer": "#dadaeb", "restore": "#a1d99b", "resume": "#fff2ae", "commit": "#d9d9d9",
}  # fmt: skip


def _phase_colour(name: str) -> str:
    return next((colour for key, colour in _PHASES.items() if key in name), "#eeeeee")


def draw(
    path: Path,
    series: Mapping[str, Series],
    spans: Sequence[Span],
    *,
    title: str,
    blackout: tuple[float, float] | None = None,
    step: float = 0.04,
) -> list[Path]:
    """Write `path`.png and `path`.svg; returns the two.

    `series` by their labels; `blackout` is marked by an arrow; `step` is the width in seconds of
    the bins in which rates are shown.
    """
    if "MPLCONFIGDIR" not in os.environ:  # don't write into a home directory that may not be there
        os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / f"migroce-matplotlib-{os.geteuid()}")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    known = [s.span for s in series.values() if s.span is not None]
    if not known:
        raise ValueError("there is nothing to draw: no sample was taken")
    begin, end = min(s[0] for s in known), max(s[1] for s in known)
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "migroce", "font.size": 9})
    figure, (whole, zoom) = plt.subplots(2, 1, figsize=(9, 6), height_ratios=(3, 2), layout="constrained")
    try:
        for axes, bins in ((whole, step), (zoom, step / 2)):
            for colour, (label, one) in zip(_COLOURS, series.items(), strict=False):
                times, rates = one.rates(begin, end, bins)
                x, y = [t - begin for t in times], [r / 1e9 for r in rates]
                axes.plot(x, y, color=colour, label=label, linewidth=1.3)
            for span in spans:
                axes.axvspan(
                    span.start - begin, span.end - begin, color=_phase_colour(span.name), alpha=0.6, lw=0
                )
            axes.set_ylabel("received, Gb/s")
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, alpha=0.25)
        whole.set_title(title)
        whole.legend(loc="lower right")
        whole.set_xlim(0, end - begin)
        zoom.set_xlabel("seconds since the first packet")
        _zoom_in(zoom, spans, begin, end, blackout)
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    finally:
        plt.close(figure)
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def _zoom_in(
    axes: object, spans: Sequence[Span], begin: float, end: float, blackout: tuple[float, float] | None
) -> None:
    """Show only the migration, its phases named."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    if not spans:
        axes.set_xlim(0, end - begin)
        return
    first, last = min(s.start for s in spans) - begin, max(s.end for s in spans) - begin
    margin = max(0.1, (last - first) * 0.25)
    axes.set_xlim(max(0, first - margin), min(end - begin, last + margin))
    low, high = axes.get_xlim()
    top = axes.get_ylim()[1] * 1.45
    axes.set_ylim(0, top)
    for i, span in enumerate(spans):
        middle = (span.start + span.end) / 2 - begin
        text = f"{span.name}\n{(span.end - span.start) * 1000:.0f} ms"
        wide = (span.end - span.start) > (high - low) * 0.09
        axes.text(
            middle, top * (0.98 if wide or i % 2 == 0 else 0.80), text, ha="center", va="top",
            fontsize=7, rotation=0 if wide else 90,
        )  # fmt: skip
    if blackout is not None:
        a, b = blackout[0] - begin, blackout[1] - begin
        axes.annotate(
            "", xy=(a, top * 0.5), xytext=(b, top * 0.5), arrowprops={"arrowstyle": "<->", "lw": 1.2}
        )
        axes.text((a + b) / 2, top * 0.52, f"blackout {(b - a) * 1000:.0f} ms", ha="center", va="bottom")
