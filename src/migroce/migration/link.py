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
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from migroce.errors import EngineError, MigrationError, MigroceError, NodeError

START_LIMIT = 20.0
"""Seconds that a worker gets to say hello."""
CALL_LIMIT = 900.0
"""Seconds after which a call that does not say otherwise is given up."""

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

    def __init__(self, node: str, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.node = node
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[str, Future[Any]]] = {}
        self._lock = threading.Lock()
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
            reason = self._last_words() or str(exc) or "it does not answer"
            self.kill()
            mend = "is it up, and is migroce installed there?"
            raise NodeError("connect", f"{node} cannot be reached: {reason}", mend) from exc

    @property
    def pid(self) -> int:
        """Of the local process (for ssh, that of ssh)."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._answer(json.loads(line))
        lost = WorkerLostError("worker", f"the helper process on {self.node} has ended")
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
        try:
            assert self._process.stdin is not None
            with self._lock:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except (OSError, ValueError):
            with self._lock:
                lost = self._waiting.pop(number, None)
            if lost is not None:
                future.set_exception(
                    WorkerLostError("worker", f"the helper process on {self.node} has ended")
                )
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
        self._process.kill()
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._process.poll()
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""
