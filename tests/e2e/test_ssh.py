# SPDX-License-Identifier: BSD-3-Clause
"""Nodes reached by ssh: each lab node gets an sshd, the command runs on a third."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.stage import Check, Stage, wait_for

from migroce.lab.api import Lab, remove
from migroce.migration.journal import journals

pytestmark = pytest.mark.slow
NAME = f"e2e-s{os.getpid()}"[:16]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Three nodes, an sshd on the first two; ssh of this test knows their key and has a key for them."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if sshd is None or os.geteuid() != 0:
        pytest.skip("needs sshd and root")
    remove(NAME)
    up = Lab.up(NAME, nodes=3)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for key in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True
            )
        Path("/run/sshd").mkdir(exist_ok=True)
        config = tmp_path / "sshd_config"
        config.write_text(
            f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\nPidFile none\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nAllowStreamLocalForwarding yes\n"
        )
        (tmp_path / "ssh_config").write_text(
            f"IdentityFile {tmp_path}/user\nStrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        argv = [sshd, "-D", "-e", "-f", str(config)]
        daemons.extend(up.node(node).popen(argv, stderr=subprocess.DEVNULL) for node in ("a", "b"))
        # The system's ssh, told about our keys.
        wrapper = tmp_path / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        third = up.node("c")
        for ip in ("192.168.77.1", "192.168.77.2"):
            wait_for("sshd", lambda ip=ip: not third.run(["ssh", ip, "true"], check=False).returncode)
        yield up
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        up.down()


def spec(lab: Lab, node: str) -> str:
    """The node as another machine would name it."""
    number = {"a": 1, "b": 2}[node]
    return f"ssh://root@192.168.77.{number}?python={sys.executable}&state={lab.node(node).context.state}"


_MIGRATE = "import sys; from migroce.migration.api import migrate; print(migrate(*sys.argv[1:]).blackout)"
_FILES = """
import sys
from pathlib import Path
from migroce.nodes import resolve
with resolve(sys.argv[1]) as node:
    here = Path(sys.argv[2])
    (here / "tree" / "deep").mkdir(parents=True)
    (here / "tree" / "deep" / "file").write_bytes(bytes(range(256)) * 1000)
    node.put(here / "tree" / "deep" / "file", f"{here}/put")
    node.get(f"{here}/put", here / "got")
    assert (here / "got").read_bytes() == bytes(range(256)) * 1000
    node.put_tree(here / "tree", f"{here}/put-tree")
    node.get_tree(f"{here}/put-tree", here / "got-tree")
    assert (here / "got-tree" / "deep" / "file").read_bytes() == bytes(range(256)) * 1000
    assert node.run(["cat"], data=b"x y 'z'").stdout == b"x y 'z'"
    assert node.run(["printf", "%s|", "a b", "'", "$HOME"]).stdout == b"a b|'|$HOME|"
"""


def command(lab: Lab, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script on the third node."""
    argv = lab.node("c").command([sys.executable, "-c", script, *args], env or None)
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_a_container_moves_between_machines_reached_by_ssh(lab: Lab) -> None:
    check = Check(Stage(lab))
    check.more()
    done = command(lab, _MIGRATE, check.server.name, spec(lab, "a"), spec(lab, "b"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
    check.server.home = "node-b"
    assert check.server.where() == ["node-b"]
    check.more()
    check.finish()


@pytest.mark.parametrize(("point", "home"), [("transfer", "node-a"), ("resume.end", "node-b")])
def test_a_killed_command_is_recovered_by_the_machines_themselves(lab: Lab, point: str, home: str) -> None:
    check = Check(Stage(lab))
    check.more()
    args = (check.server.name, spec(lab, "a"), spec(lab, "b"))
    done = command(lab, _MIGRATE, *args, MIGROCE_FAULT=f"{point}:kill")
    assert done.returncode == -signal.SIGKILL, done.stderr
    context = lab.node("a").context
    if home == "node-b":  # the source has no key for the destination here: it asks a person
        wait_for("an orphan", lambda: [record for _, record in journals(context) if not record.ended])
        return
    wait_for("its return", lambda: check.server.where() == [home])
    check.more()
    check.finish()


def test_files_and_commands_go_by_ssh(lab: Lab, tmp_path: Path) -> None:
    done = command(lab, _FILES, spec(lab, "b"), str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_machine_that_cannot_be_reached_is_named_with_the_reason(lab: Lab) -> None:
    unknown = f"ssh://root@192.168.77.9?python={sys.executable}"
    check = Check(Stage(lab))
    done = command(lab, _MIGRATE, check.server.name, spec(lab, "a"), unknown)
    assert done.returncode != 0
    assert "192.168.77.9" in done.stderr
    check.more()
    check.finish()
