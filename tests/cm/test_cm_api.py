# SPDX-License-Identifier: BSD-3-Clause
"""Every test of c/t_cm.c, as a test of its own: librdmacm's calls, compared with the kernel's cma.c."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cm_programs import FLAGS, TV, Preload

from migroce import paths

SOURCE = Path(__file__).resolve().parent / "c" / "t_cm.c"
CASES = re.findall(r"\bT\((\w+)\)", SOURCE.read_text().partition("TV_MAIN")[2])

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root for network namespaces"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, linked with the real libibverbs and librdmacm."""
    out = tmp_path_factory.mktemp("cm") / "t_cm"
    command = ["cc", *FLAGS, f"-I{TV}", str(SOURCE), str(TV / "tv.c"), "-o", str(out)]
    subprocess.run([*command, "-lrdmacm", "-libverbs", "-lpthread"], check=True)
    return out


@pytest.mark.parametrize("name", CASES)
def test_rdmacm(program: Path, name: str) -> None:
    done = Preload(paths.library()).alone(program, name)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
