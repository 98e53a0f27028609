# SPDX-License-Identifier: BSD-3-Clause
"""The agent's memory across a crash: one small JSON file, replaced atomically."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("migroce.agent")

VERSION = 1


class StateFile:
    """`<run dir>/state.json`. A file that cannot be written is a warning: the agent works on without."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = b""

    def load(self) -> dict[str, Any]:
        """What was saved; {} when there is nothing usable (which is said)."""
        try:
            state = json.loads(self.path.read_bytes())
            if not isinstance(state, dict) or state.get("version") != VERSION:
                raise ValueError("unknown version")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            log.warning("%s cannot be used (%s): starting without", self.path, e)
            return {}
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file if anything changed."""
        data = json.dumps(state | {"version": VERSION}, separators=(",", ":")).encode()
        if data == self._last:
            return
        fresh = self.path.with_suffix(".new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as f:
                f.write(data)
            fresh.rename(self.path)
            self._last = data
        except OSError as e:
            log.warning(
                "%s cannot be written (%s): a crash of the agent would not be survived", self.path, e.strerror
            )

    def remove(self) -> None:
        """There is nothing to remember."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._last = b""
