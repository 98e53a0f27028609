# SPDX-License-Identifier: BSD-3-Clause
"""The error contract of the package and of the command line.

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


class StepError(MigroceError):
    """Something failed in a named step: what it was doing, why it failed, how to mend it."""

    def __init__(self, step: str, reason: str, mend: str = "", *, status: int = 1) -> None:
        reason = " ".join(reason.split()).rstrip(".") or "no reason given"
        super().__init__(f"{step}: {reason}" + (f"; {mend}" if mend else ""), status=status)
        self.step = step
        self.reason = reason
        self.mend = mend


class NodeError(StepError):
    """A node is unknown or cannot be reached, or a command on it failed."""


class EngineError(StepError):
    """The container runtime, CRIU or the container's own set-up failed."""


class LabError(StepError):
    """The lab cannot be brought up, found or taken down."""


class MigrationError(StepError):
    """A checkpoint, restore or migration failed.

    `running_on` says where the container is now running, None when it is not known or nowhere.
    """

    def __init__(self, step: str, reason: str, mend: str = "", *, running_on: str | None = None) -> None:
        super().__init__(step, reason, mend)
        self.running_on = running_on


def is_for_the_user(exc: BaseException) -> bool:
    """Whether `exc` carries a sentence for the user rather than being a bug."""
    return isinstance(exc, MigroceError) or type(exc).__module__.split(".")[0] == "migroce"
