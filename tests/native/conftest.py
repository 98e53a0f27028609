# SPDX-License-Identifier: BSD-3-Clause
"""Namespaces for the tests of this directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .netns import Node, pair


@pytest.fixture(scope="session")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two joined namespaces, MTU 9000. Without root the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    with pair(f"mgt{os.getpid()}") as found:
        yield found
