# SPDX-License-Identifier: BSD-3-Clause
"""Two namespaces for the checking workload to run between."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.native.netns import Node, pair


@pytest.fixture(scope="session")
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two joined namespaces, MTU 9000. Without root the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    with pair(f"mgw{os.getpid()}") as found:
        yield found
