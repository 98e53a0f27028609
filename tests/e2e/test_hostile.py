# SPDX-License-Identifier: BSD-3-Clause
"""Containers move while somebody beside them sends every kind of nonsense to both ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from tests.e2e.stage import Box, Check, Stage, wait_for
from tests.e2e.test_rdmacm import Connection
from tests.native.netns import Node
from tests.workload.adversary import Adversary

from migroce.migration.report import Event

pytestmark = pytest.mark.slow
ROUND, PAUSE = 40, 0.01
"""Packets at a time, seconds between: some thousand in a second leave the programs a part of the machine."""


class Harassment:
    """An adversary at work, in a container of his own, until the block ends."""

    def __init__(self, adversary: Adversary) -> None:
        self._adversary = adversary
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._fault: BaseException | None = None
        self.away: list[int] = []
        """Packets that he sent during each move, from stop to resume."""
        self._stopped_at = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._fault:
            raise self._fault

    def sent(self) -> int:
        return self._adversary.sent.total()

    def _run(self) -> None:
        try:
            rounds = 0
            while not self._over.wait(PAUSE):
                self._adversary.read()
                self._adversary.attack(ROUND)
                rounds += 1
                if rounds % 20 == 0:
                    self._adversary.flood(ROUND)
        except BaseException as e:  # noqa: BLE001 - told by the thread that tests
            self._fault = e

    def move(self, box: Box) -> None:
        """Move a container, with nonsense before, meanwhile and afterwards."""
        self.more()
        assert box.move(progress=self._note).warnings == []
        self.more()

    def more(self) -> None:
        """Until he has sent more."""
        before = self.sent()
        wait_for("more nonsense", lambda: self._fault or self.sent() > before + 10 * ROUND)

    def _note(self, event: Event) -> None:
        if (event.phase, event.state) == ("stop", "done"):
            self._stopped_at = self.sent()
        elif (event.phase, event.state) == ("resume", "start"):
            self.away.append(self.sent() - self._stopped_at)


@contextlib.contextmanager
def _harassed(stage: Stage, ends: tuple[Box, Box], seed: int) -> Iterator[Harassment]:
    """Both ends attacked, by somebody who reads at both nodes."""
    beside = stage.box("adversary", "b", ["sleep", "1000"])
    nodes = [Node(Path(node.context.netns).name, "", "") for node in stage.lab.nodes.values()]
    own = Node(f"{Path(beside.node.context.netns).name}.{beside.name}", "eth0", beside.ip)
    with contextlib.closing(Adversary(nodes, {box.ip: own for box in ends}, beside.ip, seed)) as adversary:
        for box, peer in (ends, ends[::-1]):
            adversary.aim(peer.ip, box.ip)
        with Harassment(adversary) as harassment:
            yield harassment
        assert len(adversary.sent) >= 7, adversary.sent  # an eighth one copies packets of RC
    assert all(sent > ROUND for sent in harassment.away), harassment.away


def _rejected(box: Box) -> int:
    """Packets that the container's device has refused for what they were."""
    found = box.node.call("agent", method="ps", container=box.name)
    counters = [context["dump"]["counters"] for container in found for context in container["contexts"]]
    return sum(each[name] for each in counters for name in ("rx_bad_source", "resumes_refused", "rx_no_qp"))


@pytest.mark.parametrize("seed", [1, 2])
def test_every_message_is_right_after_moves_under_attack(stage: Stage, seed: int) -> None:
    check = Check(stage, "a", "b", "--seed", str(seed))
    with _harassed(stage, (check.server, check.client), seed) as harassment:
        for box in (check.server, check.server, check.client, check.server):
            check.more()
            harassment.move(box)
        check.more()
    assert len(harassment.away) == 4
    assert all(_rejected(box) > 0 for box in (check.server, check.client))
    check.finish()


@pytest.mark.parametrize("options", [(), ("--ud",)], ids=["RC", "UD"])
def test_connecting_by_rdma_cm_survives_moves_under_attack(stage: Stage, options: tuple[str, ...]) -> None:
    """Forged datagrams come to QP 1, of the living and of the stand-in: both are moved at every step."""
    c = Connection(stage, *options)
    with _harassed(stage, (c.server, c.client), 3) as harassment:
        for move, steps in (
            (c.server, [(c.client, "created", "addressed"), (c.client, "addressed", "routed")]),
            (c.client, [(c.client, "routed", "connecting"), (c.server, "listening", "arrived")]),
            (c.server, [(c.server, "arrived", "request"), (c.server, "request", "accepted")]),
            (c.client, [(c.client, "connecting", "answered"), (c.client, "answered", "established")]),
            (c.server, [(c.server, "accepted", "established")]),
        ):
            harassment.move(move)
            for step in steps:
                c.on(*step)
        harassment.move(c.client)
        c.finish(client="established", server="established")
    assert len(harassment.away) == 6
