# SPDX-License-Identifier: BSD-3-Clause
"""sshd for tests: the system's, or the distribution's package unpacked into `.sshd`, not installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.e2e.stage import wait_for

from migroce import paths
from migroce.lab.api import Lab
from migroce.nodes import LocalNode

_PACKAGES = ("openssh-server", "libwrap0", "libnss-wrapper")


def _private() -> Path:
    """The prefix with sshd, made now if need be."""
    prefix = (paths.source_tree() or Path("/var/tmp")) / ".sshd"
    if not (prefix / "usr/sbin/sshd").is_file():
        part = prefix.with_name(f".sshd-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        done = subprocess.run(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *_PACKAGES],
            cwd=part, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"no sshd here, and apt-get cannot fetch it: {done.stderr.strip()[-200:]}")
        for package in part.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(part)], check=True)
        shutil.rmtree(prefix, ignore_errors=True)
        part.rename(prefix)
    return prefix


class Keys:
    """Host and user keys, configurations of both sides, and an `ssh` that takes them, below a directory."""

    def __init__(self, where: Path) -> None:
        self.where = where
        for key in ("host", "user", "other-host", "other-user"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(where / key)]
            subprocess.run(argv, check=True)
        self.bin = where / "bin"
        self.bin.mkdir()
        (self.bin / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {where}/ssh_config "$@"\n')
        (self.bin / "ssh").chmod(0o755)
        self.know()

    def know(self, host: str | None = "host", user: str = "user") -> None:
        """From now on ssh knows the machines by the key `host` (None: not at all), and shows `user`."""
        known = "" if host is None else f"* {(self.where / host).with_suffix('.pub').read_text()}"
        (self.where / "known_hosts").write_text(known)
        (self.where / "ssh_config").write_text(
            f"IdentityFile {self.where}/{user}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {self.where}/known_hosts\n"
            "GlobalKnownHostsFile /dev/null\nUpdateHostKeys no\n"
        )


class Sshd:
    """An sshd on a node of a lab."""

    def __init__(self, node: LocalNode, keys: Keys, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: what those who log in have in theirs."""
        self.node = node
        program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
        env: dict[str, str] = {}
        extra = ""
        if program is None:
            prefix = _private()
            program = str(prefix / "usr/sbin/sshd")
            libs = [str(path.parent) for path in prefix.glob("usr/lib/*/libwrap.so.0")]
            env["LD_LIBRARY_PATH"] = ":".join(libs + [str(path) for path in prefix.glob("lib/*")])
            for option, name in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
                if (prefix / "usr/lib/openssh" / name).is_file():  # 9.8 and later
                    extra += f"{option} {prefix}/usr/lib/openssh/{name}\n"
            env.update(self._user(prefix, keys.where))
        if environment:
            extra += "SetEnv " + " ".join(f'"{name}={value}"' for name, value in environment.items()) + "\n"
        Path("/run/sshd").mkdir(exist_ok=True)
        config = keys.where / "sshd_config"
        config.write_text(
            f"HostKey {keys.where}/host\nAuthorizedKeysFile {keys.where}/user.pub\n"
            "StrictModes no\nPidFile none\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
            f"AllowStreamLocalForwarding yes\nSubsystem sftp internal-sftp\n{extra}"
        )
        argv = node.command([program, "-D", "-e", "-f", str(config)], env or None)
        with (keys.where / f"{node.name}.sshd").open("wb") as log:
            self.process = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)

    @staticmethod
    def _user(prefix: Path, where: Path) -> dict[str, str]:
        """sshd wants a user of that name, which only its installation makes."""
        try:
            pwd.getpwnam("sshd")
        except KeyError:
            passwd = where / "passwd"
            line = "sshd:x:65534:65534::/run/sshd:/usr/sbin/nologin\n"
            passwd.write_text(Path("/etc/passwd").read_text() + line)
            (wrapper,) = prefix.glob("usr/lib/*/libnss_wrapper.so")
            group = "/etc/group"
            return {"LD_PRELOAD": str(wrapper), "NSS_WRAPPER_PASSWD": str(passwd), "NSS_WRAPPER_GROUP": group}
        return {}

    def sessions(self) -> list[int]:
        """Pids of the processes that serve connections."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        return [int(word) for word in text.split()]

    def close(self) -> None:
        for pid in self.sessions():
            subprocess.run(["kill", "-9", str(pid)], check=False)
        self.process.kill()
        self.process.wait()


def serve(
    lab: Lab, keys: Keys, nodes: tuple[str, ...] = ("a", "b"), from_: str = "c",
    environment: Mapping[str, str] | None = None,
) -> list[Sshd]:  # fmt: skip
    """An sshd on each of `nodes`, reachable from the node `from_`."""
    daemons = [Sshd(lab.node(node), keys, environment) for node in nodes]
    client = lab.node(from_)

    def look(ip: str) -> bool:
        argv = [str(keys.bin / "ssh"), "-o", "BatchMode=yes", ip, "true"]
        return not client.run(argv, check=False).returncode

    for daemon in daemons:
        ip = f"192.168.77.{list(lab.nodes).index(daemon.node.name) + 1}"
        wait_for(f"sshd of {daemon.node.name}", lambda ip=ip: look(ip))  # type: ignore[misc]
    return daemons
