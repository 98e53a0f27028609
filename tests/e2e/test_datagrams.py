# SPDX-License-Identifier: BSD-3-Clause
"""Moves of what has no acknowledgements: UD with address handles and multicast, UC."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.e2e.perftest import Run, start
from tests.e2e.stage import Box, Stage, built, wait_for

from migroce.errors import EngineError

GROUP = "239.4.3.2"
GROUP6 = "ff0e::432"
SERVER6, CLIENT6 = "fd01::2", "fd01::3"


class Datagrams:
    """A server and a client of udcheck: the client asks again for what was lost. `six`: over IPv6."""

    def __init__(self, stage: Stage, *, six: bool = False) -> None:
        program = "/usr/local/bin/udcheck"
        files = {program: str(built("tests/workload/udcheck"))}
        own = [program, "--group", GROUP6 if six else GROUP, "-x", "2" if six else "1"]
        own += ["--progress", "/progress"]
        server, client = ({"ip6": SERVER6}, {"ip6": CLIENT6}) if six else ({}, {})
        self.server = stage.box("ud-server", "a", own, files=files, **server)
        wait_for("the server", lambda: self.progress(self.server).get("state") == "listening")
        self.client = stage.box("ud-client", "b", [*own, self.server.ip], files=files, **client)
        self.more()

    @staticmethod
    def progress(box: Box) -> dict[str, Any]:
        """The counters that udcheck keeps in a file."""
        try:
            return dict(json.loads(box.file("/progress").read_text()))
        except (OSError, ValueError):
            return {}

    def more(self) -> None:
        """Wait for more answers, some of them to what went to the group."""

        def counts() -> tuple[int, int]:
            now = self.progress(self.client)
            return now.get("received", 0), now.get("by_group", 0)

        received, by_group = counts()
        wait_for("answers", lambda: counts() >= (received + 100, 0) and counts()[1] >= by_group + 20)

    def finish(self) -> None:
        """End both and see that nothing was wrong."""
        for box in (self.client, self.server):
            box.kill()
            assert box.wait() == 0, box.log()
            verdict = json.loads(box.log().strip().splitlines()[-1])
            assert (verdict["state"], verdict["errors"]) == ("done", 0)


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_datagrams_go_on_after_moves_of_server_and_client(stage: Stage, six: bool) -> None:
    """Address handles, receive queue, membership in a group and addresses are there after a move."""
    check = Datagrams(stage, six=six)
    for box in (check.server, check.client, check.server):
        report = box.move()
        assert report.qps == 1
        assert report.warnings == []
        check.more()
    check.finish()


def test_an_ipv6_address_that_is_in_use_is_refused(stage: Stage) -> None:
    """Asked for by neighbour discovery, on whichever node it is."""
    stage.box("holder", "b", ["sleep", "600"], ip6=SERVER6)
    with pytest.raises(EngineError, match=f"address {SERVER6} is in use by 02:6d:"):
        stage.box("other", "a", ["sleep", "600"], ip6=SERVER6)
    with pytest.raises(EngineError, match="fd01::zz is no IPv6 address"):
        stage.box("third", "a", ["sleep", "600"], ip6="fd01::zz")


def test_a_move_shows_handles_and_groups(stage: Stage) -> None:
    """What the agent tells of a process: its UD QP, address handles and groups."""
    check = Datagrams(stage)
    found = check.server.node.call("agent", method="ps", container=check.server.name)
    dump = found[0]["contexts"][0]["dump"]
    assert [qp["type"] for qp in dump["qps"]] == ["UD"]
    assert dump["mcasts"] == [{"gid": GROUP, "qpn": dump["qps"][0]["qpn"]}]
    client = check.client.node.call("agent", method="ps", container=check.client.name)
    assert sorted(ah["dgid"] for ah in client[0]["contexts"][0]["dump"]["ahs"]) == sorted(
        [check.server.ip, GROUP]
    )
    check.finish()


def test_uc_writes_go_on_after_moves_of_both_ends(stage: Stage) -> None:
    """ib_write_bw -c UC ends well; what it writes while its peer is stopped is lost, as UC may."""
    run: Run = start(stage, "ib_write_bw, UC for a while", 0)
    run.server.move()
    run.server.wait_for_traffic()
    run.client.move()
    run.server.wait_for_traffic()
    run.finish()
