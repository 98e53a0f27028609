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

What is known of a container between commands: migroce.runtime.known.
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
from typing import Any, NoReturn

from migroce import criu, inject, urgency
from migroce.agent.client import AgentClient
from migroce.agent.errors import AgentError
from migroce.engines import ocispec
from migroce.engines.files import write_json
from migroce.errors import MigroceError
from migroce.runtime import become, gate, known, pause
from migroce.runtime.commandline import CommandLine

ANNOTATION = "migroce"
"""Set to "off" (as an annotation, or as the environment variable MIGROCE), a container stays as it is; set to
"on" it gets the device under a default runtime as well."""
BESIDE = "migroce"
"""Directory for ours among CRIU's images."""
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
        known.remember(line.container, bundle)
        if line.command == "run" and not line.has("--detach", "-d"):
            status = line.spawn()
            known.forget(line.container)
            return status
    except BaseException:
        known.forget(line.container)
        raise
    status = line.spawn()
    if status:
        known.forget(line.container)
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
        with AgentClient(known.agent_socket()) as agent:
            return agent.container_add(container, netns=str(netns) if netns else None)
    except AgentError as exc:
        text = f"{exc}; start it by `systemctl start migroce-agent` or `migroce agent`"
        raise MigroceError(text if exc.errno in ("ENOENT", "ECONNREFUSED") else str(exc)) from exc


def _exec(line: CommandLine) -> int:
    process = line.option("--process", "-p")
    if process and known.bundle_of(line.container) is not None:
        path = Path(process)
        spec = json.loads(path.read_text())
        inject.environment(spec)
        write_json(path, spec)
    become(line.args)


def _checkpoint(line: CommandLine) -> int:
    bundle = known.bundle_of(line.container)
    env = criu.environment()
    if bundle is None or line.has("--pre-dump"):
        become(line.args, env)
    chosen = known.chosen_images(line.container) or _engine_directory(bundle) or line.option("--image-path")
    images = Path(chosen or "checkpoint").absolute()
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = images / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    line.set_option("--image-path", str(images))
    line.add_flag("--tcp-established")
    line.add_flag("--file-locks")
    settings = known.path(line.container, known.CRIU)
    said = os.memfd_create("stderr")
    status = 1
    freezer = pause.freezer_of(line)
    try:
        with pause.undone_if_it_fails(line.container, freezer):
            settings.write_text(_CRIU_CONFIG)
            env["CRIU_CONFIG_FILE"] = str(settings)
            pause.stop_for_dump(line.container, freezer, beside)
            with urgency.nicer():
                status = line.spawn(env, said)
            if status:
                _explain(line, "dump")  # first: containerd passes on one line
            os.write(2, os.pread(said, 1 << 16, 0))
            if status or line.has("--leave-running"):
                pause.go_on(line.container, freezer)
    finally:
        settings.unlink(missing_ok=True)
        if status:
            shutil.rmtree(beside, ignore_errors=True)
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
    from migroce.runtime import quiet  # which no other command needs

    env = criu.environment()
    chosen = known.chosen_images(line.container)
    if chosen:
        gate.wait(known.path(line.container, known.GATE))
        line.set_option("--image-path", chosen)
    beside = Path(chosen or given) / BESIDE
    if not (beside / "checkpoint.json").is_file():
        if unpacked:
            return line.spawn(env)
        become(line.args, env)
    bundle = _bundle(line)
    config = inject.read(bundle)
    line.add_flag("--tcp-established")
    line.add_flag("--file-locks")
    with AgentClient(known.agent_socket()) as agent:
        ready = agent.container_prepare(line.container, dumps=sorted(beside.glob("*.dump")))
        try:
            detached = line.has("--detach", "-d")
            netns = quiet.lock(config) if detached else None
            inject.edit(bundle, config, Path(ready["dir"]), restored=True)
            known.remember(line.container, bundle)
            if not detached:  # until the container ends
                Resume(line.container)
                status = line.spawn(env)
                known.forget(line.container)
                return status
            status = _restore_detached(line, env, netns)
        except BaseException:
            known.forget(line.container)
            raise
        if status:
            known.forget(line.container)
    return status


def _restore_detached(line: CommandLine, env: dict[str, str], netns: Path | None) -> int:
    from migroce.runtime import quiet

    resume = Resume(line.container)
    with urgency.nicer():
        status = line.spawn(env)
    if status:
        _explain(line, "restore")
        with contextlib.suppress(MigroceError):  # the restore's own reason is what counts
            quiet.unlock(line, netns)
        return status
    error = ""
    try:
        quiet.unlock(line, netns)
    except MigroceError as exc:
        error = f"the container's network cannot go on: {exc}"
    reason = resume.finish()
    if reason:
        error = f"the container's RDMA connections cannot go on: {reason}"
    if error:
        CommandLine([*line.args[: line.at], "delete", "--force", line.container]).spawn()
        raise MigroceError(error)
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
                with AgentClient(known.agent_socket()) as agent:
                    agent.container_resume(self._container, timeout_ms=pause.RESUME_MS)
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
    if known.bundle_of(line.container) is None:
        become(line.args)
    status = line.spawn()
    if status == 0:
        known.forget(line.container)
    return status


_COMMANDS = {
    "create": _create,
    "run": _create,
    "exec": _exec,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "pause": pause.pause,
    "resume": pause.resume,
    "delete": _delete,
}
