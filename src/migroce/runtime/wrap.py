# SPDX-License-Identifier: BSD-3-Clause
"""What migroce-runtime does besides being runc.

create, run     the device is put into the bundle, and the agent is told of the container
exec            what is executed in such a container gets the device too
checkpoint      its RDMA contexts are stopped, their dumps stored beside CRIU's images; if it fails or the
                container is left running, they are resumed
restore         the agent gets the dumps, the container its mount; RDMA goes on with the first instruction
pause           its RDMA contexts are stopped, so that peers wait; dumps that a checkpoint can take
resume          they go on; of a container that a checkpoint has already let go on, is no error
delete          the agent forgets the container

What is known of a container between commands is in `<agent's directory>/runtime/<id>.json`. A link
`<id>.images` beside it, made by whoever drives the engine, names a directory for the images, so that they
need not pass through the engine's store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from migroce import criu, inject, paths, urgency
from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines import ocispec
from migroce.engines.files import read_json, write_json
from migroce.errors import MigroceError
from migroce.runtime import become, gate, runtime
from migroce.runtime.commandline import CommandLine
from migroce.runtime.guard import Guard

if TYPE_CHECKING:
    from migroce.engines.cgroup import Freezer

ANNOTATION = "migroce"
"""Set to "off" (as an annotation, or as the environment variable MIGROCE), a container stays as it is; set to
"on" it gets the device under a default runtime as well."""
BESIDE = "migroce"
"""Directory for ours among CRIU's images."""
STOP_MS = 5000
RESUME_MS = 10000
_CRIU_CONFIG = "network-lock nftables\n"
"""CRIU's default, iptables, costs 50 ms to unlock."""


def handle(args: list[str], at: int, asked: bool) -> NoReturn:
    """Do a command of ours, or become the real runtime. Ends the process with its exit status."""
    line = CommandLine(args, at)
    try:
        if line.command in ("create", "run") and not _wants(line, asked):
            become(line.args)
        status = _COMMANDS[line.command](line)
    except (MigroceError, AgentError, OSError, ValueError) as exc:
        status = fail(line, str(exc))
    sys.exit(status)


def fail(line: CommandLine, text: str) -> int:
    """Say why, where runc would: on stderr and in the log that the engine reads."""
    text = "migroce: " + " ".join(text.split())
    sys.stderr.write(text + "\n")
    log = line.option("--log")
    if log:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if line.option("--log-format") == "json":
            entry = json.dumps({"level": "error", "msg": text, "time": now})
        else:
            entry = f"time={json.dumps(now)} level=error msg={json.dumps(text)}"
        with contextlib.suppress(OSError), open(log, "a") as stream:
            stream.write(entry + "\n")
    return 1


# -- what is known of a container ----------------------------------------------------------------------------


def agent_socket() -> Path:
    """The admin socket of the node's agent."""
    return paths.admin_socket()


def records() -> Path:
    """Where it is kept what is known of containers."""
    return agent_socket().parent / "runtime"


def _record(container: str) -> Path:
    if not container or "/" in container or container.startswith("."):
        raise MigroceError(f"{container!r} is no container id")
    return records() / f"{container}.json"


def _remember(container: str, bundle: Path) -> None:
    path = _record(container)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(path, {"bundle": str(bundle)})


def _bundle_of(container: str) -> Path | None:
    """The bundle of a container that has the device; None: it is not one of ours."""
    try:
        return Path(json.loads(_record(container).read_text())["bundle"])
    except (OSError, ValueError, KeyError, MigroceError):
        return None


def _chosen_images(container: str) -> str | None:
    """The directory that the engine's driver wants the images in."""
    with contextlib.suppress(OSError, MigroceError):
        return os.readlink(_record(container).with_suffix(".images"))
    return None


def _forget(container: str) -> None:
    """Let the agent forget a container; one that does not answer will find it gone by itself."""
    with contextlib.suppress(AgentError), AgentClient(agent_socket()) as agent:
        agent.container_remove(container)
    for suffix in (".json", ".images", ".gate"):
        with contextlib.suppress(OSError):
            _record(container).with_suffix(suffix).unlink()
    with contextlib.suppress(MigroceError):
        shutil.rmtree(_paused(container), ignore_errors=True)
    with contextlib.suppress(OSError):
        records().rmdir()


