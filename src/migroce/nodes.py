# SPDX-License-Identifier: BSD-3-Clause
"""Nodes: where commands run and containers live.

Three kinds behind one interface: this machine (`local`), a node of a lab (`node-a`, or `lab/node-a` where
several labs are up), and another machine by the system's OpenSSH (`ssh://user@host:port`, with the query
parameters `python` = the interpreter there that has migroce and `state` = the node's directory there, if
it is not the machine itself). A docker context's name stands for the machine that it points to.
Everything that touches containers is done by a worker process on the node (`Node.call`); commands and
files go by `run`, `popen`, `get`, `put`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qs, urlsplit

from migroce import paths, ssh
from migroce.engines import context, contexts
from migroce.engines.context import NodeContext
from migroce.engines.docker import DEFAULT as DOCKER_SOCKET
from migroce.errors import NodeError
from migroce.migration.link import Worker
from migroce.migration.streams import connect_unix

_PACKAGE_PARENT = Path(__file__).resolve().parent.parent
_FIND_PYTHON = r"""
python=$(sed -n '1s/^#! *\([^ ]*\).*/\1/p' /usr/local/lib/migroce/migroce-runtime 2>/dev/null)
[ -x "$python" ] || python=python3
exec "$python" "$@"
"""
"""Without `python`: the interpreter that `migroce setup docker` has put into the runtime, else python3."""
HEARTBEAT = 15.0
"""Seconds without a sign of life after which a worker on another machine takes the command for dead."""


class Node(ABC):
    """A place for containers. Close it, or use it in a `with`."""

    def __init__(self, name: str, spec: str) -> None:
        self.name = name
        self.spec = spec
        """`resolve(spec)` finds the node again, in another process too."""
        self._worker: Worker | None = None
        self._lock = threading.Lock()

    # -- commands ------------------------------------------------------------------------------------------

    @abstractmethod
    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The local command line that runs `argv` on the node, with `env` added to its environment."""

    def popen(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = None, stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Start `argv` on the node. Raises NodeError if that is not possible."""
        try:
            return subprocess.Popen(self.command(argv, env), stdin=stdin, stdout=stdout, stderr=stderr)
        except OSError as exc:
            raise NodeError("run", f"{argv[0]} on {self.name}: {exc.strerror}") from exc

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, data: bytes | None = None,
        timeout: float | None = None, check: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
        """Run `argv` on the node to its end, `data` being its input; output and errors are captured.

        Raises NodeError on timeout and, with `check`, for an exit status other than 0.
        """
        source = subprocess.PIPE if data is not None else subprocess.DEVNULL
        with self.popen(
            argv, env=env, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                out, err = process.communicate(data, timeout)
            except subprocess.TimeoutExpired as exc:
                process.kill()
                raise NodeError("run", f"{argv[0]} on {self.name} took more than {timeout} s") from exc
        if check and process.returncode != 0:
            words = err.decode(errors="replace").strip()
            known = self.explain(words, process.returncode)
            if known is not None:
                raise NodeError("connect", f"{self.name} cannot be used: {known[0]}", known[1])
            reason = words.splitlines()[-1] if words else f"exit status {process.returncode}"
            raise NodeError("run", f"{argv[0]} on {self.name}: {reason}")
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def explain(self, words: str, status: int | None) -> ssh.Explanation | None:  # noqa: ARG002
        """(reason, mend) if what a command wrote and its exit status say that the node cannot be used."""
        return None

    # -- files ---------------------------------------------------------------------------------------------

    def put(self, source: Path, target: str) -> None:
        """Copy a file to the node (mode kept, replaced in one step). Raises NodeError, OSError."""
        mode = f"{source.stat().st_mode & 0o7777:o}"
        script = 'set -e; cat >"$1~"; chmod "$2" "$1~"; mv -f "$1~" "$1"'
        with source.open("rb") as stream:
            self._piped(["sh", "-c", script, "sh", target, mode], stdin=stream)

    def get(self, source: str, target: Path) -> None:
        """Copy a file from the node. Raises NodeError, OSError."""
        part = target.with_name(target.name + "~")
        with part.open("wb") as stream:
            self._piped(["cat", "--", source], stdout=stream)
        part.rename(target)

    def put_tree(self, source: Path, target: str) -> None:
        """Copy a directory's content to the node: owners, modes, times, links. Raises NodeError."""
        pack = subprocess.Popen(["tar", "-C", str(source), "-cf", "-", "."], stdout=subprocess.PIPE)
        with pack:
            self._piped(
                ["sh", "-c", 'mkdir -p "$1" && tar -C "$1" --numeric-owner -xpf -', "sh", target],
                stdin=pack.stdout,
            )
        if pack.returncode != 0:
            raise NodeError("copy", f"{source} could not be read whole")

    def get_tree(self, source: str, target: Path) -> None:
        """Copy a directory's content from the node. Raises NodeError."""
        target.mkdir(parents=True, exist_ok=True)
        with subprocess.Popen(
            ["tar", "-C", str(target), "--numeric-owner", "-xpf", "-"], stdin=subprocess.PIPE
        ) as unpack:
            self._piped(["tar", "-C", source, "-cf", "-", "."], stdout=unpack.stdin)
            if unpack.stdin is not None:
                unpack.stdin.close()
        if unpack.returncode != 0:
            raise NodeError("copy", f"{target} could not be written")

    def _piped(
        self, argv: Sequence[str], stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None
    ) -> None:
        done = self.popen(
            argv,
            stdin=stdin if stdin is not None else subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        with done:
            err = done.stderr.read() if done.stderr is not None else b""
        if done.returncode != 0:
            reason = err.decode(errors="replace").strip() or f"exit status {done.returncode}"
            known = self.explain(reason, done.returncode)
            if known is not None:
                raise NodeError("connect", f"{self.name} cannot be used: {known[0]}", known[1])
            raise NodeError("copy", f"{self.name}: {reason}")

    # -- the worker ----------------------------------------------------------------------------------------

    @abstractmethod
    def start_worker(self) -> Worker:
        """A fresh worker on the node. Raises NodeError."""

    def worker(self) -> Worker:
        """The node's worker, started when first needed and again if it has ended. Raises NodeError."""
        with self._lock:
            if self._worker is None or not self._worker.alive():
                if self._worker is not None:
                    self._worker.kill()
                self._worker = self.start_worker()
            return self._worker

    def call(self, op: str, **args: Any) -> Any:
        """Let the node's worker do `op` (see migroce.migration.worker). Raises its errors."""
        return self.worker().call(op, **args)

    @abstractmethod
    def connect(self, path: str) -> socket.socket:
        """Connect to a unix stream socket on the node. Raises OSError, NodeError."""

    @abstractmethod
    def shares_files_with(self, other: Node) -> bool:
        """Whether the two see the same files, so that data can go from worker to worker directly."""

    def close(self) -> None:
        """End the worker and connections."""
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<node {self.spec}>"


class LocalNode(Node):
    """A node on this machine: the machine itself, or a network namespace of it with its own state."""

    def __init__(self, ctx: NodeContext, spec: str) -> None:
        super().__init__(ctx.name, spec)
        self.context = ctx

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        found = ["nsenter", f"--net={self.context.netns}", "--"] if self.context.netns else []
        if self.context.docker_host:
            env = {"DOCKER_HOST": self.context.docker_host, **(env or {})}
        if self.context.docker_bin:
            known = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            env = {"PATH": f"{self.context.docker_bin}:{known}", **(env or {})}
        if env:
            found += ["env", *(f"{name}={value}" for name, value in env.items())]
        return [*found, *argv]

    def start_worker(self) -> Worker:
        env = dict(os.environ)
        known = env.get("PYTHONPATH", "")
        env["PYTHONPATH"] = str(_PACKAGE_PARENT) + (f":{known}" if known else "")
        argv = [sys.executable, "-m", "migroce.migration.worker", str(self.context.state)]
        return Worker(self.name, self.command(argv), env)

    def connect(self, path: str) -> socket.socket:
        return connect_unix(path)

    def shares_files_with(self, other: Node) -> bool:
        return isinstance(other, LocalNode)


class SshNode(Node):
    """Another machine, by the system's ssh with one shared connection. Keys or an agent must let us in.

    Both ends see within 15 s that the connection is gone: ssh asks the server, our worker there waits
    for the signs of life that `Worker` sends (an sshd does not ask its clients by itself).
    """

    def __init__(self, spec: str) -> None:
        try:
            parts = urlsplit(spec)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise NodeError("node", f"{spec} is no address: {exc}", "write ssh://user@host:port") from exc
        if not host or host.startswith("-"):
            raise NodeError("node", f"{spec} names no host", "write ssh://user@host")
        query = parse_qs(parts.query, keep_blank_values=True)
        if unknown := sorted(set(query) - {"python", "state"}):
            mend = "only python=/path/to/python3 and state=/directory may follow the host"
            raise NodeError("node", f"{spec} has an unknown parameter {unknown[0]}", mend)
        self._host = host
        self._target = f"{parts.username}@{host}" if parts.username else host
        self._python = query.get("python", [""])[0]
        self._state = query.get("state", ["--host"])[0]
        self._dir = tempfile.TemporaryDirectory(prefix="migroce-ssh-", dir=_short_tmp())
        self._options = [
            "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
            "-o", "ControlMaster=auto", "-o", f"ControlPath={self._dir.name}/c", "-o", "ControlPersist=60",
            "-o", "StreamLocalBindUnlink=yes",
        ]  # fmt: skip
        if port:
            self._options += ["-p", str(port)]
        self._forwards = itertools.count(1)
        super().__init__(host, spec)

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        remote = [*(["env", *(f"{name}={value}" for name, value in env.items())] if env else []), *argv]
        return ["ssh", *self._options, "--", self._target, ssh.remote_command(remote)]

    def explain(self, words: str, status: int | None) -> ssh.Explanation | None:
        # 255 is ssh's own; 126 and 127 the shell's there; 1 python's that lacks the module.
        return ssh.explain(words, self._host) if status in (1, 126, 127, 255, None) else None

    def start_worker(self) -> Worker:
        python = [self._python] if self._python else ["sh", "-c", _FIND_PYTHON, "sh"]
        argv = [*python, "-m", "migroce.migration.worker", self._state, f"--heartbeat={HEARTBEAT:g}"]
        worker = Worker(
            self.name, self.command(argv), explain=self.explain, heartbeat=HEARTBEAT / 5, remote=True
        )
        self.name = str(worker.hello.get("name") or self.name)
        return worker

    def connect(self, path: str) -> socket.socket:
        local = f"{self._dir.name}/f{next(self._forwards)}"
        argv = ["ssh", *self._options, "-O", "forward", "-L", f"{local}:{path}", "--", self._target]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            mend = "see the network between, and AllowStreamLocalForwarding in its sshd_config"
            reason = done.stderr.strip() or "ssh cannot forward a socket"
            raise NodeError("connect", f"{self.name}: {reason}", mend)
        return connect_unix(local)

    def shares_files_with(self, other: Node) -> bool:
        return isinstance(other, SshNode) and self._target == other._target

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            argv = ["ssh", *self._options, "-O", "exit", "--", self._target]
            subprocess.run(argv, capture_output=True, check=False)
        self._dir.cleanup()


def _short_tmp() -> str | None:
    """A directory whose paths are short enough for ssh's control socket; None: the usual one."""
    return None if len(tempfile.gettempdir()) < 40 else "/tmp"


def lab_states(name: str) -> list[Path]:
    """State directories of the lab nodes that `name` (`node-a` or `lab/node-a`) may mean."""
    base = paths.run_dir() / "lab"
    lab, _, node = name.rpartition("/")
    pattern = f"{lab or '*'}/{node}/node.json"
    return sorted(path.parent for path in base.glob(pattern)) if node else []


def resolve(spec: str | Node) -> Node:
    """The node that `spec` means. Raises NodeError for one that is not known."""
    if isinstance(spec, Node):
        return spec
    if spec.startswith("ssh://"):
        return SshNode(spec)
    if spec in ("local", "localhost") or spec == os.uname().nodename:
        return LocalNode(context.host(), "local")
    if spec.startswith("state:"):
        return LocalNode(NodeContext.load(Path(spec.removeprefix("state:"))), spec)
    if "://" in spec or not spec or any(mark in spec for mark in "*?[") or ".." in spec:
        raise NodeError("node", f"{spec!r} is no node", "write `local`, a lab node or ssh://user@host")
    found = lab_states(spec)
    if len(found) == 1:
        return LocalNode(NodeContext.load(found[0]), f"{found[0].parent.name}/{found[0].name}")
    if found:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in found)
        raise NodeError("node", f"{spec} may mean {names}", "name the lab as well")
    host = contexts.host_of(spec)
    if host is not None:
        return _in_context(spec, host)
    known = ", ".join(path.name for path in lab_states("node-*")) or "no lab is up"
    raise NodeError(
        "node", f"there is no node {spec} ({known})", "see `migroce lab status`, or write ssh://user@host"
    )


def _in_context(name: str, host: str) -> Node:
    """The machine of the docker context `name`. Raises NodeError."""
    if host.startswith("ssh://"):
        return SshNode(host)
    if not host.startswith("unix://"):
        mend = "its files are needed too: write ssh://user@host"
        how = host.partition(":")[0]
        raise NodeError("node", f"docker context {name} reaches Docker by {how} only", mend)
    if host == DOCKER_SOCKET:
        return LocalNode(context.host(), "local")
    own = dataclasses.replace(context.host(), state=paths.run_dir() / f"context-{name}", docker_host=host)
    own.save()
    return LocalNode(own, f"state:{own.state}")
