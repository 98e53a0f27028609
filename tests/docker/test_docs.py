# SPDX-License-Identifier: BSD-3-Clause
"""docs/docker.md, "On one machine": each line as it is written, but for the lab's name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from migroce.lab.api import remove

TREE = Path(__file__).resolve().parent.parent.parent


@pytest.mark.root
def test_the_lab_as_documented() -> None:
    text = (TREE / "docs" / "docker.md").read_text()
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert script.count("migroce lab") == 4
    lab = f"dd-{os.getpid()}"
    script = re.sub(r"migroce lab (up|exec|down)", rf"migroce lab \1 --lab {lab}", script)
    try:
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script], cwd=TREE, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
    finally:
        remove(lab)
    assert done.returncode == 0, done.stdout
    assert "\n0\n0\n" in done.stdout, done.stdout
    assert " 65536      100000 " in done.stdout
