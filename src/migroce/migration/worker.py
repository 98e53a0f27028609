# SPDX-License-Identifier: BSD-3-Clause
"""`python -m migroce.migration.worker STATE | --host [--heartbeat=SECONDS]`: acts on a node.

One JSON object per line: in `{"id", "op", "args"}`, out `{"id", "ok", "value" | "error"}`, first of all
`{"hello": ...}`; `{}` is a sign of life. Each call has a thread. When the input ends (or, with a heartbeat,
is silent for so long) while a container is on its way, the command that moved it has died or cannot be
reached: the source's worker then starts `migroce.migration.recover`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from migroce import __version__, urgency
from migroce.engines import context
from migroce.engines.context import NodeContext
from migroce.engines.docker import DockerEngine
from migroce.engines.oci import ContainerInfo, OciEngine
from migroce.errors import EngineError
from migroce.migration.destination import DestinationSide
from migroce.migration.docker_destination import DockerDestination
from migroce.migration.docker_source import DockerSource
from migroce.migration.journal import Record, journals, locked
from migroce.migration.link import PROTOCOL, encode_error
from migroce.migration.source import SourceSide


class Worker:
    """Serves the calls of one orchestrator or command."""

    def __init__(self, ctx: NodeContext, out: BinaryIO) -> None:
        self.ctx = ctx
        self.engine = OciEngine(ctx)
        self.docker = DockerEngine(ctx)
        self._out = out
        self._out_lock = threading.Lock()
        self._sources: dict[str, SourceSide] = {}
        self._destinations: dict[str, DestinationSide] = {}
        self._urgent: set[str] = set()
        self._running: set[threading.Thread] = set()
        self._ops: dict[str, Callable[..., Any]] = {
            "ping": dict,
            "info": lambda container: _plain(self._by_docker(container) or self.engine.info(container)),
            "require": lambda container: _plain(self._by_docker(container) or self._require(container)),
            "list": lambda: [_plain(each) for each in self._all()],
            "create": self._create,
            "kill": self._kill,
            "delete": self._delete,
            "logs": self._logs,
            "wait": self._wait,
            "agent": self._agent,
            "journals": self._journals,
            "recover": self._recover,
            "source": self._source,
            "destination": self._destination,
        }

    def serve(self, lines: Iterator[bytes], patience: float | None = None) -> None:
        """Answer until the input ends, then see to what was left in the middle.

        What is going on then gets `patience` seconds to come to its end (None: as long as it takes).
        """
        hello = {
            "name": self.ctx.name,
            "state": str(self.ctx.state),
            "version": __version__,
            "protocol": PROTOCOL,
            "uid": os.geteuid(),
            "pid": os.getpid(),
        }
        self._send({"hello": hello})
        for line in lines:
            message = json.loads(line)
            if not message:
                continue
            thread = threading.Thread(target=self._do, args=(message,), daemon=patience is not None)
            self._running.add(thread)
            thread.start()
        end = None if patience is None else time.monotonic() + patience
        for thread in list(self._running):
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
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
        urgency.join()
        try:
            value = self._ops[message["op"]](**message["args"])
            answer = {"id": message["id"], "ok": True, "value": value}
        except Exception as exc:  # noqa: BLE001 - it travels to the caller
            answer = {"id": message["id"], "ok": False, "error": encode_error(exc)}
        self._send(answer)
        self._running.discard(threading.current_thread())

    # -- operations ----------------------------------------------------------------------------------------

    def _by_docker(self, container: str) -> ContainerInfo | None:
        """The container if Docker has it, and we have none of that name."""
        if self.ctx.bundle(container).is_dir() or not self.docker.here:
            return None
        try:
            return self.docker.info(container)
        except EngineError:
            self._must_not_matter()
            return None

    def _all(self) -> list[ContainerInfo]:
        found = self.engine.list()
        if self.docker.here:
            try:
                found += self.docker.list()
            except EngineError:
                self._must_not_matter()
        return found

    def _must_not_matter(self) -> None:
        """In an `except`: Docker does not answer, which is an error where it is what makes the containers."""
        if self.ctx.engine == "docker":
            raise

    def _require(self, container: str) -> ContainerInfo:
        """As `OciEngine.require`, Docker's named too."""
        try:
            return self.engine.require(container)
        except EngineError as exc:
            known = ", ".join(each.id for each in self._all()) or "none at all"
            reason = f"{self.ctx.name} has no container {container} (it has {known})"
            raise EngineError("container", reason, "see `migroce ps`") from exc

    def _kill(self, container: str, signal: str = "TERM") -> None:
        (self.engine if self._by_docker(container) is None else self.docker).kill(container, signal)

    def _logs(self, container: str) -> str:
        return (self.engine if self._by_docker(container) is None else self.docker).logs(container)

    def _wait(self, container: str, timeout: float | None = None) -> int | None:
        if self._by_docker(container) is None:
            return self.engine.wait(container, timeout)
        return self.docker.wait(container, timeout)

    def _create(self, container: str, args: list[str], **options: Any) -> dict[str, Any]:
        return _plain(self.engine.create(container, args, **options))

    def _delete(self, container: str) -> None:
        found = self._by_docker(container) or self._require(container)
        for path, record in journals(self.ctx):
            if record.container == container and not record.ended and locked(path):
                raise EngineError("delete", f"{container} is being moved", "wait for the end of it")
        if found.engine == "docker":
            self.docker.remove(container, volumes=False)
        else:
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

    def _source(
        self, migration: str, container: str, method: str, args: dict[str, Any], engine: str = "oci"
    ) -> Any:
        side = self._sources.get(migration)
        if side is None:
            kind = DockerSource if engine == "docker" else SourceSide
            side = self._sources[migration] = kind(self.ctx, migration, container)
        if method == "open":
            args = {"record": Record(**args)}
        with self._hurry(migration, method):
            return getattr(side, method)(**args)

    def _destination(
        self, migration: str, container: str, method: str, args: dict[str, Any], engine: str = "oci"
    ) -> Any:
        side = self._destinations.get(migration)
        if side is None:
            kind = DockerDestination if engine == "docker" else DestinationSide
            side = self._destinations[migration] = kind(self.ctx, migration, container)
        with self._hurry(migration, method):
            return getattr(side, method)(**args)

    @contextlib.contextmanager
    def _hurry(self, migration: str, method: str) -> Iterator[None]:
        """Before others from what makes a container stand still until it runs again, here or elsewhere."""
        if method in ("stop", "dump", "prepare_rdma", "begin", "restore") and migration not in self._urgent:
            self._urgent.add(migration)
            urgency.begin()
        if method in ("commit", "retire"):
            self._calm(migration)
        yield
        if method == "undo":
            self._calm(migration)

    def _calm(self, migration: str) -> None:
        if migration in self._urgent:
            self._urgent.remove(migration)
            urgency.end()

    def _abandoned(self) -> None:
        """See to what was in the middle: whoever lets go of us sees to it no more."""
        for migration in list(self._urgent):
            self._calm(migration)
        for coming in self._destinations.values():
            with contextlib.suppress(Exception):
                coming.abandoned()
        for side in self._sources.values():
            if side.journal is not None:
                with contextlib.suppress(OSError):
                    side.give_up()


def _plain(info: ContainerInfo) -> dict[str, Any]:
    return dataclasses.asdict(info)


def main(argv: list[str]) -> int:
    """Serve on standard input and output; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command in front deals with it
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        ctx = context.host() if argv[0] == "--host" else NodeContext.load(Path(argv[0]))
        heartbeat = next((float(each.partition("=")[2]) for each in argv[1:] if "heartbeat" in each), None)
    except (EngineError, OSError, IndexError, ValueError) as exc:
        print(exc, file=sys.stderr)
        return 1
    worker = Worker(ctx, out)
    if heartbeat is None:
        worker.serve(iter(sys.stdin.buffer))
        return 0
    worker.serve(_lively(0, heartbeat), patience=5.0)
    os._exit(0)  # not waiting for threads that hang on a connection that is no more


def _lively(fd: int, limit: float) -> Iterator[bytes]:
    """Lines from `fd` until it ends or says nothing for `limit` seconds."""
    buffer = bytearray()
    while select.select([fd], [], [], limit)[0]:
        data = os.read(fd, 1 << 16)
        if not data:
            return
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            yield bytes(buffer[: end + 1])
            del buffer[: end + 1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
