# SPDX-License-Identifier: BSD-3-Clause
"""Which benchmarks there are, and running them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from bench import blackout, docker, memory, qps, report, speed
from bench.ends import BenchError
from bench.results import Section
from bench.settings import Settings

ROUNDS, QUICK_ROUNDS = 7, 3

SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "bandwidth": speed.bandwidth,
    "latency": speed.latency,
    "rate": speed.message_rate,
    "support": speed.support,
    "blackout": blackout.blackout,
    "docker": docker.docker,
    "qps": qps.stop_resume,
    "memory": memory.memory,
}


def _choose(only: Sequence[str]) -> list[str]:
    for name in only:
        if name not in SECTIONS:
            raise typer.BadParameter(f"no such benchmark: {name} (there are {', '.join(SECTIONS)})")
    return list(only) or list(SECTIONS)


def run(only: Sequence[str], quick: bool, rounds: int | None, out: Path, console: Console) -> list[Section]:
    """Run the named benchmarks (all when `only` is empty), show them, write `out`/bench.json and .png.

    One that cannot be made says so in its section; the others go on.
    """
    found: list[Section] = []
    names = _choose(only)
    with console.status("") as status:
        settings = Settings(
            rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS), quick=quick, out=out, tell=status.update
        )
        for name in names:
            try:
                section = SECTIONS[name](settings)
            except (BenchError, OSError) as exc:
                section = Section(name, name, failed=str(exc))
            found.append(section)
            report.show([section], console)
    report.write_json(found, settings, out / "bench.json")
    report.write_plot(found, out / "bench.png")
    console.print(f"written: {out / 'bench.json'}, {out / 'bench.png'}", highlight=False)
    return found