def _spawn(line: CommandLine, env: dict[str, str] | None = None, err: int = 2) -> int:
    """Run the real runtime with the (changed) command line, errors to `err`; its exit status."""
    program = runtime()
    actions = [(os.POSIX_SPAWN_DUP2, err, 2)] if err != 2 else []
    try:
        pid = os.posix_spawnp(program, [program, *line.args], env or dict(os.environ), file_actions=actions)
    except OSError as exc:
        raise MigroceError(f"{program} cannot be run: {exc.strerror}; install runc") from exc
    while True:
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


# -- commands ------------------------------------------------------------------------------------------------


def _wants(line: CommandLine, asked: bool) -> bool:
    """Whether a container is to have the device: one that says so, or (`asked` False) does not say no."""
    config = inject.read(_bundle(line))
    said = str((config.get("annotations") or {}).get(ANNOTATION, ""))
    for each in (config.get("process") or {}).get("env") or []:
        if each.startswith("MIGROCE="):
            said = said or each.partition("=")[2]
    if said.lower() in ("off", "0", "no", "false"):
        return False
    return bool(line.container) and (bool(said) or not asked)


def _bundle(line: CommandLine) -> Path:
    return Path(line.option("--bundle", "-b") or ".").absolute()


def _create(line: CommandLine) -> int:
    bundle = _bundle(line)
    config = inject.read(bundle)
    directory = _told(line.container, config)
    try:
        _choose_interface(config)
        inject.edit(bundle, config, directory)
        _remember(line.container, bundle)
        if line.command == "run" and not line.has("--detach", "-d"):
            status = _spawn(line)
            _forget(line.container)
            return status
    except BaseException:
        _forget(line.container)
        raise
    status = _spawn(line)
    if status:
        _forget(line.container)
    return status


def _choose_interface(config: dict[str, Any]) -> None:
    """Let the device use eth0 where the network comes up after the container, as Docker's does.

    The default route may be another interface's, which other nodes do not reach: that of the gateway bridge
    beside an overlay network.
    """
    own, path = ocispec.network_namespace(config)
    env = config["process"].setdefault("env", [])
    if own and path is None and not any(each.startswith(("MIGROCE_IFACE=", "MIGROCE_ADDR=")) for each in env):
        env.append("MIGROCE_IFACE=eth0")


def _told(container: str, config: dict[str, Any]) -> Path:
    """Tell the agent of a new container; its directory."""
    _, netns = ocispec.network_namespace(config)
    try:
        with AgentClient(agent_socket()) as agent:
            return agent.container_add(container, netns=str(netns) if netns else None)
    except AgentError as exc:
        text = f"{exc}; start it by `systemctl start migroce-agent` or `migroce agent`"
        raise MigroceError(text if exc.errno in ("ENOENT", "ECONNREFUSED") else str(exc)) from exc


def _exec(line: CommandLine) -> int:
    process = line.option("--process", "-p")
    if process and _bundle_of(line.container) is not None:
        path = Path(process)
        spec = json.loads(path.read_text())
        inject.environment(spec)
        write_json(path, spec)
    become(line.args)


def _checkpoint(line: CommandLine) -> int:
    bundle = _bundle_of(line.container)
    env = criu.environment()
    if bundle is None or line.has("--pre-dump"):
        become(line.args, env)
    chosen = _chosen_images(line.container) or _engine_directory(bundle) or line.option("--image-path")
    images = Path(chosen or "checkpoint").absolute()
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = images / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    line.set_option("--image-path", str(images))
    line.add_flag("--tcp-established")
    line.add_flag("--file-locks")
    settings = records() / f"{line.container}.criu"
    freezer = _freezer(line)

    def undo() -> None:
        settings.unlink(missing_ok=True)
        _go_on(line.container, freezer)

    guard = Guard(undo)
    try:
        settings.write_text(_CRIU_CONFIG)
        env["CRIU_CONFIG_FILE"] = str(settings)
        return _stop_and_dump(line, env, freezer, beside)
    finally:
        settings.unlink(missing_ok=True)
        guard.release()


