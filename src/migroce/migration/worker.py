# SPDX-License-Identifier: BSD-3-Clause
"""`python -m migroce.migration.worker STATE | --host`: does things on a node for somebody elsewhere.

One JSON object per line: in `{"id", "op", "args"}`, out `{"id", "ok", "value" | "error"}`, first of all
`{"hello": ...}`. Each call has a thread. When the input ends while a container is on its way, the
command that moved it has died: the source's worker then starts `migroce.migration.recover`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from migroce import __version__
from migroce.engines import context
from migroce.engines.context import NodeContext
from migroce.engines.oci import ContainerInfo, OciEngine
from migroce.errors import EngineError
from migroce.migration import faults
from migroce.migration.destination import DestinationSide
from migroce.migration.journal import Record, journals, locked
from migroce.migration.link import encode_error
from migroce.migration.source import SourceSide


class Worker:
    """Serves the calls of one orchestrator or command."""

    def __init__(self, ctx: NodeContext, out: BinaryIO) -> None:
        self.ctx = ctx
        self.engine = OciEngine(ctx)
        self._out = out
        self._out_lock = threading.Lock()
        self._sources: dict[str, SourceSide] = {}
        self._destinations: dict[str, DestinationSide] = {}
        self._running: set[threading.Thread] = set()
        self._ops: dict[str, Callable[..., Any]] = {
            "ping": dict,
            "info": lambda container: _plain(self.engine.info(container)),
            "require": lambda container: _plain(self.engine.require(container)),
            "list": lambda: [_plain(each) for each in self.engine.list()],
            "create": self._create,
            "kill": self.engine.kill,
            "delete": self._delete,
            "logs": self.engine.logs,
            "wait": self.engine.wait,
            "agent": self._agent,
            "journals": self._journals,
            "recover": self._recover,
            "source": self._source,
            "destination": self._destination,
        }

    def serve(self, lines: BinaryIO) -> None:
        """Answer until the input ends, then see to what was left in the middle."""
        hello = {
            "name": self.ctx.name,
            "state": str(self.ctx.state),
            "version": __version__,
            "pid": os.getpid(),
        }
        self._send({"hello": hello})
        for line in lines:
            thread = threading.Thread(target=self._do, args=(json.loads(line),))
            self._running.add(thread)
            thread.start()
        for thread in list(self._running):
            thread.join()
        self._abandoned()

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, default=str).encode() + b"\n"
        with self._out_lock:
            try:
                self._out.write(line)
                self._out.flush()
            except OSError:
                pass  # nobody listens any more; the input ends too

    def _do(self, message: dict[str, Any]) -> None:
        try:
            value = self._ops[message["op"]](**message["args"])
            answer = {"id": message["id"], "ok": True, "value": value}
        except Exception as exc:  # noqa: BLE001 - it travels to the caller
            answer = {"id": message["id"], "ok": False, "error": encode_error(exc)}
        self._send(answer)
        self._running.discard(threading.current_thread())

    # -- operations ----------------------------------------------------------------------------------------

    def _create(self, container: str, args: list[str], **options: Any) -> dict[str, Any]:
        return _plain(self.engine.create(container, args, **options))

    def _delete(self, container: str) -> None:
        self.engine.require(container)
        for path, record in journals(self.ctx):
            if record.container == container and not record.ended and locked(path):
                raise EngineError("delete", f"{container} is being moved", "wait for the end of it")
        self.engine.delete(container)

    def _agent(self, method: str, **args: Any) -> Any:
        with self.engine.agent() as agent:
            return getattr(agent, method)(**args)

    def _journals(self) -> list[dict[str, Any]]:
        return [
            {**dataclasses.asdict(record), "path": str(path), "locked": locked(path)}
            for path, record in journals(self.ctx)
        ]

    def _recover(self) -> list[str]:
        from migroce.migration.recover import recover_all

        return recover_all(self.ctx)

    def _source(self, migration: str, container: str, method: str, args: dict[str, Any]) -> Any:
        side = self._sources.get(migration)
        if side is None:
            side = self._sources[migration] = SourceSide(self.ctx, migration, container)
        if method == "open":
            args = {"record": Record(**args)}
        return getattr(side, method)(**args)

    def _destination(self, migration: str, container: str, method: str, args: dict[str, Any]) -> Any:
        side = self._destinations.get(migration)
        if side is None:
            side = self._destinations[migration] = DestinationSide(self.ctx, migration, container)
        return getattr(side, method)(**args)

    def _abandoned(self) -> None:
        """See to what was in the middle: start a recovery for each journal that is open here."""
        for coming in self._destinations.values():
            with contextlib.suppress(Exception):
                coming.abandoned()
        for side in self._sources.values():
            if side.journal is not None:
                log = (side.where / "recover.log").open("ab")
                env = {name: value for name, value in os.environ.items() if name != faults.VARIABLE}
                subprocess.Popen(
                    [sys.executable, "-m", "migroce.migration.recover", str(side.journal.path)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    cwd="/", env=env,
                )  # fmt: skip
                side.journal.close()


def _plain(info: ContainerInfo) -> dict[str, Any]:
    return dataclasses.asdict(info)


def main(argv: list[str]) -> int:
    """Serve on standard input and output; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command in front deals with it
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        ctx = context.host() if argv == ["--host"] else NodeContext.load(Path(argv[0]))
    except (EngineError, OSError, IndexError) as exc:
        print(exc, file=sys.stderr)
        return 1
    Worker(ctx, out).serve(sys.stdin.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
