# SPDX-License-Identifier: BSD-3-Clause
"""The agent's admin interface: JSON lines over a unix stream socket (docs/control.md)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migroce.agent import transitions
from migroce.agent.container import Container, State
from migroce.agent.context import Context
from migroce.agent.errors import AgentError
from migroce.agent.transitions import EventSink
from migroce.agent.unix import bind_unix
from migroce.dump import Dump, DumpError, gid_bytes, read

if TYPE_CHECKING:
    from migroce.agent.server import Agent

log = logging.getLogger("migroce.agent")

MAX_LINE = 1 << 20
"""Longest request, bytes."""
MAX_CONNECTIONS = 128
SNAPSHOT_SECONDS = 1.0
DEFAULT_TIMEOUT_MS = 5000
MAX_TIMEOUT_MS = 600_000


class Connection:
    """One client. Its requests are answered one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        sock: socket.socket = writer.get_extra_info("socket")
        cred = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, self.uid, _gid = struct.unpack("iII", cred)

    def write(self, message: dict[str, Any]) -> None:
        """Queue one line."""
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


Params = dict[str, Any]
Handler = Callable[[Connection, Params, EventSink], Awaitable[dict[str, Any]]]


class AdminServer:
    """Listens, parses, dispatches."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[str, Handler] = {
            "status": self._status,
            "ps": self._ps,
            "shutdown": self._shutdown,
            "container.add": self._add,
            "container.stop": self._stop,
            "container.prepare": self._prepare,
            "container.resume": self._resume,
            "container.moved": self._moved,
            "container.remove": self._remove,
            "migration.begin": self._begin,
            "migration.end": self._end,
        }

    @property
    def busy(self) -> bool:
        """Whether anybody is connected."""
        return bool(self._tasks)

    async def start(self, path: Path) -> None:
        """Listen. Raises OSError."""
        sock = bind_unix(path, socket.SOCK_STREAM, 0o600)
        self._path = path
        self._server = await asyncio.start_unix_server(self._accepted, sock=sock, limit=MAX_LINE)

    async def close(self) -> None:
        """End all connections, after the answers that are due."""
        if self._server is None:
            return
        self._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2.0)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conn = Connection(reader, writer)
        task = asyncio.current_task()
        if task is None or conn.uid not in (0, os.geteuid()) or len(self._tasks) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._tasks.add(task)
        self._agent.idle_changed()
        try:
            while line := await reader.readline():
                await self._serve(conn, line)
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # gone, a line that is too long, or the agent ends
        finally:
            self._tasks.discard(task)
            writer.close()
            if not self._agent.done.is_set():
                self._agent.owners.broken(conn)
            self._agent.idle_changed()

    async def _serve(self, conn: Connection, line: bytes) -> None:
        ident: Any = None
        answer: dict[str, Any]
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise AgentError("a request is a JSON object", "EINVAL")
            ident = request.get("id")
            handler = self._handlers.get(str(request.get("cmd")))
            if handler is None:
                raise AgentError(f"there is no command {request.get('cmd')!r}", "ENOSYS")
            result = await handler(conn, request, lambda event: conn.write({"id": ident, **event}))
            answer = {"id": ident, "ok": True, **result}
        except AgentError as e:
            answer = {"id": ident, "ok": False, "error": str(e), "errno": e.errno}
        except (ValueError, RecursionError) as e:
            error = f"the request is not valid JSON: {e}"
            answer = {"id": ident, "ok": False, "error": error, "errno": "EINVAL"}
        except Exception as e:
            log.exception("a command failed")
            answer = {"id": ident, "ok": False, "error": f"internal error: {e!r}", "errno": "EIO"}
        conn.write(answer)

    # ---- commands ---------------------------------------------------------------------------------

    async def _status(self, _conn: Connection, _params: Params, _event: EventSink) -> dict[str, Any]:
        return self._agent.status()

    async def _ps(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        only = _text(params, "container", None)
        chosen = [self._agent.container(only)] if only else list(self._agent.containers.values())
        return {"containers": [await _snapshots(c) for c in chosen]}

    async def _shutdown(self, _conn: Connection, _params: Params, _event: EventSink) -> dict[str, Any]:
        asyncio.get_running_loop().call_later(0.01, self._agent.done.set)
        return {}

    async def _add(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        path, gid = _text(params, "netns", None), _gid(params, "gid")
        container = self._agent.add(_ident(params), path, gid, listen=True)
        return {"dir": str(container.directory)}

    async def _stop(self, _conn: Connection, params: Params, event: EventSink) -> dict[str, Any]:
        directory = Path(_ident(params, "dump_dir"))
        if not directory.is_absolute():
            raise AgentError("dump_dir must be an absolute path", "EINVAL")
        container = self._agent.container(_ident(params))
        return await transitions.stop(container, directory, _seconds(params), event)

    async def _prepare(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        path, gid, dumps = _text(params, "netns", None), _gid(params, "gid"), params.get("dumps")
        if not isinstance(dumps, list) or not all(isinstance(d, str) for d in dumps):
            raise AgentError("dumps must be a list of paths", "EINVAL")
        ident = _ident(params)
        known = ident in self._agent.containers
        if known and self._agent.container(ident).state not in (State.STOPPED, State.PREPARED):
            state = self._agent.container(ident).state.value
            raise AgentError(f"container {ident} is already here and {state}", "EEXIST")
        container = self._agent.add(ident, path, gid, listen=False)
        try:
            return await transitions.prepare(container, path, gid, dumps)
        except AgentError:
            if not known:
                self._agent.remove(ident)
            raise

    async def _resume(self, _conn: Connection, params: Params, event: EventSink) -> dict[str, Any]:
        return await transitions.resume(self._agent.container(_ident(params)), _seconds(params), event)

    async def _moved(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        gid = _gid(params, "gid")
        if not any(gid):
            raise AgentError("gid must be the container's new address", "EINVAL")
        self._agent.container(_ident(params)).moved(gid)
        return {}

    async def _remove(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        return {"removed": self._agent.remove(_ident(params))}

    async def _begin(self, conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        journal = _ident(params, "journal")
        if not Path(journal).is_absolute():
            raise AgentError("journal must be an absolute path", "EINVAL")
        self._agent.owners.begin(journal, conn.pid, conn)
        return {}

    async def _end(self, _conn: Connection, params: Params, _event: EventSink) -> dict[str, Any]:
        return {"ended": self._agent.owners.end(_ident(params, "journal"))}


async def _snapshots(container: Container) -> dict[str, Any]:
    """A container with the dumps of its contexts, live or kept; what cannot be had says why."""

    async def one(ctx: Context) -> dict[str, Any]:
        out = ctx.to_json()
        try:
            dump: Dump
            if ctx.link is None:
                dump = read(container.kept_dir() / f"rdma-{ctx.slot}.dump")
            else:
                dump = await container.snapshot(ctx, SNAPSHOT_SECONDS)
            out["dump"] = dump.to_json()
        except (AgentError, DumpError) as e:
            out["dump"], out["error"] = None, str(e)
        return out

    contexts = [ctx for _, ctx in sorted(container.contexts.items())]
    out = container.to_json()
    out["contexts"] = await asyncio.gather(*(one(ctx) for ctx in contexts))
    return out


def _ident(params: Params, name: str = "container") -> str:
    value = params.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise AgentError(f"{name} must be a non-empty string", "EINVAL")
    return value


def _text(params: Params, name: str, default: str | None) -> str | None:
    value = params.get(name, default)
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise AgentError(f"{name} must be a string or null", "EINVAL")
    return value or None


def _gid(params: Params, name: str) -> bytes:
    try:
        return gid_bytes(_text(params, name, None) or "")
    except ValueError as e:
        raise AgentError(f"{name}: {e}", "EINVAL") from None


def _seconds(params: Params) -> float:
    value = params.get("timeout_ms", DEFAULT_TIMEOUT_MS)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_TIMEOUT_MS:
        raise AgentError(f"timeout_ms must be a number up to {MAX_TIMEOUT_MS}", "EINVAL")
    return value / 1e3
