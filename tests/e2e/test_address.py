# SPDX-License-Identifier: BSD-3-Clause
"""Moves to another address: capable peers follow, what cannot follow is refused before anything stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.stage import Check, Stage, wait_for

from migroce.errors import StepError
from migroce.migration.api import checkpoint, restore


def _free(number: int) -> str:
    return f"10.0.1.{244 + number}"


def test_peers_follow_to_another_address_and_no_message_is_wrong(stage: Stage) -> None:
    check = Check(stage, "a", "b", "--no-tcp-after-setup")
    first = check.server.ip
    with pytest.raises(StepError, match="in use"):
        check.server.move(ip=check.client.ip)
    for ip in (_free(0), first):
        check.more()
        report = check.server.move(ip=ip)
        assert (report.ip, report.qps, report.warnings) == (ip, 4, [])
        assert [again["peer"] for again in report.qps_again] == [check.client.ip] * 4
        check.more()
        assert {qp["peer_gid"] for qp in check.client.qps()} == {ip}
        assert check.server.info()["ip"] == ip
        assert check.server.where() == [check.server.home]
    check.finish()


def test_both_ends_change_their_addresses_at_the_same_time(stage: Stage) -> None:
    check = Check(stage, "a", "b", "--no-tcp-after-setup")
    check.more()
    moves = {check.server: _free(1), check.client: _free(2)}
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(box.move, ip=ip) for box, ip in moves.items()]
        assert [each.result().qps for each in done] == [4, 4]
    check.more()
    assert {qp["peer_gid"] for qp in check.client.qps()} == {_free(1)}
    assert {qp["peer_gid"] for qp in check.server.qps()} == {_free(2)}
    check.finish()


def test_what_cannot_change_its_address_is_refused_and_runs_on(stage: Stage) -> None:
    check = Check(stage)  # keeps a TCP connection
    check.more()
    for ip, words in (
        (_free(3), "TCP sockets bound to"),
        ("10.9.9.9", "is not in"),
        ("10.0.1.300", "is no IPv4 address"),
    ):
        with pytest.raises(StepError, match=words):
            check.server.move(ip=ip)
        assert check.server.where() == [check.server.home]
    check.more()
    check.finish()


def test_a_checkpoint_comes_back_at_another_address(stage: Stage, tmp_path: Path) -> None:
    check = Check(stage, "a", "b", "--no-tcp-after-setup")
    check.more()
    checkpoint(check.server.node, check.server.name, tmp_path / "saved")
    wait_for("paused peers", lambda: {qp["mstate"] for qp in check.client.qps()} == {"paused"})
    restore(stage.lab.node("node-b"), tmp_path / "saved", ip=_free(4))
    check.server.home, check.server.ip = "node-b", _free(4)
    check.more()
    assert {qp["peer_gid"] for qp in check.client.qps()} == {_free(4)}
    check.finish()
