# SPDX-License-Identifier: BSD-3-Clause
"""The `migroce` command.

`main` is the entry point: it runs the application of `migroce.cli.app` and turns exceptions into
one sentence on stderr and an exit status. Each command's module imports what it needs inside the
command, so that `migroce run` starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

EXIT_INTERNAL = 70  # EX_SOFTWARE


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    from migroce.cli.app import application

    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = application(args)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `migroce ps | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except Exception as exc:
        from migroce.cli.app import debugging

        if debugging(args):
            raise
        status = _report(exc)
    sys.exit(status)


def _report(exc: Exception) -> int:
    from migroce.errors import MigroceError, is_for_the_user

    if is_for_the_user(exc) or isinstance(exc, OSError):
        text = " ".join(str(exc).split())
        if isinstance(exc, PermissionError) and os.geteuid() != 0:
            text += " (does it need root?)"
        print(f"migroce: {text}", file=sys.stderr)
        return exc.status if isinstance(exc, MigroceError) else 1
    print(
        f"migroce: internal error: {type(exc).__name__}: {exc}\n"
        "This is a bug; `migroce --debug ...` shows where it happened.",
        file=sys.stderr,
    )
    return EXIT_INTERNAL
