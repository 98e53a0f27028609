# SPDX-License-Identifier: BSD-3-Clause
"""Two machines on this one, for what documents tell their readers to type on machines of their own.

Each has namespaces for its network, mounts, host name and processes. What it writes below /etc, /opt, /run,
/usr/local, /var/lib and /var/log is its own and goes with it; programs are the real machine's. One cable
joins them, and each reaches the other by `ssh host-a`, `ssh host-b`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.e2e.sshd import Keys, Sshd
from tests.e2e.stage import wait_for

TREE = Path(__file__).resolve().parent.parent

_START = r"""
set -e
echo "$1" >/proc/sys/kernel/hostname
for name in etc opt usr/local var/lib var/log; do
    mkdir -p "$2/$name" "$2/work/$name"
    mount -t overlay -o "lowerdir=/$name,upperdir=$2/$name,workdir=$2/work/$name" machine "/$name"
done
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir /run/netns /run/sshd
# An overlay file system cannot have its layers on another one.
for name in docker containers containerd; do
    mkdir -p "$2/data/$name" "/var/lib/$name"
    mount --bind "$2/data/$name" "/var/lib/$name"
done
printf '127.0.0.1 localhost\n192.0.2.1 host-a\n192.0.2.2 host-b\n' >/etc/hosts
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
echo ready
read -r _ || true
"""
"""bash is pid 1 there, because it waits for whatever is left to it; it ends with our end of its pipe."""


class Machine:
    """One of them."""

    def __init__(self, name: str, where: Path, env: Mapping[str, str]) -> None:
        """`env`: what whoever sits at it has in the environment."""
        self.name = name
        self.address = {"host-a": "192.0.2.1", "host-b": "192.0.2.2"}[name]
        self.where = where / name
        self.env = dict(env)
        self.where.mkdir()
        self._netns = f"mgm-{os.getpid()}-{name}"
        subprocess.run(["ip", "netns", "add", self._netns], check=True)
        self._init: subprocess.Popen[str] | None = None

    def plug(self, other: Machine) -> None:
        """Join the two by a cable."""
        ends = ["eth0", "netns", self._netns, "mtu", "9000"]
        peer = ["peer", "name", "eth0", "netns", other._netns, "mtu", "9000"]
        subprocess.run(["ip", "link", "add", *ends, "type", "veth", *peer], check=True)

    def boot(self) -> None:
        """Bring it up."""
        own = ["--mount", "--propagation=slave", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        start = ["bash", "-c", _START, "init", self.name, str(self.where), self.address]
        self._init = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self._netns}", "unshare", *own, *start],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "ready\n", f"{self.name} does not boot"

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs `argv` there, in the work tree."""
        assert self._init is not None
        children = f"/proc/{self._init.pid}/task/{self._init.pid}/children"
        (pid,) = Path(children).read_text().split()
        enter = ["nsenter", f"--target={pid}", "--mount", "--net", "--uts", "--pid", "--"]
        values = [f"{name}={value}" for name, value in {**self.env, **(env or {})}.items()]
        return [*enter, "env", f"--chdir={TREE}", *values, *argv]

    def run(self, script: str, seconds: float = 200) -> str:
        """Type lines there; what they print. Fails when one does."""
        done = subprocess.run(
            self.command(["bash", "-euxo", "pipefail", "-c", script]), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {done.stdout}"
        return done.stdout

    def start(self, argv: Sequence[str], log: str) -> None:
        """Start a daemon there; it ends with the machine."""
        with (self.where / log).open("wb") as out:
            subprocess.run(
                self.command(["setsid", "--fork", *argv]), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                check=True,
            )  # fmt: skip

    def off(self) -> None:
        """Switch it off: nothing of it is left."""
        if self._init is not None:
            self._init.kill()
            self._init.wait()
            for stream in (self._init.stdin, self._init.stdout):
                if stream is not None:
                    stream.close()
            # The kernel is still ending what ran there, until nobody is in its network any more.
            inside = ["ip", "netns", "pids", self._netns]
            wait_for("its end", lambda: not subprocess.run(inside, capture_output=True, check=True).stdout)
        subprocess.run(["ip", "netns", "del", self._netns], check=True)
        shutil.rmtree(self.where)


@contextlib.contextmanager
def two_machines(where: Path, env: Mapping[str, str]) -> Iterator[tuple[Machine, Machine]]:
    """host-a and host-b, each with an sshd that knows the other's key. `env`: as of `Machine`."""
    keys = Keys(where)
    for program, option in (("ssh", "-F"), ("scp", "-F")):
        (keys.bin / program).write_text(
            f'#!/bin/sh\nexec {shutil.which(program)} {option} {where}/ssh_config "$@"\n'
        )
        (keys.bin / program).chmod(0o755)
    machines: list[Machine] = []
    daemons: list[Sshd] = []
    try:
        own = {**env, "PATH": f"{keys.bin}:{env['PATH']}"}
        machines += [Machine(name, where, own) for name in ("host-a", "host-b")]
        machines[0].plug(machines[1])
        for machine in machines:
            machine.boot()
            daemons.append(Sshd(machine, keys, own))
        a, b = machines
        for here, there in ((a, b), (b, a)):
            _reaches(here, there)
        yield a, b
    finally:
        for sshd in daemons:
            sshd.close()
        for machine in machines:
            machine.off()


def _reaches(here: Machine, there: Machine) -> None:
    look = here.command(["ssh", "-o", "BatchMode=yes", there.name, "true"])
    what = f"ssh from {here.name} to {there.name}"
    wait_for(what, lambda: not subprocess.run(look, capture_output=True, check=False).returncode)


def blocks(document: str) -> list[tuple[str, str]]:
    """The marked blocks of a document, in order: (where, lines), `where` as in `<!-- run on: host-a -->`."""
    text = (TREE / "docs" / document).read_text()
    marked = r"^<!-- run on: ([a-z -]+) -->\n```(?:ba)?sh\n(.*?)^```"
    return re.findall(marked, text, re.MULTILINE | re.DOTALL)
