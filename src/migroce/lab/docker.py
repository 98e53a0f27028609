# SPDX-License-Identifier: BSD-3-Clause
"""A real dockerd on each of a lab's nodes, joined to a swarm with an attachable overlay network.

Each daemon runs in its node's network namespace and in a mount namespace of its own, where the directories
that Docker and containerd know by fixed names (/etc/docker, /run/docker, ...) are the node's. So they neither
meet each other nor a Docker of the machine's. Below the node's state: docker.sock, daemon.json, dockerd.log,
docker-run/ (exec-root) and docker/ (data-root).
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from migroce import criu, dockersetup, paths
from migroce.engines import mounts
from migroce.engines.context import NodeContext, write_json
from migroce.errors import LabError
from migroce.lab import processes
from migroce.migration import dockerkit
from migroce.runtime import launcher

NETWORK = "rdma-net"
IMAGE = "docker-repo/perftest"
RELEASES = ("20.10", "26.1")
"""What scripts/docker gets."""
START_LIMIT = 60.0
"""Seconds that a daemon may take to answer."""
_JOIN_LIMIT = 60.0
_SHARED = ("/etc/docker", "/run/docker", "/run/containerd", "/opt/containerd")
_DATA = Path("/var/lib/migroce")
"""Data-roots of labs whose state is in memory, where that is scarce."""
_PLENTY = 6 << 30
"""Bytes of available memory from which on data-roots are in memory."""
_MADE = "docker.made"
"""Lists the shared directories that were not there before the lab; they go with it if they are empty."""

_START = r"""
set -e
echo "$1" >/proc/sys/kernel/hostname
for name in etc/docker run/docker run/containerd opt/containerd; do
    mkdir -p "$2/$name"
    mount --bind "$2/$name" "/$name"
done
shift 2
exec "$@"
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Docker:
    """A Docker release: `bin` holds its programs, None: they are on PATH."""

    version: str
    bin: Path | None

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with a PATH that finds this release's programs, then CRIU."""
        env = criu.environment(base)
        if self.bin is not None:
            env["PATH"] = f"{self.bin}:{env['PATH']}"
            if (self.bin.parent / "lib" / "xtables").is_dir():
                env["XTABLES_LIBDIR"] = str(self.bin.parent / "lib" / "xtables")
        return env


def find(wanted: str | None = None, *, tell: Callable[[str], None] = lambda _: None) -> Docker:
    """The Docker to use: `wanted` is "20.10", "26.1", "system", a directory with dockerd, or None for the
    system's or, without one, what scripts/docker gives this machine. Raises LabError.
    """
    if wanted and "/" in wanted:
        return _checked(Path(wanted))
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    system = shutil.which("dockerd", path=path)
    if wanted == "system" or (wanted is None and system):
        if system is None:
            mend = "install docker.io, or name 20.10 or 26.1"
            raise LabError("docker", "this machine has no dockerd", mend)
        return _checked(None)
    tree = paths.source_tree()
    if tree is None:
        raise LabError(
            "docker", "this machine has no dockerd", "install docker.io, or use scripts/docker of the sources"
        )
    base = tree / ".docker"
    if wanted is None:
        known = [path.parent.parent.name for path in sorted(base.glob("[0-9]*/bin/dockerd"))]
        release = "bookworm" in Path("/etc/os-release").read_text()
        first = "20.10" if release else "26.1"
        wanted = first if first in known or not known else known[-1]
    have = re.fullmatch(r"[0-9.]+", wanted) and (base / wanted / "bin" / "dockerd").exists()
    if not have and wanted not in RELEASES:
        raise LabError("docker", f"there is no Docker {wanted!r}", "name 20.10, 26.1 or system")
    if not have:
        _script([wanted], tell)
    return _checked(base / wanted / "bin")


def image(*, tell: Callable[[str], None] = lambda _: None) -> Path | None:
    """The saved image for a lab, made if need be; None for an installed package. Raises LabError."""
    tree = paths.source_tree()
    if tree is None:
        return None
    _script(["image"], tell)
    return tree / ".docker" / "perftest.tar"


