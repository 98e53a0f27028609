# SPDX-License-Identifier: BSD-3-Clause
"""docs/podman.md, "On two machines": each block as it is written, where it says."""

from __future__ import annotations

import re

from tests.machines import Machine, blocks
from tests.podman.conftest import setting_up


def test_two_machines_as_documented(hosts: tuple[Machine, Machine]) -> None:
    rest = blocks("podman.md")[len(setting_up()) :]
    assert [where for where, _ in rest] == ["host-a", "host-b", "host-a", "host-b", "host-b"]
    said = ""
    for where, lines in rest:
        said = next(host for host in hosts if host.name == where).run(lines, 600)
    assert "\n0\n0\n" in said, said
    assert re.search(r" 65536 +200000 ", said), said
