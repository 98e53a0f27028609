# SPDX-License-Identifier: BSD-3-Clause
"""All of tests/sim once more over a sanitized library: see conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_all_holds_under_the_sanitizer() -> None:
    here = Path(__file__).parent
    environment = os.environ | {"LD_PRELOAD": os.environ["MIGROCE_SANITIZER_RUNTIME"]}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    done = subprocess.run(
        command, env=environment, cwd=here.parents[1], capture_output=True, text=True, check=False
    )
    print(done.stdout[-8000:], done.stderr[-8000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
