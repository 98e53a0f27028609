# SPDX-License-Identifier: BSD-3-Clause
"""docs/docker.md, in the lab: each line as it is written, but for the lab's name."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migroce.lab.api import remove

TREE = Path(__file__).resolve().parent.parent.parent
LAB = f"dd-{os.getpid()}"


def blocks(kind: str) -> list[str]:
    text = (TREE / "docs" / "docker.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run directory of its own, in which `node-b` means this lab's, whatever else is up."""
    with tempfile.TemporaryDirectory(prefix="mgd-", dir="/tmp") as directory:
        monkeypatch.setenv("MIGROCE_RUN_DIR", directory)
        try:
            yield
        finally:
            remove(LAB)


def run(*parts: str) -> str:
    """Type the blocks into a shell; all that was said. Each line must succeed."""
    script = re.sub(r"migroce lab (up|exec|down)", rf"migroce lab \1 --lab {LAB}", "\n".join(parts))
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script], cwd=TREE, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.root
def test_by_hand_as_documented() -> None:
    script = blocks("sh")
    assert "\n".join(script).count("migroce lab") == 4
    said = run(*script)
    assert "\n0\n0\n" in said, said
    assert " 65536      100000 " in said


@pytest.mark.root
def test_by_command_as_documented() -> None:
    up, start = blocks("sh")[:2]
    (command,) = blocks("shell")
    assert "migroce migrate cont-moving --to node-b" in command
    look = "b ps -a --format 'node-b has {{.Names}}'"
    said = run(up, start, command, "migroce wait cont-moving", look, "migroce lab down")
    assert "\nnode-b has cont-moving\n" in said, said
    assert " 65536      100000 " in said
