# SPDX-License-Identifier: BSD-3-Clause
"""Run schedules again: `python -m tests.sim.replay [--trace] SEED|SEED..SEED|TOKEN ...`."""

from __future__ import annotations

import argparse
import pprint
import sys
import time
from collections.abc import Iterator

from .generate import Seeded, from_seed, with_mistake
from .program import InvariantError
from .records import MS
from .runner import Run
from .schedule import Schedule, from_token


def _schedules(words: list[str]) -> Iterator[tuple[str, Schedule]]:
    for word in words:
        if word.startswith("mgs1."):
            yield word[:24] + "...", from_token(word)
            continue
        mistake = word.startswith("m")
        lo, _, hi = word.removeprefix("m").partition("..")
        for seed in range(int(lo), int(hi or lo) + 1):
            if mistake:
                yield f"m{seed}", with_mistake(Seeded(seed), seed)
            else:
                yield str(seed), from_seed(seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.replay", description=__doc__)
    parser.add_argument(
        "what", nargs="+", help="a seed, a range (1..500), mSEED (one with a mistake) or a token"
    )
    parser.add_argument("--trace", action="store_true", help="print every packet, timer and completion")
    parser.add_argument("--show", action="store_true", help="print the schedule")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--verbose", action="store_true", help="a line for each")
    args = parser.parse_args()
    failed = total = 0
    began = time.perf_counter()
    for name, schedule in _schedules(args.what):
        total += 1
        run = Run(schedule, trace=args.trace)
        if args.show:
            pprint.pprint(schedule, width=110)
        try:
            result = run.execute()
            line = f"{name}: ok, done at {result.done_at / MS:.3f} ms, {result.stats.sent} packets"
        except InvariantError as e:
            failed += 1
            line = f"{name}: FAILED {e} (at {run.elapsed() / MS:.3f} ms)"
        if args.trace:
            sys.stdout.write(run.world.trace_text())
        run.world.close()
        if args.trace or args.show or args.verbose or "FAILED" in line:
            print(line, flush=True)
        if failed and args.stop:
            break
    spent = time.perf_counter() - began
    print(f"{total} schedules, {failed} failed, {spent:.1f} s ({1000 * spent / max(1, total):.1f} ms each)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
