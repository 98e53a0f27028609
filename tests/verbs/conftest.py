# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: the library under test, the C programs, a pair of connected network namespaces."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs_pair import Pair
from verbs_programs import DLOPEN, FORWARD, PROGRAMS, Builder, Preload

from migroce import paths


@pytest.fixture(scope="session")
def library() -> Path:
    """libmigroce.so."""
    return paths.library()


@pytest.fixture(scope="session")
def preload(library: Path) -> Preload:
    """Starts programs with the library."""
    return Preload(library)


@pytest.fixture(scope="session")
def programs(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The C programs, compiled once."""
    builder = Builder(library, tmp_path_factory.mktemp("verbs"))
    built = {name: builder.program(name) for name in PROGRAMS}
    built[FORWARD] = builder.forward_program()
    built[DLOPEN] = builder.dlopen_program()
    return built


@pytest.fixture(scope="module")
def pair(preload: Preload) -> Iterator[Pair]:
    """Two namespaces joined by a veth pair with MTU 9000."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    made = Pair.up(preload)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture(autouse=True)
def _tools() -> None:
    for tool in ("cc", "nm", "ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")