def _stop_and_dump(line: CommandLine, env: dict[str, str], freezer: Freezer, beside: Path) -> int:
    said = os.memfd_create("stderr")
    paused = _paused(line.container)  # mostly: containerd pauses what it is about to checkpoint
    with AgentClient(agent_socket()) as agent:
        done: dict[str, Any] = {}
        if not paused.is_dir():
            freezer.thaw()  # the processes have work to do
            try:
                done = agent.container_stop(line.container, beside, timeout_ms=STOP_MS)
            except AgentError as exc:
                raise MigroceError(f"{exc}; the container runs on") from exc
        failed = True
        try:
            if paused.is_dir():
                shutil.move(paused, beside)
            else:
                freezer.freeze()  # quicker than CRIU's own, which polls every 100 ms
                _note_stop(beside, done)
            with urgency.nicer():
                status = _spawn(line, env, said)
            failed = status != 0
        finally:
            if failed:
                _explain(line, "dump")  # first: containerd passes on one line
            os.write(2, os.pread(said, 1 << 16, 0))
            if failed:
                shutil.rmtree(beside, ignore_errors=True)
            if failed or line.has("--leave-running"):
                freezer.thaw()
                agent.container_resume(line.container, timeout_ms=RESUME_MS)
    return status


_MENDS = (
    ("assign requested address", "has the container the address that it had?"),
    ("bad size", "was the writable layer copied, and is the image the same?"),
    ("Can't open file", "was the writable layer copied, and is the image the same?"),
    ("No such file", "was the writable layer copied, and is the image the same?"),
)


def _explain(line: CommandLine, step: str) -> None:
    """Add CRIU's own reason to what the engine is told: runc names but a log, which the engine removes."""
    from migroce.engines.runc import criu_reason

    where = line.option("--work-path") or line.option("--image-path") or "checkpoint"
    reason = criu_reason(Path(where) / f"{step}.log")
    if reason:
        mends = [mend for sign, mend in _MENDS if sign in reason]
        fail(line, f"{step}: {reason}" + (f"; {mends[0]}" if mends else ""))


def _freezer(line: CommandLine) -> Freezer:
    """The container's freezer. Raises EngineError."""
    from migroce.engines.cgroup import Freezer

    root = line.option("--root") or "/run/runc"
    state = read_json(Path(root) / line.container / "state.json")
    return Freezer.of(state.get("cgroup_paths") or {})


def _note_stop(dumps: Path, done: dict[str, Any]) -> None:
    """Say beside the dumps what was stopped."""
    dumps.mkdir(mode=0o700, exist_ok=True)
    write_json(dumps / "checkpoint.json", {"version": 1, "contexts": done["contexts"], "qps": done["qps"]})


def _paused(container: str) -> Path:
    """Where the dumps of a container are that was stopped by `pause`."""
    return _record(container).with_suffix(".paused")


def _pause(line: CommandLine) -> int:
    """Stop the RDMA contexts, so that peers wait, and freeze: also for Docker's commit and checkpoint.

    Contexts that cannot be stopped are frozen as they are. The freezing is not left to runc: with version
    1 of cgroups it gives up after some ten milliseconds ("unable to freeze"); threads that wait for a CPU
    take longer.
    """
    if _bundle_of(line.container) is None:
        become(line.args)
    freezer = _freezer(line)
    if freezer.frozen():
        become(line.args)  # to say so
    dumps = _paused(line.container)
    shutil.rmtree(dumps, ignore_errors=True)
    guard = Guard(lambda: _go_on(line.container, freezer))
    try:
        with contextlib.suppress(AgentError), AgentClient(agent_socket()) as agent:
            _note_stop(dumps, agent.container_stop(line.container, dumps, timeout_ms=STOP_MS))
        freezer.freeze()
    except BaseException:
        _go_on(line.container, freezer)
        raise
    finally:
        guard.release()
    return 0


def _go_on(container: str, freezer: Freezer) -> None:
    """Let a container run on that was frozen, or whose RDMA contexts were stopped, whichever it was."""
    freezer.thaw()
    with contextlib.suppress(AgentError), AgentClient(agent_socket()) as agent:
        agent.container_resume(container, timeout_ms=RESUME_MS)
    shutil.rmtree(_paused(container), ignore_errors=True)


