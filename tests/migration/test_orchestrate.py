# SPDX-License-Identifier: BSD-3-Clause
"""Whatever call fails, once or for ever: the container ends up on one node, and the error says where."""

from __future__ import annotations

import errno
from typing import Any, cast

import pytest
from tests.migration.fakes import FakeNode, World

from migroce.errors import EngineError, MigrationError, MigroceError
from migroce.migration import orchestrate
from migroce.migration.journal import PHASES
from migroce.migration.orchestrate import ContainerLostError, Migration
from migroce.migration.report import Event, Report
from migroce.nodes import Node


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries until they succeed or three times: no clock."""

    def retry(work: Any, _: float = 0) -> Any:
        for _ in range(2):
            try:
                return work()
            except MigroceError:
                pass
        return work()

    monkeypatch.setattr(orchestrate, "retry", retry)


def _migration(world: World, events: list[Event] | None = None, **options: Any) -> Migration:
    source, destination = (cast("Node", FakeNode(world, kind)) for kind in ("source", "destination"))
    progress = (lambda _: None) if events is None else events.append
    return Migration("c", source, destination, progress, **options)


def _calls(**options: Any) -> list[str]:
    world = World()
    _migration(world, **options).run()
    return world.calls


def test_a_move_goes_through_its_phases_and_ends_at_the_destination() -> None:
    world, events = World(), list[Event]()
    report = _migration(world, events).run()
    assert world.runs_on() == ["destination"]
    assert not world.here
    assert world.phases == list(PHASES[2:])  # check and prepare come before the journal
    assert [event.phase for event in events if event.state == "done"] == list(PHASES)
    assert (report.contexts, report.qps, report.images_bytes) == (1, 1, 100)
    assert report.layer_rest_bytes == 200  # layer-rest and shm
    assert report.bytes_moved == 100 + 300 + 100
    assert report.retransmissions == 4
    assert report.qps_again == [
        {"qpn": 5, "peer": "10.0.1.3", "peer_qpn": 6, "sent_again": 4, "received_again": 0,
         "peer_sent_again": 14},
    ]


def test_a_container_without_the_device_is_moved_without_a_word_to_the_agents() -> None:
    world = World(device=False)
    report = _migration(world).run()
    assert world.runs_on() == ["destination"]
    assert report.retransmissions is None
    assert not {"source.stop", "destination.resume", "destination.prepare_rdma"} & set(world.calls)


def test_the_source_falls_silent_before_the_destination_speaks() -> None:
    calls = _calls()
    assert calls.index("source.leave") < calls.index("destination.plug")
    assert calls.index("destination.commit") < calls.index("source.commit")


def test_at_a_new_address_the_old_one_points_there_until_peers_know() -> None:
    world = World()
    report = _migration(world, ip="10.0.1.9").run()
    assert (report.ip, world.moved_to) == ("10.0.1.9", "10.0.1.9")
    assert not world.unplugged
    assert world.calls.index("destination.settle") < world.calls.index("source.commit")


@pytest.mark.parametrize("force", [False, True])
def test_a_peer_that_would_not_follow_keeps_a_container_from_changing_its_address(force: bool) -> None:
    world = World()
    world.qps[0]["peer_capable"] = False
    move = _migration(world, ip="10.0.1.9", force=force)
    if force:
        assert move.run().ip == "10.0.1.9"
        return
    with pytest.raises(MigrationError, match="cannot take their peers along"):
        move.run()
    assert world.runs_on() == ["source"]
    assert not world.opened


CALLS = sorted(set(_calls()))


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "for_ever"])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_call_leaves_the_container_on_one_node(call: str, times: int) -> None:
    world = World()
    left = [times]

    def fault(side: str, method: str) -> None:
        if f"{side}.{method}" == call and left[0]:
            left[0] -= 1
            raise EngineError("somewhere", "this was ordered", "order something else")

    world.fault = fault
    error: MigrationError | None = None
    report: Report | None = None
    try:
        report = _migration(world).run()
    except MigrationError as exc:
        error = exc
    if error is None:
        assert report is not None
        assert world.runs_on() == ["destination"]
        return
    assert "this was ordered" in str(error)
    # What is not over is left to `recover`, which would wait for the end of a command that says nothing.
    assert world.ended or world.given_up or not world.opened or call == "source.give_up"
    if error.running_on is None:
        # Only where what was ordered makes it impossible to know or to bring it back; never two of them.
        assert times > 1
        assert len(world.runs_on()) <= 1
    elif error.running_on == "node-destination":
        assert times > 1  # arrived, but could not be told: to be finished by `recover`
        assert "recover" in str(error)
        assert "source" not in world.runs_on()
    else:
        assert world.runs_on() == ["source"]
        assert "runs on node-source as before" in str(error)
        assert not world.restored


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_is_passed_on_and_leaves_the_container_on_one_node(phase: str) -> None:
    world = World()

    def progress(event: Event) -> None:
        if (event.phase, event.state) == (phase, "start"):
            raise KeyboardInterrupt

    source, destination = (cast("Node", FakeNode(world, kind)) for kind in ("source", "destination"))
    with pytest.raises(KeyboardInterrupt):
        Migration("c", source, destination, progress).run()
    assert len(world.runs_on()) == 1


def test_the_nodes_must_be_two() -> None:
    world = World()
    node = cast("Node", FakeNode(world, "source"))
    with pytest.raises(MigrationError, match="on node-source already"):
        Migration("c", node, node).run()
    assert world.runs_on() == ["source"]


def test_when_the_destination_hangs_up_the_error_is_what_it_says() -> None:
    world = World()

    def fault(side: str, method: str) -> None:
        if (side, method, world.frozen) == ("source", "push", True):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        if (side, method, world.frozen) == ("destination", "received", True):
            raise EngineError("transfer", "images could not be stored on node-b: No space left on device")

    world.fault = fault
    with pytest.raises(MigrationError, match="No space left on device") as caught:
        _migration(world).run()
    assert caught.value.running_on == "node-source"
    assert world.runs_on() == ["source"]


def test_a_container_that_is_gone_is_said_to_be_and_the_move_has_ended() -> None:
    world = World()
    world.lost = True

    def fault(side: str, method: str) -> None:
        if (side, method) == ("source", "dump"):
            raise EngineError("dump", "Docker has ended")

    world.fault = fault
    with pytest.raises(ContainerLostError, match=r"start it again.*Docker has ended") as caught:
        _migration(world).run()
    assert caught.value.running_on is None
    assert (world.ended, world.runs_on()) == ("lost", [])
