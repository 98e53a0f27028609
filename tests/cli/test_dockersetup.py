# SPDX-License-Identifier: BSD-3-Clause
"""What `migroce setup docker` does to a daemon.json: the user's settings stay, undoing gives them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migroce import dockersetup
from migroce.dockersetup import Layout, merge, unmerge, wanted
from migroce.errors import MigroceError

CONFIGS: list[dict[str, Any]] = [
    {},
    {"log-driver": "journald", "dns": ["192.0.2.1"]},
    {"runtimes": {"other": {"path": "/o"}}, "default-runtime": "other", "features": {"buildkit": True}},
    {"runtimes": {"migroce": {"path": "/an/old/one"}}, "experimental": False, "features": {"cdi": False}},
    {"experimental": True, "features": {"cdi": True}},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("default", [False, True])
def test_undoing_gives_back_what_was_there(config: dict[str, Any], default: bool) -> None:
    settings = wanted(Path("/lib"), (26, 1), default=default)
    changed, notes = merge(config, settings)
    for keys, value in settings:
        assert dockersetup._get(changed, keys) == value
    assert {key: changed[key] for key in ("log-driver", "dns") if key in config} == {
        key: config[key] for key in ("log-driver", "dns") if key in config
    }
    assert merge(changed, settings) == (changed, [])
    assert unmerge(changed, json.loads(json.dumps(notes)))[0] == config


def test_what_was_changed_since_stays() -> None:
    changed, notes = merge({}, wanted(Path("/lib"), (20, 10), default=False))
    changed["experimental"] = False
    changed["runtimes"]["mine"] = {"path": "/m"}
    assert unmerge(changed, notes)[0] == {"experimental": False, "runtimes": {"mine": {"path": "/m"}}}


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "is no JSON"), ("[]", "no JSON object"), ('{"runtimes": 3}', '"runtimes" is no object')],
)
def test_a_daemon_json_that_is_not_understood_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setenv("MIGROCE_CRIU", "/bin/true")
    layout = Layout(tmp_path)
    layout.daemon.parent.mkdir(parents=True)
    layout.daemon.write_text(text)
    with pytest.raises(MigroceError, match=f"{why}.*nothing was changed"):
        dockersetup.apply(layout)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [layout.daemon]
    assert layout.daemon.read_text() == text
