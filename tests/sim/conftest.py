# SPDX-License-Identifier: BSD-3-Clause
"""Under a sanitizer the simulator runs in a process of its own, which has the runtime in front.

MIGROCE_SANITIZER names the sanitizer, MIGROCE_SANITIZER_RUNTIME its runtime: a library built with it
cannot be loaded into a Python that was started without. So only test_sanitized.py runs here then, and
it runs all the others.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def preloaded() -> bool:
    """Whether a sanitizer's runtime is where it must be, or not needed."""
    runtime = os.environ.get("MIGROCE_SANITIZER_RUNTIME")
    return not runtime or runtime in os.environ.get("LD_PRELOAD", "").split(":")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    away = [item for item in ours if (item.path.name == "test_sanitized.py") == preloaded()]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]
