# SPDX-License-Identifier: BSD-3-Clause
"""Stop, prepare and resume of a container. Each holds the container's lock from start to end.

A stop that fails goes back by resuming what it has stopped. A resume that runs out of time leaves the
container resuming: latecomers are let in, and resume may be called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from migroce import urgency
from migroce.agent import netns
from migroce.agent.container import HOLD_SECONDS, Container, State
from migroce.agent.context import Context, Phase
from migroce.agent.errors import AgentError, errno_name
from migroce.control import NO_GID, Stop
from migroce.dump import DumpError, read

log = logging.getLogger("migroce.agent")

TOKEN_MS = 200
"""How long a stop waits at most for peers that have not acknowledged their token yet."""


EventSink = Callable[[dict[str, Any]], None]


@contextlib.asynccontextmanager
async def hurry() -> AsyncIterator[None]:
    """What a container that stands still waits for is done before others' work."""
    with urgency.moment():
        yield


async def stop(c: Container, dump_dir: Path, seconds: float, event: EventSink) -> dict[str, Any]:
    """Stop every context, write the dumps, stand in. AgentError: all are running again."""
    async with c.lock, hurry():
        if c.implicit:
            raise AgentError("processes outside containers cannot be stopped", "EINVAL")
        if c.state is not State.RUNNING:
            already = c.state is State.STOPPED
            raise AgentError(
                f"container {c.id} is {c.state.value}, not running", "EALREADY" if already else "EBUSY"
            )
        loop = asyncio.get_running_loop()
        start = loop.time()
        await _wait_complete(c, start + seconds, "has no connection to the agent")
        c.state = State.STOPPING
        c.node.save()
        c.unlisten()
        try:
            dumps = await _stop_all(c, seconds)
            paths = _start_standin(c, dump_dir, dumps)
        except AgentError:
            await _undo_stop(c)
            raise
        c.state = State.STOPPED
        c.node.save()
        for ctx in dumps:
            event({"event": "stopped", "slot": ctx.slot, "pid": ctx.pid, "qps": ctx.n_qp})
        return {
            "contexts": len(dumps),
            "qps": sum(ctx.n_qp for ctx in dumps),
            "dumps": paths,
            "ms": (loop.time() - start) * 1e3,
        }


async def _wait_complete(c: Container, deadline: float, what: str) -> None:
    """Wait until every context has its connection and runs. AgentError ETIMEDOUT names those without."""
    loop = asyncio.get_running_loop()
    while missing := c.missing():
        if loop.time() >= deadline:
            raise AgentError(f"{', '.join(ctx.name for ctx in missing)} {what}", "ETIMEDOUT")
        await _wait_change(c, deadline - loop.time())


async def _wait_change(c: Container, seconds: float) -> None:
    c.changed.clear()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(c.changed.wait(), max(0.0, min(0.1, seconds)))


async def _stop_all(c: Container, seconds: float) -> dict[Context, bytes]:
    loop = asyncio.get_running_loop()
    waiting: dict[Context, asyncio.Future[bytes | None]] = {}
    for ctx in list(c.contexts.values()):
        ctx.stopping = waiting[ctx] = loop.create_future()
        ctx.dump = b""
        ctx.phase = Phase.STOPPING
        if ctx.link is not None:
            ctx.link.send(Stop(0, min(TOKEN_MS, int(seconds * 250))), request_id=c.next_request())
    if waiting:
        await asyncio.wait(waiting.values(), timeout=seconds)
    late = [ctx.name for ctx, waiter in waiting.items() if not waiter.done()]
    errors = [e for w in waiting.values() if w.done() and (e := w.exception()) is not None]
    for waiter in waiting.values():
        waiter.cancel()
    if errors:
        raise errors[0]
    if late:
        raise AgentError(f"{', '.join(late)} did not stop within {seconds:g} s", "ETIMEDOUT")
    dumps = {ctx: data for ctx, waiter in waiting.items() if (data := waiter.result()) is not None}
    for ctx in list(c.contexts.values()):
        if ctx not in dumps:  # ended, or closed its device, meanwhile
            c.release(ctx)
    return dumps


def _start_standin(c: Container, dump_dir: Path, dumps: dict[Context, bytes]) -> list[str]:
    parsed = [ctx.check_dump(data) for ctx, data in dumps.items()]
    for ctx, dump in zip(dumps, parsed, strict=True):
        if not dump.stopped:
            raise AgentError(f"{ctx.name} sent a live snapshot for its dump", "EBADMSG")
    c.moved_to = NO_GID
    c.stand_in(parsed)
    kept = c.kept_dir()
    paths = []
    try:
        for directory in (dump_dir, kept):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for ctx, data in dumps.items():
            path = dump_dir / f"rdma-{ctx.slot}.dump"
            paths.append(str(path))
            for target in (path, kept / path.name):
                _write_private(target, data)
    except OSError as e:
        raise AgentError(
            f"cannot write the dump to {e.filename or dump_dir}: {e.strerror}", errno_name(e.errno)
        ) from None
    return paths


