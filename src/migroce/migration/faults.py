# SPDX-License-Identifier: BSD-3-Clause
"""Faults to order: MIGROCE_FAULT=<phase>[.end][:kill] fails, or kills -9, a migration where it says.

Without `.end` at the phase's beginning, with it when the phase's work is done.
"""

from __future__ import annotations

import os
import signal

from migroce.errors import MigrationError

VARIABLE = "MIGROCE_FAULT"


def hit(point: str) -> None:
    """Fail here if `point` is the one that was ordered. Raises MigrationError."""
    wanted, _, how = os.environ.get(VARIABLE, "").partition(":")
    if wanted != point:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise MigrationError(point, f"a fault was ordered by {VARIABLE}", f"unset {VARIABLE}")
