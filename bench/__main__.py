# SPDX-License-Identifier: BSD-3-Clause
"""`python -m bench`: run the benchmarks, print a table, write JSON and a plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.run import SECTIONS, run

EXIT_MISSED = 1


def main(
    only: Annotated[
        str, typer.Option(help=f"Comma-separated choice of: {', '.join(SECTIONS)}.", show_default="all")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds with a fifth of the work.")] = False,
    rounds: Annotated[int, typer.Option(help="Samples of everything.", show_default="7, quick: 3")] = 0,
    out: Annotated[Path, typer.Option(help="Where bench.json and bench.png go.")] = Path("out/bench"),
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
) -> None:
    """Measure speed, latency, blackout and memory, each beside its yardstick (root; takes some minutes).

    Exit status 0: all targets met, 1: one was missed or could not be measured, 2: usage.
    """
    console = Console(stderr=json_only)
    sections = run([s for s in only.split(",") if s], quick, rounds or None, out, console)
    if json_only:
        sys.stdout.write((out / "bench.json").read_text())
    if any(s.failed or not all(t.met for t in s.targets) for s in sections):
        raise typer.Exit(EXIT_MISSED)


if __name__ == "__main__":
    typer.run(main)
