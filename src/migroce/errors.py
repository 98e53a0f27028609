# SPDX-License-Identifier: BSD-3-Clause
"""The error contract of the command line.

An exception that a user may see has one sentence: the thing, the reason, the mend. Exceptions
defined anywhere in this package are taken to be of that kind (whatever their base), and so is
`MigroceError`, for places with no error type of their own. Everything else that reaches the
top is a bug and says so.
"""

from __future__ import annotations


class MigroceError(Exception):
    """An error that is for the user; str() is one sentence."""

    def __init__(self, text: str, *, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def is_for_the_user(exc: BaseException) -> bool:
    """Whether `exc` carries a sentence for the user rather than being a bug."""
    return isinstance(exc, MigroceError) or type(exc).__module__.split(".")[0] == "migroce"
