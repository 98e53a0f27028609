# SPDX-License-Identifier: BSD-3-Clause
"""The journal: who works on a migration, how far it has come, what is left of old ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from migroce.engines.context import NodeContext
from migroce.errors import MigrationError
from migroce.migration import journal
from migroce.migration.journal import Journal, Record


@pytest.fixture
def ctx(tmp_path: Path) -> NodeContext:
    """A node whose state is below a directory of the test."""
    return NodeContext(name="n", state=tmp_path, runc_root=tmp_path / "runc", cgroup="test")


def _record(name: str = "m1", container: str = "c", **more: object) -> Record:
    fields = {"kind": "migrate", "source": "node-a", "destination": "node-b", **more}
    return Record(id=name, container=container, **fields)  # type: ignore[arg-type]


def test_what_is_noted_is_read_by_others(ctx: NodeContext) -> None:
    own = Journal.create(ctx, _record(ip="10.0.1.9", device=True))
    own.update(phase="dump")
    read = journal.read(own.path)
    assert (read.phase, read.ip, read.device, read.ended) == ("dump", "10.0.1.9", True, "")
    assert read.started > 0
    own.close()


@pytest.mark.parametrize(
    ("engine", "point"), [("oci", "resume"), ("docker", "restore")]
)
def test_from_one_phase_on_a_move_can_only_be_finished(engine: str, point: str) -> None:
    past = [phase for phase in journal.PHASES if _record(phase=phase, engine=engine).past_the_point()]
    assert past == list(journal.PHASES[journal.PHASES.index(point) :])


def test_a_container_is_in_one_migration_at_a_time(ctx: NodeContext) -> None:
    own = Journal.create(ctx, _record("m1"))
    with pytest.raises(MigrationError, match="c is being moved already"):
        Journal.create(ctx, _record("m2"))
    Journal.create(ctx, _record("m3", container="other")).close()
    own.close()
    with pytest.raises(MigrationError, match=r"c was left in the middle of a move.*recover"):
        Journal.create(ctx, _record("m2"))
    adopted = Journal.adopt(own.path, wait=False)
    assert adopted is not None
    adopted.update(ended="undone")
    adopted.close()
    Journal.create(ctx, _record("m2")).close()


def test_only_what_nobody_works_on_and_has_not_ended_is_an_orphan(ctx: NodeContext) -> None:
    held = Journal.create(ctx, _record("held", container="a"))
    left = Journal.create(ctx, _record("left", container="b"))
    left.close()
    ended = Journal.create(ctx, _record("ended", container="d"))
    ended.update(ended="done")
    ended.close()
    assert journal.orphans(ctx) == [left.path]
    assert Journal.adopt(held.path, wait=False) is None
    held.close()
    assert set(journal.orphans(ctx)) == {left.path, held.path}


def test_a_journal_that_is_gone_cannot_be_adopted(ctx: NodeContext) -> None:
    assert Journal.adopt(ctx.migrations / "none" / "journal.json", wait=False) is None
    assert not journal.locked(ctx.migrations / "none" / "journal.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": "x"}', '{"phase": "no such phase"}'])
def test_a_damaged_journal_is_one_sentence_and_is_passed_over_in_lists(ctx: NodeContext, text: str) -> None:
    own = Journal.create(ctx, _record())
    own.close()
    own.path.write_text(text)
    with pytest.raises(MigrationError, match=r"journal\.json is damaged"):
        journal.read(own.path)
    assert journal.journals(ctx) == []


def test_fields_of_later_programs_are_passed_over(ctx: NodeContext) -> None:
    own = Journal.create(ctx, _record())
    own.close()
    own.path.write_text(own.path.read_text().replace("{", '{"later": 1, ', 1))
    assert journal.read(own.path).container == "c"


def test_the_last_few_ended_migrations_are_kept_and_none_that_has_not(ctx: NodeContext) -> None:
    for number in range(journal.KEEP + 3):
        own = Journal.create(ctx, _record(f"m{number}", container=f"c{number}"))
        if number:
            own.update(ended="done")
        own.close()
    journal.prune(ctx)
    left = {path.parent.name for path, _ in journal.journals(ctx)}
    assert left == {"m0"} | {f"m{number}" for number in range(3, journal.KEEP + 3)}


def test_a_migrations_name_cannot_leave_its_directory(ctx: NodeContext) -> None:
    with pytest.raises(MigrationError, match="no migration's name"):
        journal.directory(ctx, "../x")
