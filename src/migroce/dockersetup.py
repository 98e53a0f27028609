# SPDX-License-Identifier: BSD-3-Clause
"""`migroce setup docker`: make a machine's Docker one whose RDMA containers can be moved, and undo that.

Four things are made, each said, each kept apart from what the user has:

    /usr/local/lib/migroce/migroce-runtime      the runtime that dockerd calls
    /etc/docker/daemon.json                     registers it; experimental (docker checkpoint needs it); CDI
    /etc/cdi/migroce.json                       the CDI device migroce/rdma=rxe0
    /etc/systemd/system/migroce-agent.service   the node's agent, started

What was changed in daemon.json is noted in /var/lib/migroce/setup-docker.json, so that undoing touches
nothing else, with the file as it was and as it was made: if nobody has changed it since, undoing gives it
back byte for byte.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migroce import criu
from migroce.engines import context
from migroce.engines.docker import DockerEngine
from migroce.errors import EngineError, MigroceError
from migroce.runtime import launcher

RUNTIME = "migroce"
ASKED = "migroce-asked"
"""The same runtime for those containers only that ask, to be a default runtime."""
CDI_KIND, CDI_DEVICE = "migroce/rdma", "rxe0"
SERVICE = "migroce-agent.service"
CDI_SINCE = (25, 0)
"""Releases of Docker from which on features.cdi is known."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are; `root` is "/" but for tests."""

    root: Path = Path("/")
    config: Path | None = None
    """daemon.json, if it is elsewhere."""

    @property
    def daemon(self) -> Path:
        return self.config or self.root / "etc/docker/daemon.json"

    @property
    def programs(self) -> Path:
        return self.root / "usr/local/lib/migroce"

    @property
    def cdi(self) -> Path:
        return self.root / "etc/cdi/migroce.json"

    @property
    def unit(self) -> Path:
        return self.root / "etc/systemd/system" / SERVICE

    @property
    def notes(self) -> Path:
        return self.root / "var/lib/migroce/setup-docker.json"


@dataclass(slots=True)
class Outcome:
    """What was done."""

    changes: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    """What the user still has to do."""
    docker: str | None = None
    """Version of the daemon, None when it does not answer."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {"changes": self.changes, "todo": self.todo, "docker": self.docker}


# -- daemon.json ---------------------------------------------------------------------------------------------


def read_daemon(path: Path) -> dict[str, Any]:
    """The user's daemon.json; empty if there is none. Raises MigroceError if it cannot be understood."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise MigroceError(
            f"{path} cannot be read: {exc.strerror}; mend that first, nothing was changed"
        ) from exc
    except UnicodeDecodeError as exc:
        raise MigroceError(f"{path} is no text ({exc}); correct it first, nothing was changed") from exc
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as exc:
        why = f"is no JSON ({exc})"
        if isinstance(exc, json.JSONDecodeError) and re.match(r"//|/\*|#", text[exc.pos :]):
            why = f"has a comment in line {exc.lineno}, which dockerd does not take either"
        raise MigroceError(f"{path} {why}; correct it first, nothing was changed") from exc
    if not isinstance(value, dict):
        raise MigroceError(f"{path} holds no JSON object; correct it first, nothing was changed")
    return value


def wanted(programs: Path, version: tuple[int, int], *, default: bool) -> list[tuple[list[str], Any]]:
    """Settings of daemon.json: (keys down to it, value)."""
    found: list[tuple[list[str], Any]] = [
        (["runtimes", RUNTIME], {"path": str(programs / launcher.NAME)}),
        (["experimental"], True),
    ]
    if version >= CDI_SINCE:
        found.append((["features", "cdi"], True))
    if default:
        found.append((["runtimes", ASKED], {"path": str(programs / f"{launcher.NAME}-asked")}))
        found.append((["default-runtime"], ASKED))
    return found


def _get(config: dict[str, Any], keys: list[str]) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(config: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set or (None) remove a setting, with the objects around it."""
    *outer, last = keys
    objects = [config]
    for key in outer:
        inner = objects[-1].setdefault(key, {})
        if not isinstance(inner, dict):
            raise MigroceError(f'daemon.json: "{key}" is no object; correct it first, nothing was changed')
        objects.append(inner)
    if value is None:
        objects[-1].pop(last, None)
        for key, around in zip(reversed(outer), reversed(objects[:-1]), strict=True):
            if not around[key]:
                del around[key]
    else:
        objects[-1][last] = value


def merge(config: dict[str, Any], settings: list[tuple[list[str], Any]]) -> tuple[dict[str, Any], list[Any]]:
    """(the configuration with our settings, [keys, what was there before, now] of each that changed)."""
    changed = copy.deepcopy(config)
    notes = []
    for keys, value in settings:
        before = _get(changed, keys)
        if before != value:
            _set(changed, keys, value)
            notes.append([keys, before, value])
    return changed, notes


def unmerge(config: dict[str, Any], notes: list[Any]) -> tuple[dict[str, Any], list[str]]:
    """(the configuration without our settings, what was taken out). What was changed since stays."""
    changed = copy.deepcopy(config)
    undone = []
    for keys, before, now in reversed(notes):
        if _get(changed, keys) == now:
            _set(changed, keys, before)
            undone.append(".".join(keys))
    return changed, undone


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step; the mode of one that was there is kept."""
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode & 0o7777
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + "~")
    part.write_bytes(text.encode())
    part.chmod(mode)
    part.rename(target)


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2) + "\n"


