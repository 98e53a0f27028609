# SPDX-License-Identifier: BSD-3-Clause
"""A lab with Docker for all tests, of each release in turn; a stage for each test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docker.machine import Machine
from tests.docker.stage import Stage, keep_network

from migroce.lab.api import Lab, remove

RELEASES = os.environ.get("MIGROCE_DOCKER_RELEASES", "20.10 26.1").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "docker" in item.path.parts:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session", params=RELEASES)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Two nodes with a dockerd each."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.environ.pop("MIGROCE_FAULT", None)
    name = f"dc-{os.getpid()}"
    remove(name)
    up = Lab.up(name, engine="docker", release=request.param)
    try:
        keep_network(up)
        yield up
    finally:
        up.down()


@pytest.fixture
def stage(lab: Lab) -> Iterator[Stage]:
    """A place for containers; all of them end with the test."""
    with contextlib.closing(Stage(lab)) as it:
        yield it


@pytest.fixture
def machine(stage: Stage, tmp_path: Path) -> Iterator[Machine]:
    """The lab's node-b, reached by ssh."""
    made = Machine(stage, tmp_path)
    try:
        yield made
    finally:
        made.sshd.close()
