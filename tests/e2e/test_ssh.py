# SPDX-License-Identifier: BSD-3-Clause
"""Nodes reached by ssh: each lab node gets an sshd, the command runs on a third."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.e2e.sshd import Keys, Sshd, serve
from tests.e2e.stage import Check, Stage, wait_for
from tests.e2e.test_faults import settled

from migroce.lab.api import Lab, remove
from migroce.migration.journal import PHASES, journals
from migroce.nodes import HEARTBEAT

NAME = f"e2e-s{os.getpid()}"[:16]


class Machines:
    """Three nodes, an sshd on the first two; ssh of this test knows their key and has a key for them."""

    def __init__(self, where: Path) -> None:
        self.keys = Keys(where)
        self.lab = Lab.up(NAME, nodes=3)
        self.daemons: list[Sshd] = []

    def serve(self) -> None:
        """Start the sshd's."""
        self.daemons += serve(self.lab, self.keys)

    def sshd(self, node: str) -> Sshd:
        """That of node a or b."""
        return self.daemons["ab".index(node)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """For all tests here."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    remove(NAME)
    patch = pytest.MonkeyPatch()
    made = Machines(tmp_path_factory.mktemp("ssh"))
    try:
        # The system's ssh, told about our keys.
        patch.setenv("PATH", f"{made.keys.bin}:{os.environ['PATH']}")
        made.serve()
        yield made
    finally:
        patch.undo()
        for daemon in made.daemons:
            daemon.close()
        made.lab.down()


@pytest.fixture
def lab(machines: Machines) -> Iterator[Lab]:
    """The nodes, without containers."""
    yield machines.lab
    Stage(machines.lab).close()
    machines.keys.know()


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


@pytest.mark.slow
@pytest.mark.parametrize(("point", "home"), [("transfer", "node-a"), ("resume.end", "node-b")])
def test_a_killed_command_is_recovered_by_the_machines_themselves(lab: Lab, point: str, home: str) -> None:
    check = Check(Stage(lab))
    check.more()
    args = (check.server.name, spec(lab, "a"), spec(lab, "b"))
    done = command(lab, _MIGRATE, *args, MIGROCE_FAULT=f"{point}:kill")
    assert done.returncode == -signal.SIGKILL, done.stderr
    context = lab.node("a").context
    if home == "node-b":  # the source has no key for the destination here: it asks a person
        (path,) = wait_for("an orphan", lambda: [path for path, each in journals(context) if not each.ended])
        argv = lab.node("a").command([sys.executable, "-m", "migroce.migration.recover", str(path)])
        wait_for("success with a key", lambda: not subprocess.run(argv, check=False).returncode)
        assert settled(check, check.server) == home
        check.finish()
        return
    wait_for("its return", lambda: check.server.where() == [home])
    check.more()
    check.finish()


def test_files_and_commands_go_by_ssh(lab: Lab, tmp_path: Path) -> None:
    done = command(lab, _FILES, spec(lab, "b"), str(tmp_path))
    assert done.returncode == 0, done.stderr


_TALK = "import sys; from migroce.nodes import resolve; resolve(sys.argv[1]).call('ping')"
_PING = "import sys; from migroce.cli import main; sys.argv[0] = 'migroce'; sys.exit(main())"
_FAKE = """#!/bin/sh
echo '{"hello": {"name": "old", "state": "/", "version": "0.0.9", "pid": 1}}'
cat >/dev/null
"""


def words(lab: Lab, address: str) -> str:
    """What the command says of a node that it cannot use, all of it."""
    done = command(lab, _PING, "ps", "--on", address)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_machine_that_cannot_be_used_is_named_with_reason_and_mend(
    machines: Machines, lab: Lab, tmp_path: Path
) -> None:
    good, keys = spec(lab, "b"), machines.keys
    host = "192.168.77.2"
    keys.know(host=None)
    said = words(lab, good)
    assert f"{host} cannot be reached: its host key is not known here; log in once by hand" in said
    keys.know(host="other-host")
    said = words(lab, good)
    assert f"{host} cannot be reached: its host key is not the one that is known" in said
    assert f"ssh-keygen -R {host}" in said
    keys.know(user="other-user")
    said = words(lab, good)
    assert f"{host} cannot be reached: it does not let us in (it accepts publickey)" in said
    assert "ssh-copy-id" in said
    keys.know()
    said = words(lab, "ssh://root@192.168.77.3")  # nobody listens
    assert "192.168.77.3 cannot be reached: ssh cannot connect: connection refused" in said
    said = words(lab, "ssh://root@192.168.77.9")  # nobody is there
    assert "192.168.77.9 cannot be reached: ssh cannot connect: no route to host" in said
    said = words(lab, f"ssh://root@{host}?python=/usr/bin/no-python")
    assert f"{host} cannot be reached: there is no /usr/bin/no-python there; install it there" in said
    bare = tmp_path / "python-without-migroce"
    bare.write_text('#!/bin/sh\nunset PYTHONPATH\nexec /usr/bin/python3 -I -S "$@"\n')
    bare.chmod(0o755)
    said = words(lab, f"ssh://root@{host}?python={bare}")
    assert f"{host} cannot be reached: /usr/bin/python3 there has no migroce; install it there" in said
    old = tmp_path / "python-old"
    old.write_text(_FAKE)
    old.chmod(0o755)
    said = words(lab, f"ssh://root@{host}?python={old}")
    assert f"{host} cannot be used: it has migroce 0.0.9, here is" in said
    assert "install the same on both machines" in said
    assert words(lab, "ssh://root@:notaport").endswith("write ssh://user@host:port")
    assert not command(lab, _TALK, good).returncode


_STRIKE = """
import os, signal, sys
from migroce.errors import MigroceError
from migroce.migration.api import migrate
container, source, destination, phase, *pids = sys.argv[1:]
def strike(event):
    if (event.phase, event.state) == (phase, "start"):
        for pid in pids:
            for child in open(f"/proc/{pid}/task/{pid}/children").read().split():
                os.kill(int(child), signal.SIGKILL)
try:
    migrate(container, source, destination, strike)
except MigroceError as exc:
    sys.exit(str(exc))
"""
QUICK = ("dump", "restore")


@pytest.mark.parametrize("side", ["a", pytest.param("b", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "phase", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in PHASES]
)
def test_a_connection_lost_in_a_phase_leaves_one_running_container(
    machines: Machines, lab: Lab, phase: str, side: str
) -> None:
    check = Check(Stage(lab))
    check.more(20)
    pid = str(machines.sshd(side).process.pid)
    args = (check.server.name, spec(lab, "a"), spec(lab, "b"), phase, pid)
    done = command(lab, _STRIKE, *args)
    assert "Traceback" not in done.stderr
    home = settled(check, check.server)
    if done.returncode == 0:  # nothing was going on: the connection was simply made again
        assert home == "node-b"
    else:
        assert (done.returncode, home) == (1, "node-a"), done.stderr
        assert "runs on node-a as before" in done.stderr
    check.finish()


@pytest.mark.slow
def test_a_source_that_is_cut_off_helps_itself(lab: Lab) -> None:
    check = Check(Stage(lab))
    check.more(20)
    rules = "table inet cut { chain c { type filter hook input priority 0; tcp dport 22 drop; }; }"
    strike = f"import subprocess; subprocess.run([*pids, {rules!r}], check=True)"
    script = _STRIKE.replace("for pid in pids:", f"{strike}\n        for pid in ():")
    node = lab.node("a")
    cut = node.command(["nft"])
    args = (check.server.name, spec(lab, "a"), spec(lab, "b"), "transfer", *cut)
    argv = lab.node("c").command([sys.executable, "-c", script, *args])
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as moving:
        look = ["nft", "list", "table", "inet", "cut"]
        wait_for("the cut", lambda: not node.run(look, check=False).returncode)
        over: Callable[[], bool] = lambda: all(each.ended for _, each in journals(node.context))  # noqa: E731
        wait_for("its return without the command", over, 4 * HEARTBEAT)
        assert check.server.where() == ["node-a"]
        check.more()
        node.run(["nft", "delete", "table", "inet", "cut"])
        said = moving.communicate()[1]
    assert moving.returncode == 1
    assert "Traceback" not in said
    assert settled(check, check.server) == "node-a"
    check.finish()
