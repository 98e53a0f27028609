# SPDX-License-Identifier: BSD-3-Clause
"""The fuzzers of native/fuzz, built once into build-fuzz as `make fuzz` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build-fuzz"
TARGETS = ("cm", "packet", "icrc", "control", "engine", "unack", "shared")

sys.path.insert(0, str(ROOT / "tests" / "wire"))  # its strategies


def _run(*command: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CC": "clang"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


@pytest.fixture(scope="session")
def fuzzers() -> Path:
    """Directory of the fuzz_* programs."""
    for program in ("clang", "meson", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if not (BUILD / "build.ninja").is_file():
        _run("meson", "setup", str(BUILD), "-Dfuzz=true", "-Dwerror=false", "-Ddev=false")
    _run("ninja", "-C", str(BUILD), *(f"native/fuzz/fuzz_{name}" for name in TARGETS))
    return BUILD / "native" / "fuzz"
