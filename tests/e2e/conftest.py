# SPDX-License-Identifier: BSD-3-Clause
"""A lab for all tests, a stage for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.stage import Stage

from migroce.errors import MigroceError
from migroce.lab.api import Lab, labs, remove

PREFIX = "e2e-"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two nodes, up for the whole session."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.environ.pop("MIGROCE_FAULT", None)
    for left in labs():  # by a session that was killed
        pid = left.removeprefix(PREFIX)
        if left.startswith(PREFIX) and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            remove(left)
    up = Lab.up(f"{PREFIX}{os.getpid()}")
    try:
        yield up
    finally:
        up.down()


@pytest.fixture
def stage(lab: Lab) -> Iterator[Stage]:
    """A place for containers. When the test is over nothing is left in the middle of a move, and all end."""
    it = Stage(lab)
    try:
        yield it
        for node in lab.nodes.values():
            assert [each for each in node.call("journals") if not each["ended"]] == []
    finally:
        try:
            it.close()
        except MigroceError:
            lab.close()
            it.close()