def _resume(line: CommandLine) -> int:
    if _bundle_of(line.container) is None:
        become(line.args)
    stopped = _paused(line.container)
    status = _spawn(line) if _freezer(line).frozen() else 0
    if status == 0 and stopped.is_dir():
        with AgentClient(agent_socket()) as agent:
            agent.container_resume(line.container, timeout_ms=RESUME_MS)
        shutil.rmtree(stopped)
    return status


def _engine_directory(bundle: Path) -> Path | None:
    """Where Docker will keep the checkpoint that is being made, if that can be told.

    It makes the directory, lets containerd pack the images into its store (40 ms a MB) and unpacks them
    there. Images that are there already need not take that way.
    """
    with contextlib.suppress(OSError, MigroceError):
        for mount in inject.read(bundle).get("mounts") or []:
            if mount.get("destination") == "/etc/hostname":
                checkpoints = Path(str(mount.get("source"))).parent / "checkpoints"
                empty = [each for each in checkpoints.iterdir() if each.is_dir() and not any(each.iterdir())]
                return empty[0] if len(empty) == 1 else None
    return None


def _restore(line: CommandLine) -> int:
    given = Path(line.option("--image-path") or "checkpoint")
    unpacked = re.fullmatch(r"ctrd-checkpoint\d+", given.name) is not None and not given.is_symlink()
    try:
        return _restore_from(line, given, unpacked)
    finally:
        if unpacked:  # by containerd, for this one restore: it leaves it in /tmp for ever
            shutil.rmtree(given, ignore_errors=True)


def _restore_from(line: CommandLine, given: Path, unpacked: bool) -> int:
    env = criu.environment()
    chosen = _chosen_images(line.container)
    if chosen:
        gate.wait(_record(line.container).with_suffix(".gate"))
        line.set_option("--image-path", chosen)
    beside = Path(chosen or given) / BESIDE
    if not (beside / "checkpoint.json").is_file():
        if unpacked:
            return _spawn(line, env)
        become(line.args, env)
    bundle = _bundle(line)
    config = inject.read(bundle)
    line.add_flag("--tcp-established")
    line.add_flag("--file-locks")
    with AgentClient(agent_socket()) as agent:
        ready = agent.container_prepare(line.container, dumps=sorted(beside.glob("*.dump")))
        try:
            inject.edit(bundle, config, Path(ready["dir"]), restored=True)
            _remember(line.container, bundle)
            if not line.has("--detach", "-d"):  # until the container ends
                Resume(line.container)
                status = _spawn(line, env)
                _forget(line.container)
                return status
            status = _restore_detached(line, env)
        except BaseException:
            _forget(line.container)
            raise
        if status:
            _forget(line.container)
    return status


def _restore_detached(line: CommandLine, env: dict[str, str]) -> int:
    resume = Resume(line.container)
    with urgency.nicer():
        status = _spawn(line, env)
    if status:
        _explain(line, "restore")
        return status
    error = resume.finish()
    if error:
        _spawn(CommandLine([*line.args[: line.at], "delete", "--force", line.container]))
        raise MigroceError(f"the container's RDMA connections cannot go on: {error}")
    return 0


class Resume(threading.Thread):
    """Lets the agent wait for the processes while they are being restored: they go on at once."""

    def __init__(self, container: str) -> None:
        super().__init__(daemon=True)
        self.error = ""
        self._container = container
        self._restored = threading.Event()
        self.start()

    def run(self) -> None:
        """Wait in steps until the restore has ended, and then once more for the processes' own time."""
        while True:
            last = self._restored.is_set()
            try:
                with AgentClient(agent_socket()) as agent:
                    agent.container_resume(self._container, timeout_ms=RESUME_MS)
                self.error = ""
                return
            except AgentError as exc:
                self.error = str(exc)
                if last or exc.errno != "ETIMEDOUT":
                    return

    def finish(self) -> str:
        """The restore has succeeded: why the processes cannot go on, or ""."""
        self._restored.set()
        self.join()
        return self.error


def _delete(line: CommandLine) -> int:
    if _bundle_of(line.container) is None:
        become(line.args)
    status = _spawn(line)
    if status == 0:
        _forget(line.container)
    return status


_COMMANDS = {
    "create": _create,
    "run": _create,
    "exec": _exec,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "pause": _pause,
    "resume": _resume,
    "delete": _delete,
}
