# SPDX-License-Identifier: BSD-3-Clause
"""The Docker engine: what migroce asks of a dockerd, by its API on the node's socket.

The socket is that of the node's state (`docker_host`, a lab's), or DOCKER_HOST, or the usual one. Networks
and files of containers are reached as root on the node, so only sockets of the node itself serve.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migroce import criu
from migroce.engines.context import NodeContext
from migroce.engines.oci import ContainerInfo, stat_fields
from migroce.errors import EngineError

if TYPE_CHECKING:
    from docker import APIClient

DEFAULT = "unix:///var/run/docker.sock"
TIMEOUT = 600.0
"""Seconds for one request; a restore of many gigabytes is one."""
_MANAGER_LIMIT = 1.0
"""Seconds that a swarm's manager gets to take a connection."""
RUNTIME = "migroce"
"""The OCI runtime that gives containers the device."""

NO_SPACE = "make room there (docker system prune)"
"""What to do about a full disk."""

Json = dict[str, Any]


def socket_of(ctx: NodeContext) -> Path | None:
    """The socket of the node's dockerd, None if there is no Docker. Raises EngineError for one elsewhere."""
    host = ctx.docker_host or (os.environ.get("DOCKER_HOST") if ctx.lab is None else None) or DEFAULT
    if not host.startswith("unix://"):
        mend = "name the machine that it runs on: ssh://root@host"
        raise EngineError("docker", f"DOCKER_HOST is {host}, which is not this machine's own", mend)
    path = Path(host.removeprefix("unix://"))
    return path if path.exists() else None


