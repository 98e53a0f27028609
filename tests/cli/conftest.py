# SPDX-License-Identifier: BSD-3-Clause
"""The command, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Migroce = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory of the test's own: no agent, no lab."""
    return tmp_path / "run"


@pytest.fixture
def migroce(run_dir: Path) -> Migroce:
    """`migroce(*args, **env)` runs the command with its own run directory."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        full = {name: value for name, value in os.environ.items() if name != "MIGROCE_DEBUG"}
        full |= {"MIGROCE_RUN_DIR": str(run_dir), "COLUMNS": "100", "NO_COLOR": "1", **env}
        return subprocess.run(
            [sys.executable, "-m", "migroce", *args],
            env=full, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run
