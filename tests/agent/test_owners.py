# SPDX-License-Identifier: BSD-3-Clause
"""Migrations whose owner dies are recovered: by a stub of migroce.migration.recover, run for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .rig import SRC, Agent, children, eventually

RECOVER = '''
import pathlib, sys
journal = pathlib.Path(sys.argv[1])
with open(journal.with_suffix(".log"), "a") as f:
    f.write("run\\n")
if "fail" in journal.read_text():
    journal.write_text("good")
    sys.exit("no luck")
journal.unlink()
'''


@pytest.fixture
def owned(
    tmp_path: Path, start_agent: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> Agent:
    """An agent that finds a stub for recover."""
    package = tmp_path / "stub" / "migroce"
    (package / "migration").mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(SRC / 'migroce')!r})\n__version__ = '0'\n")
    (package / "migration" / "__init__.py").write_text("")
    (package / "migration" / "recover.py").write_text(RECOVER)
    monkeypatch.setattr("agent.rig.SRC", tmp_path / "stub")
    return start_agent()


def owner(agent: Agent, journal: Path) -> subprocess.Popen[bytes]:
    """A process that begins a migration and holds the connection."""
    script = ("import sys\nfrom migroce.agent.client import AgentClient\nc = AgentClient(sys.argv[1])\n"
              "c.migration_begin(sys.argv[2])\nprint('begun', flush=True)\nsys.stdin.read()\n")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(agent.run_dir / "admin.sock"), str(journal)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SRC)})
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def finish(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def test_a_migration_that_ends_is_left_alone(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("good")
    owned.client.migration_begin(journal)
    assert [m["journal"] for m in owned.client.status()["migrations"]] == [str(journal)]
    assert owned.client.migration_end(journal)
    assert not owned.client.migration_end(journal)
    owned.client.close()
    assert owned.client.status()["migrations"] == []
    assert journal.exists()


def test_a_migration_whose_owner_is_killed_is_recovered(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("good")
    finish(owner(owned, journal))
    eventually(lambda: not journal.exists() and not owned.client.status()["migrations"])
    assert not children(owned.process.pid)


def test_a_failing_recovery_is_tried_again(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("fail")
    finish(owner(owned, journal))
    error = ["exit status 1: no luck"]
    eventually(lambda: [m["error"] for m in owned.client.status()["migrations"]] == error)
    eventually(lambda: not owned.client.status()["migrations"])
    assert (tmp_path / "j.log").read_text() == "run\nrun\n"


def test_a_journal_that_is_gone_needs_no_recovery(owned: Agent, tmp_path: Path) -> None:
    finish(owner(owned, tmp_path / "j"))
    eventually(lambda: not owned.client.status()["migrations"])
    assert not (tmp_path / "j.log").exists()


def test_a_restarted_agent_recovers_when_the_owner_is_dead(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("good")
    process = owner(owned, journal)
    owned.kill()
    finish(process)
    owned.start()
    eventually(lambda: not journal.exists())


def test_a_restarted_agent_waits_for_an_owner_that_lives(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("good")
    process = owner(owned, journal)
    owned.restart()
    status = owned.client.status()["migrations"]
    assert [(m["pid"], m["recovering"]) for m in status] == [(process.pid, False)]
    assert journal.exists()
    finish(process)
    eventually(lambda: not journal.exists())


def test_both_killed_at_once_is_recovered_by_the_next_agent(owned: Agent, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    journal.write_text("good")
    process = owner(owned, journal)
    owned.process.kill()
    process.kill()
    process.communicate()
    owned.kill()
    owned.start()
    eventually(lambda: not journal.exists() and not owned.client.status()["migrations"])
