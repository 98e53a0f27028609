# SPDX-License-Identifier: BSD-3-Clause
"""Start a program with the device: `migroce run`.

The program gets LD_PRELOAD and the socket of an agent in its environment and replaces this process,
so its exit status, signals and terminal are its own. The agent is the user's own, started in the
background when none answers; it lets several processes share the one address and port.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from migroce import paths
from migroce.errors import MigroceError

IDLE_EXIT = 60.0
"""Seconds after which an agent that nobody uses ends."""

_START_DEADLINE = 30.0  # seconds an agent gets to listen: a crowded machine needs some


def environment(base: Mapping[str, str], agent: Path | None, overrides: Mapping[str, str]) -> dict[str, str]:
    """`base` with the library preloaded (once, first) and the agent's socket; `overrides` win."""
    env = dict(base)
    library = str(paths.library())
    others = [part for part in env.get("LD_PRELOAD", "").replace(":", " ").split() if part != library]
    env["LD_PRELOAD"] = ":".join([library, *others])
    # A path where nothing is says "no agent": the library then binds the port itself.
    env["MIGROCE_AGENT"] = "/nonexistent/no-agent" if agent is None else str(agent)
    env.update(overrides)
    return env


def answers(listening: Path) -> bool:
    """Whether somebody listens at a unix socket of either kind."""
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(str(listening))
            except OSError as exc:
                if exc.errno == errno.EPROTOTYPE:
                    continue
                return False
            return True
    return False


def private_directory(path: Path) -> Path:
    """Make `path` as a directory of ours that nobody else writes to; raises MigroceError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as exc:
        text = f"{path} cannot be made: {exc.strerror}; set MIGROCE_RUN_DIR to another place"
        raise MigroceError(text) from exc
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise MigroceError(f"{path} is not a directory of yours alone; remove it or set MIGROCE_RUN_DIR")
    return path


def ensure_agent(run_dir: Path) -> Path:
    """The socket of the agent in `run_dir`, started in the background if none answers.

    Raises MigroceError with the agent's own words when it does not start.
    """
    admin = run_dir / "admin.sock"
    control = run_dir / "agent.sock"
    if answers(admin) and control.exists():
        return control
    private_directory(run_dir)
    log = run_dir / "agent.log"
    ready, tell = os.pipe()
    argv = [sys.executable, "-m", "migroce.agent", "--run-dir", str(run_dir), "--idle-exit", str(IDLE_EXIT)]
    try:
        with log.open("wb" if log.exists() and log.stat().st_size > 1 << 20 else "ab") as out:
            agent = subprocess.Popen(
                [*argv, "--ready-fd", str(tell)], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                cwd="/", start_new_session=True, pass_fds=(tell,), env=_clean(os.environ),
            )  # fmt: skip
    finally:
        os.close(tell)
    with open(ready, "rb") as pipe:
        known, _, _ = select.select([pipe], [], [], _START_DEADLINE)
        if known and pipe.read(1):
            agent.returncode = 0  # it outlives us: nobody waits for it
            return control
    if known and _another_starts(run_dir, admin):
        return control
    agent.kill()
    status = agent.wait()
    if not known:
        raise MigroceError(f"the agent did not get ready within {_START_DEADLINE:.0f} s; its log is {log}")
    words = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
    raise MigroceError(f"the agent did not start: {words[-1]} (whole log: {log}); or use --no-agent")


def _another_starts(run_dir: Path, admin: Path) -> bool:
    """Whether somebody else's agent was quicker, once it listens."""
    end = time.monotonic() + _START_DEADLINE
    while time.monotonic() < end:
        if answers(admin):
            return True
        try:
            with (run_dir / "agent.lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return answers(admin)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return False
    return False


def _clean(env: Mapping[str, str]) -> dict[str, str]:
    """The agent itself must not get the device."""
    return {name: value for name, value in env.items() if name not in ("LD_PRELOAD", "MIGROCE_AGENT")}


def execute(program: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Become `program`; raises MigroceError (status 127 or 126, as shells have it) if that fails."""
    found = shutil.which(program[0], path=env.get("PATH"))
    if found is None:
        known = Path(program[0]).exists()
        why = "is not executable" if known else "is not a file" if "/" in program[0] else "is not on PATH"
        raise MigroceError(f"{program[0]} {why}", status=126 if known else 127)
    _warn_if_not_preloadable(Path(found))
    sys.stdout.flush()
    try:
        os.execve(found, list(program), dict(env))
    except OSError as exc:
        raise MigroceError(f"{program[0]} cannot be run: {exc.strerror}", status=126) from exc


def _warn_if_not_preloadable(program: Path) -> None:
    """The dynamic linker ignores LD_PRELOAD silently in set-id programs; say so."""
    if program.stat().st_mode & (stat.S_ISUID | stat.S_ISGID) and os.geteuid() != 0:
        print(f"migroce: {program} is set-uid or set-gid: it will run without the device", file=sys.stderr)
