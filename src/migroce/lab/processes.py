# SPDX-License-Identifier: BSD-3-Clause
"""Processes of a lab: agents that are started again when they die, and the end of all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines.context import NodeContext
from migroce.errors import LabError

_AGENT_START = 15.0  # seconds

# What systemd does elsewhere: an agent that dies is started again.
_SUPERVISOR = """
while [ -d "$MIGROCE_LAB_STATE" ]; do
    "$@"
    sleep 0.1
done
"""


def start_agent(ctx: NodeContext, command: Sequence[str]) -> None:
    """Start a node's agent under a supervisor; `command` puts it into the node's namespace."""
    directory = ctx.agent.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "migroce.agent", "--run-dir", str(directory), "--node", ctx.name]
    env = dict(os.environ, MIGROCE_LAB_STATE=str(ctx.state))
    env.pop("MIGROCE_FAULT", None)
    package = str(Path(__file__).resolve().parent.parent.parent)
    env["PYTHONPATH"] = package + (f":{env['PYTHONPATH']}" if env.get("PYTHONPATH") else "")
    with (ctx.state / "agent.log").open("ab") as log:
        # Forked off by setsid: nobody here has to wait for it.
        argv = [
            "setsid",
            "--fork",
            *command,
            "/bin/sh",
            "-c",
            _SUPERVISOR,
            f"migroce-agent-{ctx.name}",
            *argv,
        ]
        done = subprocess.run(
            argv, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    if done.returncode != 0:
        raise LabError(
            "agent", f"the agent of {ctx.name} cannot be started: {_last_line(ctx.state / 'agent.log')}"
        )


def agent_pid(ctx: NodeContext) -> int | None:
    """Pid of a node's agent, None while it does not answer."""
    try:
        with AgentClient(ctx.agent) as agent:
            return int(agent.call("status", timeout_s=2)["pid"])
    except (AgentError, KeyError, ValueError):
        return None


def wait_for_agent(ctx: NodeContext, timeout: float = _AGENT_START) -> int:
    """Wait until a node's agent answers; its pid. Raises LabError."""
    end = time.monotonic() + timeout
    while True:
        if (pid := agent_pid(ctx)) is not None:
            return pid
        if time.monotonic() > end:
            words = _last_line(ctx.state / "agent.log")
            raise LabError("agent", f"the agent of {ctx.name} does not answer: {words or 'it says nothing'}")
        time.sleep(0.01)


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""


def inside(namespaces: Iterable[Path]) -> list[int]:
    """Pids of processes in any of these network namespaces, ourselves left out."""
    wanted = set()
    for path in namespaces:
        with contextlib.suppress(OSError):
            info = path.stat()
            wanted.add((info.st_dev, info.st_ino))
    return [pid for pid in _pids() if _netns_of(pid) in wanted and pid != os.getpid()]


def supervisors(state: Path) -> list[int]:
    """Pids of processes that a lab with this state directory started, wherever they are."""
    mark = b"MIGROCE_LAB_STATE=" + os.fsencode(state)
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if (
                any(entry == mark or entry.startswith(mark + b"/") for entry in environ)
                and pid != os.getpid()
            ):
                found.append(pid)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _netns_of(pid: int) -> tuple[int, int] | None:
    try:
        info = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return info.st_dev, info.st_ino


def end_all(namespaces: Sequence[Path], state: Path, timeout: float = 10.0) -> None:
    """Kill everything in the lab's namespaces and all it started. Raises LabError if something stays."""
    end = time.monotonic() + timeout
    while pids := {*supervisors(state), *inside(namespaces)}:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        living = [pid for pid in pids if _lives(pid)]
        if not living:
            continue
        if time.monotonic() > end:
            raise LabError("down", f"processes {living} do not end")
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"
