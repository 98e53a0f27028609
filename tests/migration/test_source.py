# SPDX-License-Identifier: BSD-3-Clause
"""The source's side of a migration, without a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migroce.engines.context import NodeContext
from migroce.engines.oci import stat_fields
from migroce.migration import journal
from migroce.migration.journal import Journal, Record
from migroce.migration.source import SourceSide


@pytest.mark.parametrize("had", [True, False], ids=["by_us", "by_another_worker"])
def test_what_a_living_command_gives_up_is_recovered_at_once(tmp_path: Path, *, had: bool) -> None:
    ctx = NodeContext(name="n", state=tmp_path, runc_root=tmp_path / "runc", cgroup="test")
    fields = stat_fields(os.getpid())
    assert fields is not None
    record = Record(
        id="m1", kind="migrate", container="c", source=f"state:{tmp_path}/none", destination="",
        owner=os.getpid(), owner_start=fields[1],
    )  # fmt: skip
    own = Journal.create(ctx, record)
    own.close()
    side = SourceSide(ctx, "m1", "c")
    if had:
        assert side.adopt()
    side.give_up()
    assert journal.orphans(ctx) == [own.path]
    assert side.recovery is not None
    assert side.recovery.wait(60) == 1  # there is no such source
    assert "recover: " in (side.where / "recover.log").read_text()


def test_what_has_ended_cannot_be_given_up(tmp_path: Path) -> None:
    ctx = NodeContext(name="n", state=tmp_path, runc_root=tmp_path / "runc", cgroup="test")
    own = Journal.create(ctx, Record("m1", "migrate", "c", "node-a", "node-b", ended="undone"))
    own.close()
    side = SourceSide(ctx, "m1", "c")
    side.give_up()
    assert side.recovery is None
