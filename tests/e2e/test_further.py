# SPDX-License-Identifier: BSD-3-Clause
"""A container's further IPv4 addresses move along, and what runs at them goes on there."""

from __future__ import annotations

import pytest
from tests.e2e.stage import Box, Check, Stage

from migroce.errors import StepError

SERVER, CLIENT = "10.0.1.252", "10.0.1.253"


def at(box: Box) -> set[tuple[str, str]]:
    """Whence and whither its QPs are connected."""
    return {(qp["local_gid"], qp["peer_gid"]) for qp in box.qps()}


def test_connections_between_further_addresses_move_with_either_end(stage: Stage) -> None:
    check = Check(stage, further=([SERVER], [CLIENT]))
    for box in (check.server, check.client, check.server):
        check.more()
        assert at(check.server) == {(SERVER, CLIENT)}
        report = box.move()
        assert (report.qps, report.warnings) == (4, [])
    check.more()
    assert at(check.server) == {(SERVER, CLIENT)}
    assert at(check.client) == {(CLIENT, SERVER)}
    check.finish()


def test_another_main_address_leaves_connections_at_the_further_ones(stage: Stage) -> None:
    """The stand-in, which sends peers of the main address there, says nothing to others."""
    check = Check(stage, "a", "b", "--no-tcp-after-setup", further=([SERVER], [CLIENT]))
    check.more()
    with pytest.raises(StepError, match=f"{SERVER} is an address of {check.server.name} already"):
        check.server.move(ip=SERVER)
    report = check.server.move(ip="10.0.1.251")
    assert (report.qps, report.warnings) == (4, [])
    check.more()
    assert at(check.server) == {(SERVER, CLIENT)}
    assert check.server.info()["ip"] == "10.0.1.251"
    check.finish()
