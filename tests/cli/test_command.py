# SPDX-License-Identifier: BSD-3-Clause
"""The command line's promises: help, usage errors, one sentence per error, exit statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import migroce as package
from migroce import paths
from migroce.cli.app import app
from migroce.cli.text import flow

from .conftest import Migroce

COMMANDS = [
    "run", "inject", "demo", "lab", "lab up", "lab down", "lab status", "lab run", "lab exec", "migrate",
    "checkpoint", "restore", "recover", "ps", "top", "inspect", "logs", "wait", "rm", "doctor", "version",
    "agent", "agent run", "agent status", "agent stop", "setup", "setup docker",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, migroce: Migroce) -> None:
    done = migroce(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: migroce {command}" in done.stdout
    assert not re.search(r"\[/?(bold|dim)\]", done.stdout), "markup is not rendered"


def test_the_list_above_is_whole() -> None:
    found = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    found |= {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance}
    assert found - {"bench"} == {command.split()[0] for command in COMMANDS}


def test_no_arguments_show_the_help(migroce: Migroce) -> None:
    done = migroce()
    assert "Usage: migroce" in done.stdout + done.stderr


def test_the_version_is_the_build_files_version(migroce: Migroce) -> None:
    root = paths.source_tree()
    assert root is not None
    built = re.search(r"version: '([^']+)'", (root / "meson.build").read_text())
    assert built is not None
    assert package.__version__ == built[1]
    assert migroce("--version").stdout == f"migroce {built[1]}\n"
    assert json.loads(migroce("version", "--json").stdout)["migroce"] == built[1]


def test_wrong_usage_is_status_2(migroce: Migroce) -> None:
    assert migroce("migrate").returncode == 2
    assert migroce("no-such-command").returncode == 2
    assert migroce("ps", "--no-such-option").returncode == 2


def test_an_error_is_one_sentence_without_traceback(migroce: Migroce) -> None:
    done = migroce("migrate", "nobody", "--to", "node-x", "--from", "node-y")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("migroce: ")
    assert done.stderr.count("\n") == 1
    assert "node-y" in done.stderr


@pytest.mark.parametrize("how", [("--debug",), ()])
def test_debug_shows_the_traceback(how: tuple[str, ...], migroce: Migroce, tmp_path: Path) -> None:
    env = {} if how else {"MIGROCE_DEBUG": "1"}
    done = migroce(*how, "inspect", str(tmp_path), **env)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_unreadable_checkpoint_is_named(migroce: Migroce, tmp_path: Path) -> None:
    (tmp_path / "x.dump").write_bytes(b"MGDUMP\r\n")
    done = migroce("inspect", str(tmp_path / "x.dump"))
    assert done.returncode == 1
    assert "x.dump" in done.stderr or "dump" in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no checkpoint" in migroce("inspect", str(empty)).stderr


def test_agent_status_fails_without_an_agent(migroce: Migroce) -> None:
    done = migroce("agent", "status")
    assert done.returncode == 1
    assert done.stderr.startswith("migroce: no agent")


def test_completion_is_offered_for_bash(migroce: Migroce) -> None:
    done = migroce(_MIGROCE_COMPLETE="complete_bash", COMP_WORDS="migroce mig", COMP_CWORD="1")
    assert "migrate" in done.stdout


def test_flow_joins_lines_and_keeps_examples() -> None:
    assert flow("\na\nb\n\nc\n  x\n  y\n") == "a b\n\nc\n\n  x\n\n  y"
