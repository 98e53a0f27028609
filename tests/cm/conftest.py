# SPDX-License-Identifier: BSD-3-Clause
"""The connection manager's C sources alone; two namespaces for programs that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cm_native import Native
from cm_programs import CmPair, Preload

from migroce import paths

SRC = Path(__file__).resolve().parents[2] / "src"
CM = Path(__file__).resolve().parents[2] / "native" / "cm"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Codec and state machines. Under MIGROCE_SANITIZER with UBSan (ASan runs them in tests/fuzz)."""
    out = tmp_path_factory.mktemp("cm") / "libcm.so"
    flags = ["-std=c17", "-O1", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    flags.append("-Wno-missing-field-initializers")
    if os.environ.get("MIGROCE_SANITIZER"):
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    sources = map(str, sorted(CM.glob("*.c")))
    subprocess.run(["cc", *flags, f"-I{CM.parent}", *sources, "-o", str(out)], check=True)
    return Native(CM, out)


@pytest.fixture(scope="module")
def pair() -> Iterator[CmPair]:
    """Two namespaces joined by a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root for network namespaces")
    made = CmPair.up(Preload(paths.library()))
    assert isinstance(made, CmPair)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def agents(pair: CmPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """An agent in each; their sockets."""
    running, sockets = [], []
    for name in pair.names():
        ready, told = os.pipe()
        run_dir = tmp_path_factory.mktemp("agent")
        argv = ["nsenter", f"--net=/run/netns/{name}", sys.executable, "-m", "migroce.agent",
                "--run-dir", str(run_dir), "--ready-fd", str(told)]  # fmt: skip
        running.append(subprocess.Popen(argv, pass_fds=[told], env=os.environ | {"PYTHONPATH": str(SRC)}))
        os.close(told)
        assert os.read(ready, 16)
        os.close(ready)
        sockets.append(run_dir / "agent.sock")
    try:
        yield sockets
    finally:
        for agent in running:
            agent.terminate()
            agent.wait(60)
