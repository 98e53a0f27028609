# SPDX-License-Identifier: BSD-3-Clause
"""The agent's one error."""

from __future__ import annotations

import errno as _errno


class AgentError(Exception):
    """A request that failed. `str()` is one sentence for the user; `errno` a name such as "ENOENT"."""

    def __init__(self, message: str, errno: str = "EIO") -> None:
        super().__init__(message)
        self.errno = errno

    @property
    def code(self) -> int:
        """The errno's number."""
        return int(getattr(_errno, self.errno, _errno.EIO))


def errno_name(code: int | None) -> str:
    """ "ENOENT" for 2; "EIO" for what has no name."""
    return _errno.errorcode.get(code or 0, "EIO")
