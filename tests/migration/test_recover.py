# SPDX-License-Identifier: BSD-3-Clause
"""A command that died at any phase: `recover` finishes or undoes, and never both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.migration.fakes import FakeNode, World

from migroce.engines.context import NodeContext
from migroce.engines.oci import stat_fields
from migroce.errors import MigrationError, NodeError
from migroce.migration import orchestrate, recover
from migroce.migration.journal import PHASES, Journal, Record
from migroce.migration.orchestrate import ContainerLostError

LATER = PHASES[2:]


class Left:
    """What a dead command leaves: a journal, and a world as it was when `phase` had begun."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ctx = NodeContext(name="n", state=tmp_path, runc_root=tmp_path / "runc", cgroup="test")
        self.world = World()
        self.reachable = True
        monkeypatch.setattr(recover, "resolve", self._resolve)
        monkeypatch.setattr(orchestrate, "retry", lambda work, _=0: work())

    def _resolve(self, spec: str) -> Any:
        if spec == "node-destination" and not self.reachable:
            raise NodeError("connect", "node-destination cannot be reached")
        return FakeNode(self.world, spec.removeprefix("node-"))

    def at(self, phase: str, **more: Any) -> Path:
        """The journal, and the world in that state."""
        world, done = self.world, PHASES.index(phase)
        world.opened = world.prepared = True
        world.stopped = done >= PHASES.index("stop")
        world.frozen = done >= PHASES.index("dump")
        world.restored = done >= PHASES.index("resume")
        world.unplugged = world.plugged = world.resumed = done >= PHASES.index("commit")
        record = Record(
            id="m1", kind="migrate", container="c", source="node-source", destination="node-destination",
            phase=phase, device=True, **more,
        )  # fmt: skip
        own = Journal.create(self.ctx, record)
        own.close()
        return own.path


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Left:
    """A node on which commands die."""
    return Left(tmp_path, monkeypatch)


@pytest.mark.parametrize("phase", LATER)
def test_a_command_that_died_leaves_the_container_on_one_node(left: Left, phase: str) -> None:
    said = recover.recover(left.at(phase))
    finished = phase in ("resume", "commit")
    assert left.world.runs_on() == (["destination"] if finished else ["source"])
    assert said == ("c runs on node-destination" if finished else "c runs on node-source as before")
    assert left.world.here is not finished


@pytest.mark.parametrize("phase", LATER)
def test_without_the_destination_only_what_it_cannot_have_told_is_undone(left: Left, phase: str) -> None:
    path = left.at(phase)
    left.reachable = False
    if phase in ("resume", "commit"):
        with pytest.raises(MigrationError, match="make it reachable and try again"):
            recover.recover(path)
        assert left.world.runs_on() == []
        return
    assert recover.recover(path) == "c runs on node-source as before"
    assert left.world.runs_on() == ["source"]


def test_a_container_that_did_not_arrive_goes_back(left: Left) -> None:
    path = left.at("resume")
    left.world.restored = False
    recover.recover(path)
    assert left.world.runs_on() == ["source"]


def test_at_a_new_address_the_old_one_points_there(left: Left) -> None:
    recover.recover(left.at("resume", ip="10.0.1.9"))
    assert left.world.moved_to == "10.0.1.9"
    assert "destination.settle" in left.world.calls


def test_a_checkpoint_is_undone(left: Left) -> None:
    left.world.frozen = left.world.stopped = True
    record = Record(
        id="m2", kind="checkpoint", container="c", source="node-source", destination="/x", phase="transfer"
    )
    own = Journal.create(left.ctx, record)
    own.close()
    assert recover.recover(own.path) == "c runs on node-source as before"
    assert left.world.runs_on() == ["source"]


def test_what_has_ended_or_is_gone_is_left_alone(left: Left) -> None:
    assert "has ended" in recover.recover(left.ctx.migrations / "none" / "journal.json")
    assert "undone" in recover.recover(left.at("dump", ended="undone"))
    left.world.ended = "done"  # by somebody else, between our look and our lock
    assert left.world.calls == []


def test_a_living_owner_gets_its_time(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = stat_fields(os.getpid())
    assert fields is not None
    path = left.at("dump", owner=os.getpid(), owner_start=fields[1])
    looks = []

    def look(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:  # the owner has brought it to an end itself
            own = Journal.adopt(path, wait=False)
            assert own is not None
            own.update(ended="undone")
            own.close()
            left.world.ended = "undone"

    monkeypatch.setattr("migroce.migration.recover.time.sleep", look)
    assert "has ended meanwhile" in recover.recover(path)
    assert "source.undo" not in left.world.calls


def test_all_orphans_of_a_node_are_recovered_and_errors_are_told(left: Left) -> None:
    left.at("resume")
    left.reachable = False
    said = recover.recover_all(left.ctx)
    assert len(said) == 1
    assert "whether c runs there is not known" in said[0]


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["a", "b"], 2), (["/nonexistent/journal.json"], 0)])
def test_the_command_line(argv: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert recover.main(argv) == status
    out, err = capsys.readouterr()
    assert ("usage" in err) == (status == 2)
    assert bool(out) == (status == 0)


def test_a_container_that_is_gone_is_recovered_once(left: Left) -> None:
    path = left.at("dump")
    left.world.lost = True
    with pytest.raises(
        ContainerLostError, match="c on node-source are gone; start it again"
    ):
        recover.recover(path)
    assert left.world.calls.count("source.undo") == 1
    assert "nothing to recover" in recover.recover(path)