def _script(args: Sequence[str], tell: Callable[[str], None]) -> None:
    tree = paths.source_tree()
    assert tree is not None
    with subprocess.Popen(
        [str(tree / "scripts" / "docker"), *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line.strip()
            tell(last)
    if process.returncode != 0:
        raise LabError("docker", last.removeprefix("docker: ") or "scripts/docker failed")


def _checked(directory: Path | None) -> Docker:
    program = str(directory / "dockerd") if directory else "dockerd"
    env = dict(os.environ, PATH=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    try:
        argv = [program, "--version"]
        out = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as exc:
        raise LabError("docker", f"{program} cannot be run: {exc}") from exc
    found = re.search(r"version ([0-9][0-9.]*)", out)
    if found is None:
        raise LabError("docker", f"{program} says no version: {out.strip()}")
    return Docker(found[1], directory)


# -- one node ------------------------------------------------------------------------------------------------


def host(ctx: NodeContext) -> str:
    """DOCKER_HOST of a node."""
    return f"unix://{ctx.state}/docker.sock"


def data_root(lab: str, state: Path) -> Path:
    """Where a node's images and containers are: in memory where there is plenty, which saves 20 s of writing
    and removing thousands of small files; else on a disk. Raises OSError.
    """
    data = state / "docker"
    if mounts.filesystem(data) == "tmpfs" and data.is_mount():
        return data
    if _available_memory() > _PLENTY:
        data.mkdir(mode=0o711, exist_ok=True)
        mounts.tmpfs(data, "mode=0711", device_nodes=True)
        return data
    if mounts.filesystem(state) == "tmpfs":
        data = _DATA / lab / state.name
    data.mkdir(mode=0o711, parents=True, exist_ok=True)
    return data


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def start(ctx: NodeContext, docker: Docker, command: Sequence[str]) -> None:
    """Start a node's daemon; `command` puts it into the node's network namespace. Raises LabError."""
    assert ctx.lab is not None
    state = ctx.state
    data = data_root(ctx.lab, state)
    run = state / "docker-run"
    run.mkdir(mode=0o711, exist_ok=True)
    for each in _SHARED:
        path = Path(each)
        if not path.is_dir():
            with (state.parent / _MADE).open("a") as made:
                made.write(f"{each}\n")
            path.mkdir(parents=True, exist_ok=True)
    write_json(state / "daemon.json", _configuration(ctx, docker, data))
    foreign = ("DOCKER_", "MIGROCE_FAULT", "LD_PRELOAD", "NOTIFY_SOCKET")
    env = docker.environment({name: os.environ[name] for name in os.environ if not name.startswith(foreign)})
    # containerd leaves there for ever what it has unpacked for a restore by plain runc.
    temporary = data / "containerd-tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    env.update(MIGROCE_LAB_STATE=str(state), MIGROCE_ADMIN=str(ctx.agent), TMPDIR=str(temporary))
    env.pop("XDG_RUNTIME_DIR", None)  # which it would prefer
    (state / "docker.pid").unlink(missing_ok=True)
    argv = ["dockerd", "--config-file", str(state / "daemon.json")]
    # The node's own PATH, set by `command`, does not know CRIU.
    space = ["env", f"PATH={env['PATH']}", "unshare", "--mount", "--uts", "--propagation", "slave"]
    space += ["sh", "-c", _START, "sh", ctx.name]
    with (state / "dockerd.log").open("ab") as log:
        done = subprocess.run(
            ["setsid", "--fork", *command, *space, str(run / "shared"), *argv], env=env, cwd="/",
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise LabError("docker", f"the dockerd of {ctx.name} cannot be started: {_last_words(ctx)}")


def _configuration(ctx: NodeContext, docker: Docker, data: Path) -> dict[str, Any]:
    launcher.write(ctx.state / launcher.NAME)
    own: dict[str, Any] = {
        "data-root": str(data),
        "exec-root": str(ctx.state / "docker-run"),
        "pidfile": str(ctx.state / "docker.pid"),
        "hosts": [host(ctx)],
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": f"/{ctx.cgroup}",
    }
    release = dockersetup.version_of({"ServerVersion": docker.version})
    if release >= dockersetup.CDI_SINCE:
        specs = ctx.state / "cdi"
        specs.mkdir(exist_ok=True)
        write_json(specs / "migroce.json", dockersetup.cdi_spec())
        own["cdi-spec-dirs"] = [str(specs)]
    return dockersetup.merge(own, dockersetup.wanted(ctx.state, release, default=False))[0]


def wait(ctx: NodeContext, docker: Docker) -> None:
    """Wait until a node's daemon answers. Raises LabError with its own last words."""
    end = time.monotonic() + START_LIMIT
    while not answers(ctx, docker):
        if time.monotonic() > end or not _lives(ctx):
            raise LabError("docker", f"the dockerd of {ctx.name} does not start: {_last_words(ctx)}")
        time.sleep(0.05)


def answers(ctx: NodeContext, docker: Docker) -> bool:
    """Whether a node's daemon answers."""
    return call(ctx, docker, "version", "--format", "{{.Server.Version}}", check=False) != ""


def _lives(ctx: NodeContext) -> bool:
    """Whether the daemon, or what is about to become it, runs."""
    for pid in processes.supervisors(ctx.state):
        with contextlib.suppress(OSError):
            if b"dockerd" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False


def _last_words(ctx: NodeContext) -> str:
    with contextlib.suppress(OSError):
        lines = (ctx.state / "dockerd.log").read_text(errors="replace").strip().splitlines()
        wrong = [line for line in lines if "level=info" not in line and "level=warning" not in line]
        if wrong:
            found = re.search(r'msg="((?:[^"\\]|\\.)*)"', wrong[-1])
            return found[1] if found else wrong[-1]
    return f"see {ctx.state}/dockerd.log"


def call(ctx: NodeContext, docker: Docker, *args: str, check: bool = True) -> str:
    """Run the node's `docker`; its output, without `check` "" on failure. Raises LabError."""
    env = docker.environment(os.environ)
    env["DOCKER_HOST"] = host(ctx)
    env["DOCKER_CONFIG"] = str(ctx.state / "docker-config")
    done = subprocess.run(
        ["docker", *args], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        if not check:
            return ""
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise LabError("docker", f"docker {args[0]} on {ctx.name}: {words[-1]}")
    return done.stdout.strip()


# -- all of them ---------------------------------------------------------------------------------------------


def ensure(
    contexts: Mapping[str, NodeContext], docker: Docker, command: Callable[[str], list[str]],
    subnet: str, mtu: int, underlay: Callable[[str], str], saved: Path | None,
) -> None:  # fmt: skip
    """Have a daemon on each node, the image on each, one swarm, one overlay network. Raises LabError."""
    missing = [node for node, ctx in contexts.items() if not answers(ctx, docker)]
    for node in missing:
        start(contexts[node], docker, command(node))
    for node in missing:
        wait(contexts[node], docker)
    with ThreadPoolExecutor(len(contexts)) as pool:
        loads = [pool.submit(_load, ctx, docker, saved) for ctx in contexts.values() if saved is not None]
        _swarm(contexts, docker, underlay)
        manager = next(iter(contexts.values()))
        if not call(manager, docker, "network", "inspect", "-f", "{{.Id}}", NETWORK, check=False):
            call(
                manager, docker, "network", "create", "-d", "overlay", "--attachable", "--subnet", subnet,
                "--ip-range", _upper_half(subnet), "-o", f"com.docker.network.driver.mtu={mtu}", NETWORK,
            )  # fmt: skip
        for load in loads:
            load.result()


def _upper_half(subnet: str) -> str:
    """Where the swarm takes addresses of its own from, so that `run --ip` finds the lower ones free."""
    return str(list(ipaddress.IPv4Network(subnet).subnets(1))[-1])


def _load(ctx: NodeContext, docker: Docker, saved: Path | None) -> None:
    if saved is not None and not call(ctx, docker, "image", "ls", "-q", IMAGE):
        call(ctx, docker, "load", "-q", "-i", str(saved))


def _swarm(contexts: Mapping[str, NodeContext], docker: Docker, underlay: Callable[[str], str]) -> None:
    (first, manager), *others = contexts.items()
    if call(manager, docker, "info", "--format", "{{.Swarm.LocalNodeState}}") != "active":
        call(manager, docker, "swarm", "init", "--advertise-addr", underlay(first))
    token = call(manager, docker, "swarm", "join-token", "-q", "worker")
    for node, ctx in others:
        if call(ctx, docker, "info", "--format", "{{.Swarm.LocalNodeState}}") == "active":
            continue
        call(
            ctx, docker, "swarm", "join", "--token", token, "--advertise-addr", underlay(node),
            f"{underlay(first)}:2377",
        )  # fmt: skip
    end = time.monotonic() + _JOIN_LIMIT
    ready = ["node", "ls", "--format", "{{.Status}}"]
    while call(manager, docker, *ready).split().count("Ready") < len(contexts):
        if time.monotonic() > end:
            raise LabError("docker", f"the nodes did not join the swarm within {_JOIN_LIMIT:.0f} s")
        time.sleep(0.1)


def withdraw(lab: str, state: Path) -> None:
    """Remove what is outside the lab's state, when none of its processes lives any more."""
    for move in state.glob("*/migrations/*"):  # one that was under way
        dockerkit.release(move)
    shutil.rmtree(_DATA / lab, ignore_errors=True)
    with contextlib.suppress(OSError):
        _DATA.rmdir()
    with contextlib.suppress(OSError):
        for each in (state / _MADE).read_text().split():
            if each in _SHARED:
                with contextlib.suppress(OSError):
                    Path(each).rmdir()
