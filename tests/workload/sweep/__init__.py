# SPDX-License-Identifier: BSD-3-Clause
"""Programs that nobody here wrote, gone through option by option (``make test-sweep``).

Each case is a server and a client in two network namespaces with the library preloaded. The verdicts:

ok
    Both ended with 0.
refused
    The program itself took the options for wrong, before or beside any device: told by its own words
    (:mod:`tests.workload.sweep.words`).
known
    It fails, or waits for ever, for a reason that is the program's own; docs/programs.md says which.
failed
    Anything else: ours until shown otherwise. So is a known case that works: its entry must go.
"""
