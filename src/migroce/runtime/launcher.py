# SPDX-License-Identifier: BSD-3-Clause
"""The file that engines call: a Python that skips everything it does not need to start (-I -S).

It costs about 10 ms over runc itself, where a console script of pip's costs 30: each command of a container's
life goes through it, the two of a migration's blackout as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "migroce-runtime"
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent.parent


def text(*, asked: bool = False) -> str:
    """The launcher for this interpreter and package. `asked`: only containers that ask get the device."""
    return (
        f"#!{sys.executable} -IS\n"
        "import sys\n"
        f"sys.path.insert(0, {str(_PACKAGE_PARENT)!r})\n"
        "from migroce.runtime import main\n"
        f"main({'asked=True' if asked else ''})\n"
    )


def write(path: Path, *, asked: bool = False) -> Path:
    """Put the launcher at `path`, in one step. Raises OSError."""
    part = path.with_name(path.name + "~")
    part.write_text(text(asked=asked))
    part.chmod(0o755)
    part.rename(path)
    return path