class DockerEngine:
    """The containers of one node's dockerd. All methods raise EngineError when it refuses or is not there."""

    def __init__(self, ctx: NodeContext, timeout: float = TIMEOUT) -> None:
        """`timeout`: seconds for one request."""
        self.ctx = ctx
        self._timeout = timeout
        self._client: APIClient | None = None

    @property
    def here(self) -> bool:
        """Whether the node has a Docker at all."""
        return socket_of(self.ctx) is not None

    @property
    def api(self) -> APIClient:
        """The connection, made when first needed."""
        if self._client is None:
            path = socket_of(self.ctx)
            if path is None:
                raise EngineError("docker", f"{self.ctx.name} has no Docker", "install and start it there")
            import docker

            with self._said("docker"):
                self._client = docker.APIClient(f"unix://{path}", version="auto", timeout=self._timeout)
        return self._client

    def post(self, step: str, path: str, *args: str, data: Json | None = None, **params: Any) -> None:
        """A POST that the library has no method for."""
        with self._said(step):
            api = self.api
            api._raise_for_status(api._post_json(api._url(path, *args), data or {}, params=params))

    # -- looking -------------------------------------------------------------------------------------------

    @functools.cached_property
    def about(self) -> Json:
        """`docker info`."""
        with self._said("docker"):
            about = dict(self.api.info())
            # After a reload it says what daemon.json says; checkpoints need it on since dockerd's start.
            ping = self.api._get(self.api._url("/_ping"))
            if ping.headers.get("Docker-Experimental") == "false":
                about["ExperimentalBuild"] = False
            return about

    @property
    def root(self) -> Path:
        """Where Docker keeps its data."""
        return Path(self.about["DockerRootDir"])

    def inspect(self, container: str) -> Json | None:
        """`docker inspect`, None if there is none of that name."""
        import docker.errors

        with self._said("container"):
            try:
                found = dict(self.api.inspect_container(container))
            except docker.errors.NotFound:
                return None
        # Docker would also take a part of an id.
        return found if container in (name_of(found), found["Id"]) else None

    def image(self, reference: str) -> Json | None:
        """`docker image inspect`, None if it is not there."""
        import docker.errors

        with self._said("image"):
            try:
                return dict(self.api.inspect_image(reference))
            except docker.errors.NotFound:
                return None

    def remove_unnamed(self, image: str) -> None:
        """`docker rmi` of an image that has no name and no container; any other is left."""
        found = self.image(image)
        if found is None or found.get("RepoTags"):
            return
        import docker.errors

        with self._said("image"):
            try:
                self.api.remove_image(image)
            except docker.errors.APIError as exc:
                if exc.status_code not in (404, 409):
                    raise

    def network(self, name: str) -> Json | None:
        """`docker network inspect` with its containers; None if the node cannot see one of that name."""
        import docker.errors

        with self._said("network"):
            try:
                return dict(self.api.inspect_network(name))
            except docker.errors.NotFound:
                return None

    def holder(self, network: str, ip: str, but: str) -> tuple[str, str] | None:
        """(container, host) other than the container `but` that has the address in a swarm's network, as far
        as the node has heard.
        """
        import docker.errors

        with self._said("network"), contextlib.suppress(docker.errors.NotFound):
            services = self.api.inspect_network(network, verbose=True).get("Services") or {}
            for each in (services.get("") or {}).get("Tasks") or []:  # under "": what belongs to no service
                if each.get("EndpointIP") == ip and each.get("Name") != but:
                    return str(each.get("Name")), str((each.get("Info") or {}).get("Host IP"))
        return None

    def manager_answers(self) -> bool:
        """Whether a manager of the node's swarm can be reached now: who has none can attach nothing to it."""
        for manager in (self.about.get("Swarm") or {}).get("RemoteManagers") or []:
            host, _, port = str(manager["Addr"]).rpartition(":")
            with (
                contextlib.suppress(OSError, ValueError),
                socket.create_connection((host.strip("[]"), int(port)), timeout=_MANAGER_LIMIT),
            ):
                return True
        return False

    def volume(self, name: str) -> Json | None:
        """`docker volume inspect`, None if it is not there."""
        import docker.errors

        with self._said("volume"):
            try:
                return dict(self.api.inspect_volume(name))
            except docker.errors.NotFound:
                return None

    def users_of(self, volume: str) -> list[str]:
        """Names of the containers that use a volume."""
        with self._said("volume"):
            found = self.api.containers(all=True, filters={"volume": volume})
        return [str(each["Names"][0]).lstrip("/") for each in found if each.get("Names")]

    def users_of_runtimes(self, names: Collection[str]) -> list[str]:
        """Names of the containers that were made with one of the OCI runtimes."""
        with self._said("list"):
            found = (self.inspect(each["Id"]) for each in self.api.containers(all=True))
            return sorted(
                name_of(each) for each in found if each is not None and each["HostConfig"]["Runtime"] in names
            )

    def list(self) -> list[ContainerInfo]:
        """All containers."""
        with self._said("list"):
            found = self.api.containers(all=True)
        details = (self.inspect(each["Id"]) for each in found)
        return sorted((self.info_of(each) for each in details if each is not None), key=lambda it: it.id)

    def info(self, container: str) -> ContainerInfo | None:
        """The container, None if there is none of that name."""
        found = self.inspect(container)
        return None if found is None else self.info_of(found)

    def info_of(self, found: Json) -> ContainerInfo:
        """What `list` shows of an inspected container."""
        state = found["State"]
        running = bool(state.get("Running"))
        status = "running" if running and not state.get("Paused") else str(state.get("Status", "unknown"))
        config = found["Config"]
        return ContainerInfo(
            id=name_of(found), status=status, pid=int(state["Pid"]) if running else None,
            ip=next((ip for ip in addresses(found).values() if ip), None),
            bundle=str(Path(found.get("HostnamePath") or "/x").parent), device=device(found), managed=False,
            exit_status=None if running or never(state["StartedAt"]) else int(state["ExitCode"]),
            args=(found["Path"], *found["Args"]), created=unix_time(found["Created"]), engine="docker",
            image=str(config.get("Image", "")), key=found["Id"],
        )  # fmt: skip

    def logs(self, container: str) -> str:
        """What the container has written so far, both streams."""
        with self._said("logs"):
            data = self.api.logs(container)
        return bytes(data).decode(errors="replace")

    def wait(self, container: str, timeout: float | None = None) -> int | None:
        """Wait until the container has ended; its exit status. Raises EngineError also on timeout."""
        end = None if timeout is None else time.monotonic() + timeout
        while (found := self.inspect(container)) is not None:
            if not found["State"]["Running"]:
                return int(found["State"]["ExitCode"])
            if end is not None and time.monotonic() > end:
                raise EngineError("wait", f"{container} still runs after {timeout:.1f} s")
            time.sleep(0.05)
        raise EngineError("wait", f"{container} is not on {self.ctx.name} any more")

    # -- changing ------------------------------------------------------------------------------------------

    def create(self, name: str, body: Json) -> str:
        """`docker create`; the id."""
        with self._said("create"):
            return str(self.api.create_container_from_config(body, name)["Id"])

    def start(self, container: str, checkpoint: str | None = None) -> None:
        """`docker start`, with a checkpoint or from the beginning."""
        params: dict[str, Any] = {"checkpoint": checkpoint} if checkpoint else {}
        self.post("restore" if checkpoint else "start", "/containers/{0}/start", container, **params)

    def remove(self, container: str, *, volumes: bool) -> None:
        """`docker rm -f`, with its anonymous volumes if `volumes`; not there is fine."""
        import docker.errors

        with self._said("delete"), contextlib.suppress(docker.errors.NotFound):
            try:
                self.api.remove_container(container, force=True, v=volumes)
            except docker.errors.APIError as exc:
                if exc.status_code != 409 or "already in progress" not in str(exc):
                    raise

    def remove_volume(self, name: str) -> None:
        """`docker volume rm`."""
        with self._said("volume"):
            self.api.remove_volume(name)

    def kill(self, container: str, signal: str = "TERM") -> None:
        """`docker kill -s`."""
        with self._said("kill"):
            self.api.kill(container, signal)

    def restart_policy(self, container: str, policy: Json) -> None:
        """`docker update --restart`."""
        self.post("update", "/containers/{0}/update", container, data={"RestartPolicy": policy})

    def disconnect(self, network: str, container: str) -> None:
        """`docker network disconnect -f`; not connected is fine."""
        import docker.errors

        with self._said("network"):
            try:
                self.api.disconnect_container_from_network(container, network, force=True)
            except docker.errors.APIError as exc:
                if "is not connected to" not in str(exc):
                    raise

    def connect(self, network: str, container: str, endpoint: Json) -> None:
        """`docker network connect` with the settings of an endpoint; connected already is fine."""
        import docker.errors

        try:
            data = {"Container": container, "EndpointConfig": endpoint}
            self.post("network", "/networks/{0}/connect", network, data=data)
        except EngineError as exc:
            if "already exists in network" not in exc.reason or not isinstance(
                exc.__cause__, docker.errors.APIError
            ):
                raise

    def save(self, image: str) -> Iterator[bytes]:
        """`docker save`."""
        with self._said("image"):
            yield from self.api.get_image(image)

    def load(self, data: Iterable[bytes]) -> None:
        """`docker load`."""
        with self._said("image"):
            for message in self.api.load_image(data, quiet=True):
                if "error" in message:
                    words = str(message["error"])
                    raise EngineError("image", f"Docker says: {words}", _mend(words))

    @contextlib.contextmanager
    def _said(self, step: str) -> Iterator[None]:
        """What the library raises, as EngineError with Docker's own words."""
        import docker.errors
        import requests.exceptions

        try:
            yield
        except docker.errors.APIError as exc:
            words = exc.explanation or str(exc)
            if isinstance(words, bytes):
                words = words.decode(errors="replace")
            with contextlib.suppress(ValueError, TypeError, KeyError):
                words = json.loads(words)["message"]
            reason = f"Docker on {self.ctx.name} says: {str(words).strip()}"
            raise EngineError(step, reason, _mend(str(words))) from exc
        except (docker.errors.DockerException, requests.exceptions.RequestException) as exc:
            reason = f"Docker on {self.ctx.name} does not answer ({_cause(exc)})"
            raise EngineError(step, reason, "see whether dockerd runs there") from exc


