# SPDX-License-Identifier: BSD-3-Clause
"""The orchestrator's end of a worker: a process on a node that does things there, one JSON line each way.

A worker is started before anything stops, so that no interpreter starts and no connection is made
while a container stands still.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from migroce import __version__
from migroce.errors import EngineError, MigrationError, MigroceError, NodeError

START_LIMIT = 20.0
"""Seconds that a worker gets to say hello."""
CALL_LIMIT = 900.0
"""Seconds after which a call that does not say otherwise is given up."""

PROTOCOL = 3
"""Of what is said between command and worker; both must have the same."""

_KINDS: dict[str, type[EngineError | NodeError | MigrationError]] = {
    "EngineError": EngineError,
    "NodeError": NodeError,
    "MigrationError": MigrationError,
}


class WorkerLostError(NodeError):
    """The worker ended (killed, or its node or connection is gone): what it was doing is unknown."""


def encode_error(exc: BaseException) -> dict[str, str]:
    """An exception as it travels from a worker."""
    return {
        "type": type(exc).__name__,
        "text": str(exc),
        "step": str(getattr(exc, "step", "")),
        "reason": str(getattr(exc, "reason", "")),
        "mend": str(getattr(exc, "mend", "")),
    }


def decode_error(raw: dict[str, str], op: str) -> MigroceError:
    """The exception that a worker's answer stands for."""
    if raw.get("step"):
        kind = _KINDS.get(raw["type"], EngineError)
        return kind(raw["step"], raw["reason"], raw["mend"])
    kinds = {"OSError", "FileNotFoundError", "PermissionError", "AgentError"}
    text = raw.get("text", "")
    return EngineError(op, text if raw.get("type") in kinds else f"{raw.get('type')}: {text}")


class Worker:
    """A worker process; usable from several threads, calls run side by side in it."""

    def __init__(
        self, node: str, argv: Sequence[str], env: dict[str, str] | None = None, *,
        explain: Callable[[str, int | None], tuple[str, str] | None] | None = None,
        heartbeat: float | None = None, remote: bool = False,
    ) -> None:  # fmt: skip
        """Start `argv`. `explain`: (reason, mend) for its words and exit status if they are known.
        `heartbeat`: tell it every so many seconds that we live. `remote`: it may be of another release.

        Raises NodeError.
        """
        self.node = node
        self._lost = f"the helper process on {node} has ended"
        if remote:
            self._lost = f"the connection to {node} was lost, or the helper process there has ended"
        self._ended = threading.Event()
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[str, Future[Any]]] = {}
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._hello: Future[dict[str, Any]] = Future()
        try:
            self._process = subprocess.Popen(
                list(argv), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as exc:
            self._errors.close()
            raise NodeError("connect", f"{node} cannot be reached: {argv[0]}: {exc.strerror}") from exc
        self._reader = threading.Thread(target=self._read, name=f"worker {node}", daemon=True)
        self._reader.start()
        try:
            self.hello = self._hello.result(START_LIMIT)
        except (FutureTimeout, MigroceError) as exc:
            words, status = self._last_words()
            known = explain(words, status) if explain is not None else None
            late = f"it does not answer within {START_LIMIT:.0f} s" if isinstance(exc, FutureTimeout) else ""
            reason = (words.splitlines() or [""])[-1] or late or str(exc) or "it does not answer"
            self.kill()
            mend = "is it up, and is migroce installed there?"
            reason, mend = known or (reason, mend)
            raise NodeError("connect", f"{node} cannot be reached: {reason}", mend) from exc
        if remote:
            self._check_peer()
        if heartbeat is not None:
            threading.Thread(target=self._beat, args=(heartbeat,), name=f"heart {node}", daemon=True).start()

    def _check_peer(self) -> None:
        """Refuse a worker that is not of our kind. Raises NodeError."""
        theirs = str(self.hello.get("version", "?"))
        problem = None
        if self.hello.get("protocol") != PROTOCOL:
            same = " of another state" if theirs == __version__ else f" {theirs}"
            mend = "install the same on both machines"
            problem = f"it has migroce{same}, here is {__version__}: they do not understand each other", mend
        elif self.hello.get("uid", 0) != 0:
            mend = "log in as root: ssh://root@host"
            problem = "the user there is not root, which checkpoint and restore need", mend
        if problem is not None:
            self.kill()
            raise NodeError("connect", f"{self.node} cannot be used: {problem[0]}", problem[1])

    def _beat(self, period: float) -> None:
        while not self._ended.wait(period):
            self._write(b"{}\n")

    def _write(self, line: bytes) -> bool:
        try:
            assert self._process.stdin is not None
            with self._write_lock:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    @property
    def pid(self) -> int:
        """Of the local process (for ssh, that of ssh)."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._answer(json.loads(line))
        lost = WorkerLostError("worker", self._lost)
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        if not self._hello.done():
            self._hello.set_exception(lost)
        for _, future in waiting.values():
            future.set_exception(lost)

    def _answer(self, message: dict[str, Any]) -> None:
        if "hello" in message:
            self._hello.set_result(message["hello"])
            return
        with self._lock:
            op, future = self._waiting.pop(int(message["id"]), ("", None))
        if future is None:
            return
        if message["ok"]:
            future.set_result(message.get("value"))
        else:
            future.set_exception(decode_error(message["error"], op))

    def submit(self, op: str, **args: Any) -> Future[Any]:
        """Ask for `op`; the answer comes with the future."""
        future: Future[Any] = Future()
        number = next(self._ids)
        with self._lock:
            self._waiting[number] = (op, future)
        line = json.dumps({"id": number, "op": op, "args": args}, default=str).encode() + b"\n"
        if not self._write(line):
            with self._lock:
                lost = self._waiting.pop(number, None)
            if lost is not None:
                future.set_exception(WorkerLostError("worker", self._lost))
        return future

    def call(self, op: str, timeout: float = CALL_LIMIT, **args: Any) -> Any:
        """Do `op` and wait for its value. Raises what the worker raised, NodeError on timeout."""
        future = self.submit(op, **args)
        try:
            return future.result(timeout)
        except FutureTimeout as exc:
            raise NodeError(op, f"{self.node} did not answer within {timeout:.0f} s") from exc

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def close(self, timeout: float = 30.0) -> None:
        """End the worker after what it is doing; at the latest after `timeout` seconds."""
        self._ended.set()
        with contextlib.suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        """End the worker at once."""
        self._ended.set()
        self._process.kill()
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        self._errors.close()

    def _last_words(self) -> tuple[str, int | None]:
        """(what it wrote to its standard error, its exit status) of a worker that said no hello."""
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1)
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            return self._errors.read().decode(errors="replace").strip(), status
        return "", status
