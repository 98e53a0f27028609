# SPDX-License-Identifier: BSD-3-Clause
"""Two machines with Podman, set up as docs/podman.md says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from tests.machines import TREE, Machine, blocks, two_machines

from migroce import criu

LIMITS = '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]'
"""Podman's own default may be more than a machine like ours may give."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "podman" in item.path.parts:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """host-a and host-b, with the image, before the first container: the document's blocks up to there."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    assert shutil.which("podman"), "scripts/setup podman installs it"
    path = f"{TREE}/.venv/bin:{criu.environment()['PATH']}"
    with two_machines(tmp_path_factory.mktemp("machines"), {"PATH": path}) as machines:
        for where, lines in setting_up():
            for machine in machines:
                if where in ("both", machine.name):
                    machine.run(lines)
        for machine in machines:
            machine.run(f"echo '{LIMITS}' >/etc/containers/containers.conf")
            machine.run("podman load -q -i .docker/perftest.tar")
        yield machines


def setting_up() -> list[tuple[str, str]]:
    """The document's blocks before the first container."""
    return blocks("podman.md")[:3]