def _mend(words: str) -> str:
    """What can be done about what Docker has refused, where that is known."""
    if "no space left on device" in words:
        return NO_SPACE
    if "attaching to network failed" in words:
        return "see whether another container of the swarm has the address"
    return ""


def _cause(exc: BaseException) -> str:
    """The innermost reason of a failed request."""
    text = str(exc)
    known = ("Permission denied", "No such file or directory", "Connection refused", "Connection aborted")
    for words in (*known, "timed out", "Connection reset"):
        if words in text:
            return words.lower()
    return text


# -- reading what `docker inspect` says ------------------------------------------------------------------


def name_of(found: Mapping[str, Any]) -> str:
    """The container's name."""
    return str(found["Name"]).lstrip("/")


def device(found: Mapping[str, Any]) -> bool:
    """Whether the container has the RDMA device."""
    host = found["HostConfig"]
    runtime = str(host.get("Runtime") or "")
    requests = host.get("DeviceRequests") or []
    cdi = any("migroce" in str(id_) for each in requests for id_ in each.get("DeviceIDs") or [])
    said = [f"{name}={value}" for name, value in (host.get("Annotations") or {}).items()]
    said += found["Config"].get("Env") or []
    off = any(each.lower() in ("migroce=off", "migroce=0", "migroce=no", "migroce=false") for each in said)
    return cdi or (runtime.rpartition("/")[2].startswith(RUNTIME) and not off)


