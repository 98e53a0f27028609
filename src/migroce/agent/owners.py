# SPDX-License-Identifier: BSD-3-Clause
"""Watching over migrations: who began one must end it, else it is recovered.

`migration.begin` ties a journal to the admin connection it came by. When that breaks before
`migration.end`, the agent runs `python -m migroce.migration.recover JOURNAL`, which finishes the
migration or undoes it. The journals are in the state file: a restarted agent waits for the owners that
are still alive to end, and then recovers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from migroce.agent import netns

log = logging.getLogger("migroce.agent")

RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
"""Pauses between attempts to recover; after the last the journal is left to the administrator."""
END_SECONDS = 10.0
"""How long a recovery may go on when the agent is told to end."""


@dataclass(slots=True, eq=False)
class Watch:
    """A migration that was begun. `holder`: the connection that owns it, None while nobody does."""

    journal: str
    pid: int
    start: int
    holder: object = None
    attempts: int = 0
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None
    error: str = ""
    pidfd: int | None = field(default=None)

    def needed(self) -> bool:
        """Whether there still is a journal."""
        return os.path.lexists(self.journal)

    def to_json(self) -> dict[str, Any]:
        """For `status` and the state file."""
        return {
            "journal": self.journal,
            "pid": self.pid,
            "start": self.start,
            "attempts": self.attempts,
            "recovering": self.task is not None,
            "error": self.error,
        }


def _usual_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, 0)


class Owners:
    """All migrations begun and not ended."""

    def __init__(self, save: Callable[[], None], changed: Callable[[], None]) -> None:
        self._save = save
        self._changed = changed
        self._watches: dict[str, Watch] = {}

    def __len__(self) -> int:
        return len(self._watches)

    def begin(self, journal: str, pid: int, holder: object) -> None:
        """A migration begins, or its recovery takes it over."""
        old = self._watches.get(journal)
        watch = old or Watch(journal, pid, 0)
        self._unwatch(watch)
        watch.pid, watch.start, watch.holder = pid, netns.start_time(pid), holder
        self._watches[journal] = watch
        self._save()

    def end(self, journal: str) -> bool:
        """It has ended; False when it was not known."""
        watch = self._watches.pop(journal, None)
        if watch is not None:
            self._unwatch(watch)
            self._save()
            self._changed()
        return watch is not None

    def broken(self, holder: object) -> None:
        """A connection has ended: whatever it has not ended is recovered."""
        for watch in list(self._watches.values()):
            if watch.holder is holder:
                watch.holder = None
                self._recover(watch)

    def from_state(self, state: list[dict[str, Any]]) -> None:
        """After a restart: wait for the owners that are alive, recover for the others."""
        for item in state:
            watch = Watch(str(item["journal"]), int(item["pid"]), int(item["start"]))
            self._watches[watch.journal] = watch
            watch.pidfd = netns.open_pidfd(watch.pid) if netns.is_alive(watch.pid, watch.start) else None
            if watch.pidfd is not None:
                asyncio.get_running_loop().add_reader(watch.pidfd, self._owner_died, watch)
            else:
                self._recover(watch)

    def to_json(self) -> list[dict[str, Any]]:
        """All, for `status` and the state file."""
        return [watch.to_json() for watch in self._watches.values()]

    async def close(self) -> None:
        """Let recoveries that run come to their end; those that do not are killed."""
        for watch in self._watches.values():
            self._unwatch(watch)
            if watch.process is None and watch.task is not None:
                watch.task.cancel()
        tasks = [w.task for w in self._watches.values() if w.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)
        for watch in self._watches.values():
            if watch.process is not None and watch.process.returncode is None:
                watch.process.kill()
                await watch.process.wait()

    def _unwatch(self, watch: Watch) -> None:
        if watch.pidfd is not None:
            asyncio.get_running_loop().remove_reader(watch.pidfd)
            os.close(watch.pidfd)
            watch.pidfd = None

    def _owner_died(self, watch: Watch) -> None:
        self._unwatch(watch)
        self._recover(watch)

    def _recover(self, watch: Watch) -> None:
        if watch.task is None:
            watch.task = asyncio.get_running_loop().create_task(self._run(watch))

    async def _run(self, watch: Watch) -> None:
        try:
            for pause in (*RETRY_SECONDS, 0.0):
                if not watch.needed():
                    log.info("migration %s: its journal is gone, nothing to recover", watch.journal)
                    break
                watch.attempts += 1
                if await self._attempt(watch):
                    break
                if pause:
                    await asyncio.sleep(pause)
            else:
                log.error(
                    "migration %s could not be recovered: %s; run `python -m migroce.migration.recover %s`",
                    watch.journal,
                    watch.error,
                    watch.journal,
                )
                return  # stays in `status` and in the state file: the next agent tries again
            self.end(watch.journal)
        finally:
            watch.task = None
            self._changed()

    async def _attempt(self, watch: Watch) -> bool:
        log.warning("migration %s: its owner is gone, recovering (attempt %d)", watch.journal, watch.attempts)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MIGROCE_FAULT")}
        try:
            watch.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "migroce.migration.recover",
                watch.journal,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                preexec_fn=_usual_priority,
            )
            out, _ = await watch.process.communicate()
        except OSError as e:
            watch.error = f"cannot be started: {e.strerror}"
            return False
        status, watch.process = watch.process.returncode, None
        text = out.decode("utf-8", "replace").strip()
        for line in text.splitlines():
            log.info("recover: %s", line)
        if status:
            watch.error = f"exit status {status}: {text.splitlines()[-1] if text else 'no output'}"
        return not status