def _write_private(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb", buffering=0) as f:
        if f.write(data) != len(data):  # how a full disk shows when a part still fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


async def _undo_stop(c: Container) -> None:
    """Bring back what has been stopped; those that have not are running still."""
    for ctx in c.contexts.values():
        ctx.stopping = None
        if ctx.phase is Phase.STOPPING:
            ctx.phase = Phase.RUNNING
    c.end_standin()
    c.state = State.RESUMING
    try:
        c.listen()
        await _wait_complete(c, asyncio.get_running_loop().time() + HOLD_SECONDS, "did not come back")
        c.state = State.RUNNING
    except AgentError as e:
        log.error("%s: a failed stop could not be undone at once: %s", c.id, e)
    c.node.save()


async def prepare(c: Container, path: str | None, gid: bytes, dumps: list[str]) -> dict[str, Any]:
    """Get ready to become the destination: checks dumps and slots, opens nothing yet. AgentError."""
    async with c.lock, hurry():
        contexts = [_context_of(name) for name in dumps]
        if len({ctx.slot for ctx in contexts}) != len(contexts):
            raise AgentError("two dumps are for the same slot", "EINVAL")
        for ctx in contexts:
            c.admission.check_range(ctx)
        if c.state is not State.STOPPED:  # restored where it was stopped: its stand-in goes on till then
            c.state = State.PREPARED
        c.netns, c.gid, c.prepared = path, gid, contexts
        c.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        c.node.save()
        return {"dir": str(c.directory), "contexts": len(contexts), "qps": sum(x.n_qp for x in contexts)}


def _context_of(name: str) -> Context:
    try:
        dump = read(name)
    except DumpError as e:
        raise AgentError(str(e), "EBADMSG") from None
    if not dump.stopped:
        raise AgentError(f"{name}: a live snapshot; its process was not stopped", "EBADMSG")
    ctx = dump.context
    slot = ctx.slot if ctx.slot < 64 else 0
    return Context(slot, ctx.qpn_base, ctx.qpn_count, gid=ctx.gid, phase=Phase.STOPPED, n_qp=len(dump.qps))


async def resume(c: Container, seconds: float, event: EventSink) -> dict[str, Any]:
    """Let the stopped processes go on. AgentError ETIMEDOUT names those that did not come."""
    async with c.lock, hurry():
        loop = asyncio.get_running_loop()
        start = loop.time()
        if c.state in (State.STOPPED, State.PREPARED):
            try:
                _begin_resume(c)
            except AgentError:
                if c.state is State.STOPPED and not c.prepared:
                    c.stand_in_again()
                raise
        told = {ctx for ctx in c.contexts.values() if ctx not in c.missing()}
        while True:
            missing = c.missing()
            for ctx in c.contexts.values():
                if ctx not in missing and ctx not in told:
                    told.add(ctx)
                    event({"event": "resumed", "slot": ctx.slot, "pid": ctx.pid, "qps": ctx.n_qp})
            if not missing:
                break
            if loop.time() - start >= seconds:
                who = ", ".join(x.name + (f", last error: {x.error}" if x.error else "") for x in missing)
                raise AgentError(
                    f"{len(missing)} of {len(c.contexts)} processes did not come back within "
                    f"{seconds:g} s: {who}",
                    "ETIMEDOUT",
                )
            await _wait_change(c, start + seconds - loop.time())
            _forget_dead(c)
        c.state = State.RUNNING
        c.node.save()
        done = list(c.contexts.values())
        return {"contexts": len(done), "qps": sum(x.n_qp for x in done), "ms": (loop.time() - start) * 1e3}


def _begin_resume(c: Container) -> None:
    old = list(c.contexts.values())
    alive = [ctx for ctx in old if ctx.is_alive()]
    if c.prepared:
        gone, expected = old, c.prepared
    elif alive:  # undone before the dump killed them: who is missing has ended by itself
        gone, expected = [ctx for ctx in old if ctx not in alive], alive
    else:  # killed by the dump, restored from it
        gone, expected = [], old
    if c.standin is not None:
        c.standin.close()
    for ctx in gone:
        c.release(ctx)
    if c.netns is not None and expected and c.port is None:
        c.port = c.node.ports.get(netns.open_path(c.netns))
    for ctx in expected:
        # One that is here may end instead of coming back.
        ctx.phase, ctx.came, ctx.error = Phase.STOPPED, ctx.is_alive(), ""
        if c.port is not None:
            c.port.slots.reserve(ctx.slot, ctx, whole=ctx.whole)
        c.contexts[ctx.slot] = ctx
        if c.port is not None and any(c.gid):  # where the address is known: before anybody asks
            c.port.open(ctx.slot, c.gid, fixed=True)
    c.prepared = []
    c.end_standin()
    c.state = State.RESUMING
    c.listen()
    c.node.save()


def _forget_dead(c: Container) -> None:
    """Processes that came and died while they were waited for."""
    for ctx in c.missing():
        if ctx.came and not ctx.is_alive():
            c.release(ctx)
