# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tests.workload.sweep``: go through the programs, tell of each case, exit 1 if one failed."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tests.native.netns import ip, pair
from tests.workload.sweep.others import ibverbs, rdmacm
from tests.workload.sweep.plan import Case, perftest
from tests.workload.sweep.run import Result, Runner, Verdict

from migroce import paths

IPV6 = ("fd09::{}/64", "fd09:1::{}/64")
"""The nodes' other addresses: GIDs 2 and 3."""

COLOURS = {
    Verdict.OK: "green",
    Verdict.REFUSED: "dim",
    Verdict.KNOWN: "yellow",
    Verdict.FAILED: "bold red",
    Verdict.MISSING: "yellow",
}


def main(
    only: Annotated[str, typer.Option("-k", help="A regular expression; cases whose names contain it.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Cases at a time, each in namespaces of its own.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for a case.")] = 60,
    programs: Annotated[str, typer.Option(help="Another perftest's directory.", show_default="PATH")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON, progress to stderr.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Print the cases' names, run none.")] = False,
) -> None:
    """Run programs that nobody here wrote with every option (root).

    Exit status: 0 none failed, 1 one did, 2 usage.
    """
    directory = f"{Path(programs).resolve()}/" if programs else ""
    every = (*perftest(directory), *ibverbs(directory), *rdmacm(directory))
    cases = [case for case in every if re.search(only, case.name)]
    if listed:
        sys.stdout.writelines(f"{case.name}\n" for case in cases)
        return
    if not cases:
        raise typer.BadParameter(f"no case contains {only!r}", param_hint="-k")
    if os.geteuid() != 0:
        raise typer.BadParameter("needs root: it makes network namespaces")
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    results = sweep(cases, jobs, timeout, console)
    count = Counter(result.verdict for result in results)
    console.print(", ".join(f"{number} {verdict.value}" for verdict, number in count.items()))
    if as_json:
        json.dump([as_data(result) for result in results], sys.stdout, indent=1)
    if count[Verdict.FAILED]:
        raise typer.Exit(1)


def sweep(cases: list[Case], jobs: int, timeout: float, console: Console) -> list[Result]:
    """Run all, `jobs` at a time; each result is printed as it comes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        runners: SimpleQueue[Runner] = SimpleQueue()
        for number in range(jobs):
            nodes = stack.enter_context(pair(f"mgs{os.getpid()}.{number}"))
            for node, address in itertools.product(nodes, IPV6):
                host = node.address.rpartition(".")[2]
                ip("-n", node.netns, "addr", "add", address.format(host), "dev", node.iface, "nodad")
            runners.put(Runner(nodes, IPV6[0].format(1).partition("/")[0], paths.library(), timeout))
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("sweep", total=len(cases))

        def one(case: Case) -> Result:
            runner = runners.get()
            try:
                result = runner.run(case)
            finally:
                runners.put(runner)
            colour = COLOURS[result.verdict]
            why = f"  {escape(result.why)}" if result.why else ""
            progress.console.print(
                f"[{colour}]{result.verdict.value:8}[/] {result.seconds:5.1f} s  {escape(case.name)}{why}"
            )
            progress.advance(task)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, cases))


def as_data(result: Result) -> dict[str, object]:
    """A result as JSON; what the programs said only where one failed."""
    told = result.verdict is Verdict.FAILED
    return {
        "case": result.case.name,
        "verdict": result.verdict.value,
        "why": result.why,
        "seconds": round(result.seconds, 2),
        "ends": [{"status": end.status, "said": end.said if told else ""} for end in result.ends],
    }


if __name__ == "__main__":
    typer.run(main)