def _write_daemon(path: Path, config: dict[str, Any]) -> None:
    if config:
        _write(path, _text(config))
    else:
        path.unlink(missing_ok=True)


def _content(path: Path) -> str | None:
    """A file's text to the byte (no other newlines); None if it is not there. Raises OSError."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None


# -- the daemon ----------------------------------------------------------------------------------------------


def engine() -> DockerEngine:
    """This machine's Docker: DOCKER_HOST, or the usual socket."""
    return DockerEngine(context.machine(), timeout=30)


def docker_info() -> dict[str, Any] | None:
    """`docker info` of this machine's daemon (DOCKER_HOST, or the usual socket); None: it does not answer."""
    with contextlib.suppress(EngineError):
        return engine().about
    return None


def version_of(info: dict[str, Any] | None) -> tuple[int, int]:
    """(major, minor) of a daemon, (0, 0) for none."""
    found = re.match(r"(\d+)\.(\d+)", str((info or {}).get("ServerVersion", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _daemon_pid(layout: Layout) -> int | None:
    """The dockerd that reads this daemon.json."""
    wanted = str(layout.daemon)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if os.path.basename(argv[0]) != "dockerd":
                continue
            named = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config-file"]
            named += [word.partition("=")[2] for word in argv if word.startswith("--config-file=")]
            if (named or ["/etc/docker/daemon.json"])[-1] == wanted:
                return int(entry.name)
    return None


def _reload(layout: Layout, outcome: Outcome) -> None:
    pid = _daemon_pid(layout)
    if pid is None:
        outcome.todo.append("start dockerd")
        return
    os.kill(pid, signal.SIGHUP)
    outcome.changes.append(f"dockerd (pid {pid}) reads {layout.daemon} anew; containers run on")


# -- the agent -----------------------------------------------------------------------------------------------

_UNIT = """# made by `migroce setup docker`; `migroce setup docker --undo` removes it
[Unit]
Description=migroce agent: the control plane of containers' RDMA devices
Before=docker.service
[Service]
Type=notify
ExecStart={python} -m migroce.agent --run-dir /run/migroce
Environment=PYTHONPATH={package}
Environment=PATH={path}
Restart=always
RestartSec=0.1
KillMode=process
[Install]
WantedBy=multi-user.target
"""


def _unit() -> str:
    package = Path(__file__).resolve().parent.parent
    return _UNIT.format(python=sys.executable, package=package, path=criu.environment({})["PATH"])


def _systemd(layout: Layout) -> bool:
    """Whether systemd manages the services here; in containers there may be a systemctl alone."""
    return (layout.root / "run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def _systemctl(*args: str) -> None:
    try:
        done = subprocess.run(["systemctl", *args], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MigroceError(f"systemctl {' '.join(args)}: {exc}") from exc
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise MigroceError(f"systemctl {' '.join(args)}: {words[-1]}")


# -- both directions -----------------------------------------------------------------------------------------


def cdi_spec() -> dict[str, Any]:
    """The CDI device: a container that is given it asks the runtime for rxe0."""
    device = {"name": CDI_DEVICE, "containerEdits": {"env": ["MIGROCE=on"]}}
    return {"cdiVersion": "0.5.0", "kind": CDI_KIND, "devices": [device]}


def apply(layout: Layout, *, default: bool = False, restart: bool = False) -> Outcome:
    """Set up. Can be repeated; what is so already is not touched. Raises MigroceError, OSError."""
    config = read_daemon(layout.daemon)
    if criu.find() is None:
        raise MigroceError("there is no CRIU; run scripts/criu or install criu 4.2 or newer, then try again")
    info = docker_info()
    outcome = Outcome(docker=info["ServerVersion"] if info else None)
    changed, notes = merge(config, wanted(layout.programs, version_of(info), default=default))
    names = [launcher.NAME, *([f"{launcher.NAME}-asked"] if default else [])]
    for name in names:
        path = layout.programs / name
        text = launcher.text(asked=name.endswith("-asked"))
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            launcher.write(path, asked=name.endswith("-asked"))
            outcome.changes.append(f"{path}: made")
    _put(layout.cdi, json.dumps(cdi_spec(), indent=2) + "\n", outcome)
    if _put(layout.unit, _unit(), outcome) and (layout.root == Path("/") or _systemd(layout)):
        _start_agent(layout, outcome)
    if notes:
        _note(layout, notes, changed)
        _write_daemon(layout.daemon, changed)
        for keys, before, now in notes:
            was = "" if before is None else f" (was {json.dumps(before)})"
            outcome.changes.append(f"{layout.daemon}: {'.'.join(keys)} = {json.dumps(now)}{was}")
        _reload(layout, outcome)
    if info is not None and not info.get("ExperimentalBuild"):
        why = "it does not read `experimental` anew while it runs"
        if not _systemd(layout):
            outcome.todo.append(f"end dockerd and start it again, as systemd does not run here: {why}")
        elif restart:
            _systemctl("restart", "docker")
            outcome.changes.append("docker was restarted")
        else:
            outcome.todo.append(f"restart Docker (systemctl restart docker, or --restart): {why}")
    return outcome


def _put(path: Path, text: str, outcome: Outcome) -> bool:
    """Have a file of ours with this text; whether it had to be written."""
    with contextlib.suppress(OSError):
        if path.read_text() == text:
            return False
    _write(path, text)
    outcome.changes.append(f"{path}: made")
    return True


def _note(layout: Layout, notes: list[Any], changed: dict[str, Any]) -> None:
    """Remember what was there before; what an earlier set-up has noted stays the older."""
    earlier = _noted(layout)
    old = earlier["settings"]
    known = [keys for keys, _, _ in old]
    kept = [[keys, before, next((n for k, _, n in notes if k == keys), now)] for keys, before, now in old]
    added = [each for each in notes if each[0] not in known]
    record: dict[str, Any] = {"settings": [*kept, *added]}
    here = _content(layout.daemon)
    if not old:
        record.update(before=here, after=_text(changed))
    elif "before" in earlier and here == earlier["after"]:
        record.update(before=earlier["before"], after=_text(changed))
    _write(layout.notes, json.dumps(record, indent=1) + "\n", 0o600)


def _noted(layout: Layout) -> dict[str, Any]:
    """What was noted: settings (none: []), and daemon.json before and after (the texts; None: no file)."""
    value = None
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(layout.notes.read_text())
    if isinstance(value, list):  # written by an older release
        value = {"settings": value}
    noted = value if isinstance(value, dict) else {}
    return {**noted, "settings": list(noted.get("settings") or [])}


def _start_agent(layout: Layout, outcome: Outcome) -> None:
    if not _systemd(layout):
        how = "migroce agent run --run-dir /run/migroce"
        outcome.todo.append(f"start the agent, as systemd does not run here: {how}")
        return
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", SERVICE)
    outcome.changes.append(f"{SERVICE}: enabled and started")


def undo(layout: Layout) -> Outcome:
    """Take out what `apply` has put in; what was changed since stays. Raises MigroceError, OSError."""
    config = read_daemon(layout.daemon)
    info = docker_info()
    outcome = Outcome(docker=info["ServerVersion"] if info else None)
    using = _users()
    if using:
        raise MigroceError(f"containers use the runtime: {', '.join(using)}; remove them first")
    noted = _noted(layout)
    untouched = "before" in noted and _content(layout.daemon) == noted.get("after")
    changed, undone = unmerge(config, noted["settings"])
    if undone:
        if info is not None:
            # It reads anew only what is there: the defaults are spelled out for the moment in which it looks.
            _write_daemon(layout.daemon, {"default-runtime": "runc", "runtimes": {}, **changed})
            _reload(layout, outcome)
            if not _forgotten():
                outcome.todo.append("restart Docker when it suits you: it keeps the runtime's name till then")
        if untouched and noted["before"] is not None:
            _write(layout.daemon, noted["before"])
        else:
            _write_daemon(layout.daemon, changed)
        outcome.changes += [f"{layout.daemon}: {each} as before" for each in undone]
    if layout.unit.exists():
        if _systemd(layout):
            _systemctl("disable", "--now", SERVICE)
        layout.unit.unlink()
        if _systemd(layout):
            _systemctl("daemon-reload")
        outcome.changes.append(f"{layout.unit}: removed")
    for path in (layout.cdi, layout.programs / launcher.NAME, layout.programs / f"{launcher.NAME}-asked"):
        if path.exists():
            path.unlink()
            outcome.changes.append(f"{path}: removed")
    layout.notes.unlink(missing_ok=True)
    for directory in (layout.programs, layout.cdi.parent, layout.notes.parent):
        with contextlib.suppress(OSError):
            directory.rmdir()
    return outcome


def _forgotten(seconds: float = 5.0) -> bool:
    """Wait until the daemon does not know our runtimes any more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        info = docker_info() or {}
        if not {RUNTIME, ASKED} & set(info.get("Runtimes") or {}):
            return True
        time.sleep(0.1)
    return False


def _users() -> list[str]:
    """Names of containers that were made with our runtime."""
    with contextlib.suppress(EngineError):
        return engine().users_of_runtimes({RUNTIME, ASKED})
    return []
