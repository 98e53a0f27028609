# SPDX-License-Identifier: BSD-3-Clause
"""The OCI runtime's command line: state, kill, delete, checkpoint, and a monitor for run and restore.

The runtime runs in the foreground below a shell of four lines, the container's monitor, which writes
down the exit status; the container outlives both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from migroce import criu, urgency
from migroce.engines.context import NodeContext
from migroce.errors import EngineError

_MONITOR = """
f=$MIGROCE_EXIT; unset MIGROCE_EXIT
"$@"
rc=$?
[ -e "$f.not" ] || { echo $rc >"$f~" && mv "$f~" "$f"; }
"""
LIMIT = 600.0
"""Seconds that one call of the runtime may take."""
DUMP_MARK = "MIGROCE_DUMP"
RESTORE_MARK = "MIGROCE_RESTORE"


class Runc:
    """The runtime of one node (runc, or anything with its command line)."""

    def __init__(self, ctx: NodeContext) -> None:
        self._ctx = ctx
        self._env: dict[str, str] | None = None

    @property
    def env(self) -> dict[str, str]:
        """Our environment with the CRIU to use first in PATH, and without signals of the runtime's own.

        Go preempts its threads by SIGURG; runc in the foreground passes on what signals it gets, those, too:
        each restored program got some, which interrupts the system calls of one that has a handler.
        """
        if self._env is None:
            env = criu.environment()
            for name in ("LD_PRELOAD", "NOTIFY_SOCKET", "LISTEN_FDS"):
                env.pop(name, None)
            env["GODEBUG"] = ",".join(filter(None, (env.get("GODEBUG"), "asyncpreemptoff=1")))
            self._env = env
        return self._env

    def argv(self, *args: str, log: Path | None = None) -> list[str]:
        """A command line of the runtime."""
        options = ["--root", str(self._ctx.runc_root)]
        if log is not None:
            options += ["--log", str(log), "--log-format", "json"]
        return [self._ctx.runtime, *options, *args]

    def run(self, *args: str, step: str, env: dict[str, str] | None = None) -> str:
        """Run it to its end; its output. Raises EngineError with the runtime's own last words."""
        argv = urgency.command(self.argv(*args), real_time=step == "dump")
        try:
            done = subprocess.run(
                argv, env=env or self.env, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, errors="replace", timeout=LIMIT, check=False, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError as exc:
            mend = f"install {self._ctx.runtime} (Debian: apt install runc)"
            raise EngineError(step, f"{self._ctx.runtime} is not there", mend) from exc
        except subprocess.TimeoutExpired as exc:
            raise EngineError(step, f"{self._ctx.runtime} did not end within {LIMIT:.0f} s") from exc
        if done.returncode != 0:
            raise EngineError(
                step, last_words(done.stderr) or f"{self._ctx.runtime} ended with {done.returncode}"
            )
        return done.stdout

    def state(self, container: str) -> dict[str, Any] | None:
        """The runtime's own `state.json` (richer than `runc state`); None: no such container."""
        try:
            raw = json.loads((self._ctx.runc_root / container / "state.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as exc:
            raise EngineError("container", f"{container}'s state.json cannot be read: {exc}") from exc
        return raw if isinstance(raw, dict) else None

    def containers(self) -> list[str]:
        """Ids of the containers that the runtime knows."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.parent.name for path in self._ctx.runc_root.glob("*/state.json"))
        return []

    def kill(self, container: str, signal: str) -> None:
        """Send `signal` to the container's init. Raises EngineError."""
        self.run("kill", container, signal, step="kill")

    def delete(self, container: str) -> None:
        """Kill the container if it runs and remove what the runtime keeps of it; not there is fine."""
        if (self._ctx.runc_root / container).exists():
            self.run("delete", "--force", container, step="delete")

    def monitor(self, bundle: Path, *args: str, mark: str = "") -> subprocess.Popen[bytes]:
        """Start `run` or `restore` under the monitor of a container. Raises EngineError."""
        env = dict(self.env, MIGROCE_EXIT=str(bundle / "exit"))
        if mark:
            env[RESTORE_MARK] = mark
        argv = self.argv(*args[:1], "--pid-file", str(bundle / "pid"), *args[1:], log=bundle / "runc.log")
        for stale in ("pid", "exit", "exit.not", "runc.log"):
            (bundle / stale).unlink(missing_ok=True)
        with (bundle / "monitor.log").open("ab") as log:
            try:
                started = subprocess.Popen(
                    urgency.command(["/bin/sh", "-c", _MONITOR, "migroce-monitor", *argv]), env=env, cwd="/",
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                raise EngineError("run", f"the monitor of {bundle.name} cannot be started: {exc}") from exc
        urgency.boost(started.pid)
        (bundle / "monitor.pid").write_text(f"{started.pid}\n")
        return started


def wait_started(bundle: Path, monitor: subprocess.Popen[bytes], step: str, poll: float = 0.0005) -> int:
    """Wait for the pid file that the runtime writes last; the pid. Raises EngineError."""
    end = time.monotonic() + LIMIT
    while True:
        with contextlib.suppress(OSError, ValueError):
            return int((bundle / "pid").read_text())
        if monitor.poll() is not None:
            with contextlib.suppress(OSError, ValueError):
                return int((bundle / "pid").read_text())
            raise EngineError(step, failure(bundle))
        if time.monotonic() > end:
            raise EngineError(step, f"the container did not start within {LIMIT:.0f} s")
        time.sleep(poll)


def failure(bundle: Path) -> str:
    """Why the runtime failed, from its log."""
    for name in ("runc.log", "monitor.log"):
        with contextlib.suppress(OSError):
            words = last_words((bundle / name).read_text(errors="replace"))
            if words:
                return words
    return "the runtime ended without a reason"


def last_words(text: str) -> str:
    """The last error in the runtime's output, JSON or logfmt, without its decoration."""
    for line in reversed(text.strip().splitlines()):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("level") in ("error", "fatal"):
                return str(entry.get("msg", ""))
            continue
        found = re.search(r'level=(?:error|fatal) msg="((?:[^"\\]|\\.)*)"', line)
        if found:
            return found[1].replace('\\"', '"')
        if "level=" not in line and line.strip():
            return line.strip()
    return ""


def criu_reason(log: Path) -> str:
    """The first error in a CRIU log that is a cause, or ''."""
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            if "Error" in line and "RLIMIT_NOFILE" not in line:
                return re.sub(r"^\([0-9.]+\)\s*(?:\d+:)?\s*(?:pie:\s*\d+:)?\s*", "", line).strip()
    return ""


def marked(mark: str, value: str) -> list[int]:
    """Pids of processes whose environment has `mark=value`, ourselves left out."""
    wanted = f"{mark}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
