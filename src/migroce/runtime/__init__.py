# SPDX-License-Identifier: BSD-3-Clause
"""migroce-runtime: an OCI runtime put before runc (or what takes its command line).

`main` looks at the command line only far enough to know the command; what needs nothing of us becomes runc at
once, with `sys` and `os` imported and nothing else. The rest is in `migroce.runtime.wrap`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes as long to import as all the rest
    from typing import NoReturn

WITH_VALUE = frozenset(("--root", "--log", "--log-format", "--criu", "--rootless", "--cgroup-manager"))
"""Global options of runc and crun that are followed by a value."""
OURS = frozenset(("create", "run", "exec", "checkpoint", "restore", "delete", "pause", "resume"))


def split(args: list[str]) -> int:
    """Index of the command in a command line; its length if there is none."""
    at = 0
    while at < len(args) and args[at].startswith("-"):
        at += 2 if args[at] in WITH_VALUE else 1
    return min(at, len(args))


def runtime() -> str:
    """What to become: `MIGROCE_RUNC`, else runc."""
    return os.environ.get("MIGROCE_RUNC") or "runc"


def become(args: list[str], env: dict[str, str] | None = None) -> NoReturn:
    """Be the real runtime from now on."""
    program = runtime()
    try:
        os.execvpe(program, [program, *args], dict(os.environ) if env is None else env)
    except OSError as exc:
        sys.stderr.write(f"migroce-runtime: {program} cannot be run: {exc.strerror}\n")
        sys.exit(1)


def main(asked: bool = False) -> NoReturn:
    """Be an OCI runtime. `asked`: for containers that ask for the device only, as a default runtime."""
    args = sys.argv[1:]
    at = split(args)
    if at < len(args) and args[at] in OURS:
        from migroce.runtime.wrap import handle

        handle(args, at, asked)
    become(args)