def addresses(found: Mapping[str, Any]) -> dict[str, str]:
    """Network: IPv4 address, '' where it has none (now)."""
    networks = found["NetworkSettings"].get("Networks") or {}
    return {name: str((raw or {}).get("IPAddress") or "") for name, raw in networks.items()}


def never(stamp: str) -> bool:
    """Whether a time of Docker's stands for 'never'."""
    return stamp.startswith("0001-")


def unix_time(stamp: str) -> float | None:
    """A time of Docker's (RFC 3339 with nanoseconds)."""
    with contextlib.suppress(ValueError):
        whole, _, rest = stamp.rstrip("Z").partition(".")
        return datetime.datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{rest[:9] or 0}")
    return None


def has_shim(key: str) -> bool:
    """Whether containerd has a shim for the container `key`: without one nothing of it runs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "containerd-shim" in argv[0] and key in argv:
                    return True
    return False


class Shim:
    """The running container as containerd's shim knows it: where it is, which runtime and root it has."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        """Look from the container's first process. Raises EngineError if it is gone."""
        self.id = str(found["Id"])
        self.pid = int(found["State"]["Pid"])
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
            self.shim = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))
            self.bundle = Path(os.readlink(f"/proc/{self.shim}/cwd"))
            options = json.loads((self.bundle / "options.json").read_text())
            environ = Path(f"/proc/{self.shim}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError, StopIteration) as exc:
            reason = f"its containerd-shim (parent of process {self.pid}) cannot be looked at: {exc}"
            raise EngineError("container", reason) from exc
        env = dict(each.decode(errors="replace").partition("=")[::2] for each in environ if b"=" in each)
        self.root = Path(options.get("root") or "/run/containerd/runc") / self.bundle.parent.name
        self._path = env.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

    @property
    def started(self) -> int | None:
        """When the container's first process was started, in ticks; None if it is gone."""
        fields = stat_fields(self.pid)
        return None if fields is None or fields[0] in "ZX" else fields[1]

    def state(self) -> Json:
        """The OCI runtime's state of the container. Raises EngineError."""
        path = self.root / self.id / "state.json"
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError) as exc:
            raise EngineError("container", f"runc's state of it cannot be read: {exc}") from exc

    @property
    def netns(self) -> Path:
        """The container's network namespace."""
        return Path(f"/proc/{self.pid}/ns/net")

    def runc(self) -> list[str]:
        """The command line of runc where the container lives, up to the command. Raises EngineError."""
        program = shutil.which("runc", path=self._path)
        if program is None:
            raise EngineError("dump", "there is no runc on the PATH of containerd", "install runc")
        enter = [f"--mount=/proc/{self.shim}/ns/mnt", f"--net=/proc/{self.shim}/ns/net"]
        return ["nsenter", *enter, "--", program, "--root", str(self.root)]

    def environment(self) -> dict[str, str]:
        """The environment to run it with: a CRIU that works here comes first."""
        return criu.environment({**os.environ, "PATH": self._path})
