# SPDX-License-Identifier: BSD-3-Clause
"""The one rich console, made on first use."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def console() -> Console:
    """Standard output. Lines are not cut when it is no terminal."""
    from rich.console import Console

    made = Console(highlight=False)
    if not made.is_terminal:
        made = Console(highlight=False, width=200, soft_wrap=True)
    return made


def human_bytes(count: float) -> str:
    """`1.5 MiB`; whole bytes below 1 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_rate(bits_per_second: float) -> str:
    """`12.3 Gb/s`."""
    for unit in ("b/s", "kb/s", "Mb/s"):
        if abs(bits_per_second) < 1000:
            return f"{bits_per_second:.0f} {unit}"
        bits_per_second /= 1000
    return f"{bits_per_second:.1f} Gb/s"
