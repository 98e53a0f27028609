# SPDX-License-Identifier: BSD-3-Clause
"""`migroce inject`: any OCI bundle gets the device, and can be rid of it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from migroce import inject, launch
from migroce.agent.client import AgentClient
from migroce.errors import MigroceError


@pytest.fixture
def agent(run_dir: Path) -> Iterator[Path]:
    launch.ensure_agent(run_dir)
    yield run_dir / "admin.sock"
    with AgentClient(run_dir / "admin.sock") as client:
        client.shutdown()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    made = tmp_path / "bundle"
    (made / "rootfs").mkdir(parents=True)
    config = {
        "process": {"args": ["true"], "env": ["PATH=/bin", "LD_PRELOAD=/other.so"]},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    }
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_a_bundle_gets_the_device_and_loses_it_again(bundle: Path, agent: Path) -> None:
    before = json.loads((bundle / "config.json").read_text())
    directory = inject.add(bundle, "box", agent)
    inject.add(bundle, "box", agent)  # again changes nothing
    config = json.loads((bundle / "config.json").read_text())
    assert (directory / "agent.sock").is_socket()
    assert (bundle / "rootfs/usr/lib/migroce/libmigroce.so").is_file()
    assert "LD_PRELOAD=/usr/lib/migroce/libmigroce.so:/other.so" in config["process"]["env"]
    (mount,) = [m for m in config["mounts"] if m["destination"] == "/run/migroce"]
    assert mount["source"] == str(directory)
    assert {"bind", "ro"} <= set(mount["options"])
    inject.remove(bundle, "box", agent)
    assert json.loads((bundle / "config.json").read_text()) == before
    assert not (bundle / "rootfs/usr/lib/migroce/libmigroce.so").exists()
    with AgentClient(agent) as client:
        assert client.status()["containers"] == []


def test_a_link_that_the_container_has_put_there_is_not_followed(
    bundle: Path, agent: Path, tmp_path: Path
) -> None:
    inject.add(bundle, "box", agent)
    outside = tmp_path / "usr/lib/migroce/libmigroce.so"
    outside.parent.mkdir(parents=True)
    outside.touch()
    (bundle / "rootfs/usr").rename(bundle / "rootfs/was")
    (bundle / "rootfs/usr").symlink_to(tmp_path / "usr")
    inject.remove(bundle, "box", agent)
    assert outside.exists()
    with pytest.raises(MigroceError, match="usr/lib in it a plain directory"):
        inject.add(bundle, "box", agent)


def test_what_is_no_bundle_is_refused(tmp_path: Path, agent: Path) -> None:
    with pytest.raises(MigroceError, match="no OCI bundle"):
        inject.add(tmp_path, "box", agent)
    (tmp_path / "config.json").write_text('{"process": {}}')
    with pytest.raises(MigroceError, match="root file system, is not there"):
        inject.add(tmp_path, "box", agent)
