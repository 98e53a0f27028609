# SPDX-License-Identifier: BSD-3-Clause
"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# No wall-clock deadlines (machines differ), and a failure prints what replays it.
# The same examples in every run; MIGROCE_SIM_PROFILE=explore draws new ones.
EXPLORE = os.environ.get("MIGROCE_SIM_PROFILE") == "explore"
settings.register_profile("migroce", deadline=None, print_blob=True, derandomize=not EXPLORE)
settings.load_profile("migroce")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `root` are skipped for other users."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
