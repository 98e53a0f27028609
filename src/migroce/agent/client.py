# SPDX-License-Identifier: BSD-3-Clause
"""A small synchronous client of the agent's admin interface, for the CLI and for migrations."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migroce.agent.errors import AgentError, errno_name
from migroce.agent.unix import short_path

__all__ = ["AgentClient", "AgentError"]

_MARGIN = 5.0
"""What is waited for an answer beyond the time that the agent was given, seconds."""

EventSink = Callable[[dict[str, Any]], None]


class AgentClient:
    """A connection to an agent, made when first needed. Every failure is an AgentError.

    The connection that `migration_begin` was sent by must be held until `migration_end`.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait_s: float = 0.0) -> None:
        """`path`: the admin.sock. `wait_s`: how long to wait for an agent that is being started."""
        self.path = Path(path)
        self._wait = wait_s
        self._sock: socket.socket | None = None
        self._buffer = bytearray()
        self._id = 0

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Connect now, if not connected."""
        if self._sock is not None:
            return
        deadline = time.monotonic() + self._wait
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                with short_path(self.path) as short:
                    sock.connect(short)
            except OSError as e:
                sock.close()
                absent = isinstance(e, (FileNotFoundError, ConnectionRefusedError))
                if absent and time.monotonic() < deadline:
                    time.sleep(0.005)
                    continue
                why = f"{e.strerror}{'; is it running?' if absent else ''}"
                raise AgentError(f"no agent at {self.path}: {why}", errno_name(e.errno)) from None
            self._sock = sock
            self._buffer.clear()
            return

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def call(
        self, cmd: str, *, timeout_s: float = 30.0, on_event: EventSink | None = None, **params: Any
    ) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.connect()
        assert self._sock is not None
        self._id += 1
        request = json.dumps({"id": self._id, "cmd": cmd, **params}).encode() + b"\n"
        deadline = time.monotonic() + timeout_s
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(request)
            while True:
                message = self._receive(deadline)
                if message.get("id") != self._id:
                    continue
                if "ok" not in message:
                    if on_event is not None:
                        on_event(message)
                    continue
                if message["ok"]:
                    return {k: v for k, v in message.items() if k not in ("id", "ok")}
                break
        except TimeoutError:
            self.close()
            raise AgentError(f"the agent did not answer {cmd} within {timeout_s:g} s", "ETIMEDOUT") from None
        except (OSError, ValueError) as e:
            self.close()
            raise AgentError(f"the connection to the agent at {self.path} broke: {e}", "ECONNRESET") from None
        raise AgentError(str(message.get("error")), str(message.get("errno")))

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self._sock is not None
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(1 << 18)
            if not data:
                raise ConnectionResetError("closed by the agent")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("the agent sent no JSON object")
        return message

    # ---- commands, see docs/control.md --------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Version, pid, node, uptime_s, containers, migrations."""
        return self.call("status")

    def ps(self, container: str | None = None) -> list[dict[str, Any]]:
        """Containers, each with its contexts, each with its "dump" (live, as `Dump.to_json`) or "error"."""
        found: list[dict[str, Any]] = self.call("ps", container=container)["containers"]
        return found

    def shutdown(self) -> None:
        """End the agent."""
        self.call("shutdown")
        self.close()

    def container_add(self, container: str, *, netns: str | None = None, gid: str | None = None) -> Path:
        """Make a container known; the directory to mount at its /run/migroce. Idempotent."""
        return Path(self.call("container.add", container=container, netns=netns, gid=gid)["dir"])

    def container_stop(
        self,
        container: str,
        dump_dir: str | os.PathLike[str],
        *,
        timeout_ms: float = 5000,
        on_event: EventSink | None = None,
    ) -> dict[str, Any]:
        """Stop its processes' QPs and stand in: {contexts, qps, dumps, ms}. On error all run again."""
        return self.call(
            "container.stop",
            container=container,
            dump_dir=os.path.abspath(dump_dir),
            timeout_ms=timeout_ms,
            on_event=on_event,
            timeout_s=2 * timeout_ms / 1e3 + _MARGIN,
        )

    def container_prepare(
        self,
        container: str,
        *,
        dumps: Sequence[str | os.PathLike[str]],
        netns: str | None = None,
        gid: str | None = None,
    ) -> dict[str, Any]:
        """Get ready to be the destination: {dir, contexts, qps}."""
        return self.call(
            "container.prepare",
            container=container,
            netns=netns,
            gid=gid,
            dumps=[os.path.abspath(d) for d in dumps],
        )

    def container_resume(
        self, container: str, *, timeout_ms: float = 5000, on_event: EventSink | None = None
    ) -> dict[str, Any]:
        """Let the stopped processes go on, at the destination or as undo: {contexts, qps, ms}."""
        return self.call(
            "container.resume",
            container=container,
            timeout_ms=timeout_ms,
            on_event=on_event,
            timeout_s=timeout_ms / 1e3 + _MARGIN,
        )

    def container_moved(self, container: str, gid: str) -> None:
        """The stopped container runs elsewhere under the address `gid`: point its peers there."""
        self.call("container.moved", container=container, gid=gid)

    def container_remove(self, container: str) -> bool:
        """Forget a container; False when it was not known."""
        return bool(self.call("container.remove", container=container)["removed"])

    def migration_begin(self, journal: str | os.PathLike[str]) -> None:
        """Own a migration by this connection: if it breaks before the end, the agent recovers it."""
        self.call("migration.begin", journal=os.path.abspath(journal))

    def migration_end(self, journal: str | os.PathLike[str]) -> bool:
        """The migration has ended, either way; False when it was not known."""
        return bool(self.call("migration.end", journal=os.path.abspath(journal))["ended"])
