# SPDX-License-Identifier: BSD-3-Clause
"""Stopping a container and letting it go on: its RDMA contexts by the agent, its processes by the freezer.

What `pause` has stopped, a checkpoint takes: containerd pauses what it is about to checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines.files import read_json, write_json
from migroce.errors import MigroceError
from migroce.runtime import become, known
from migroce.runtime.commandline import CommandLine
from migroce.runtime.guard import Guard

if TYPE_CHECKING:
    from migroce.engines.cgroup import Freezer

_STOP_MS = 5000
RESUME_MS = 10000
"""Milliseconds that contexts get to go on."""


def pause(line: CommandLine) -> int:
    """Stop the RDMA contexts, so that peers wait, and freeze: also for Docker's commit and checkpoint.

    Contexts that cannot be stopped are frozen as they are. The freezing is not left to runc: with version
    1 of cgroups it gives up after some ten milliseconds ("unable to freeze"); threads that wait for a CPU
    take longer.
    """
    if known.bundle_of(line.container) is None:
        become(line.args)
    freezer = freezer_of(line)
    if freezer.frozen():
        become(line.args)  # to say so
    dumps = known.path(line.container, known.PAUSED)
    shutil.rmtree(dumps, ignore_errors=True)
    with undone_if_it_fails(line.container, freezer):
        with contextlib.suppress(AgentError):
            _stop(line.container, dumps)
        freezer.freeze()
    return 0


def resume(line: CommandLine) -> int:
    """Let a paused container go on; one that a checkpoint has already let go on is no error."""
    if known.bundle_of(line.container) is None:
        become(line.args)
    stopped = known.path(line.container, known.PAUSED)
    status = line.spawn() if freezer_of(line).frozen() else 0
    if status == 0 and stopped.is_dir():
        _resume_contexts(line.container)
        shutil.rmtree(stopped)
    return status


def stop_for_dump(container: str, freezer: Freezer, dumps: Path) -> None:
    """Stop what `pause` has not stopped yet, and have the dumps in the new directory `dumps`.

    Raises MigroceError, AgentError, OSError; then some of it may be stopped or frozen.
    """
    paused = known.path(container, known.PAUSED)
    if paused.is_dir():
        shutil.move(paused, dumps)
        return
    freezer.thaw()  # the processes have work to do
    try:
        _stop(container, dumps)
    except AgentError as exc:
        raise MigroceError(f"{exc}; the container runs on") from exc
    freezer.freeze()  # quicker than CRIU's own, which polls every 100 ms


@contextlib.contextmanager
def undone_if_it_fails(container: str, freezer: Freezer) -> Iterator[None]:
    """Let the container run on if what is done inside fails, or if we are killed meanwhile."""

    def undo() -> None:
        with contextlib.suppress(AgentError):  # what has failed first is what counts
            go_on(container, freezer)

    guard = Guard(undo)
    try:
        yield
    except BaseException:
        undo()
        raise
    finally:
        guard.release()


def go_on(container: str, freezer: Freezer) -> None:
    """Let a container run on that was frozen, or whose RDMA contexts were stopped, whichever it was.

    Raises AgentError.
    """
    freezer.thaw()
    try:
        _resume_contexts(container)
    finally:
        shutil.rmtree(known.path(container, known.PAUSED), ignore_errors=True)


def freezer_of(line: CommandLine) -> Freezer:
    """The container's freezer. Raises EngineError."""
    from migroce.engines.cgroup import Freezer

    root = line.option("--root") or "/run/runc"
    state = read_json(Path(root) / line.container / "state.json")
    return Freezer.of(state.get("cgroup_paths") or {})


def _stop(container: str, dumps: Path) -> None:
    """Stop the contexts, and say beside their dumps what was stopped."""
    with AgentClient(known.agent_socket()) as agent:
        done = agent.container_stop(container, dumps, timeout_ms=_STOP_MS)
    dumps.mkdir(mode=0o700, exist_ok=True)
    write_json(dumps / "checkpoint.json", {"version": 1, "contexts": done["contexts"], "qps": done["qps"]})


def _resume_contexts(container: str) -> None:
    with AgentClient(known.agent_socket()) as agent:
        agent.container_resume(container, timeout_ms=RESUME_MS)
