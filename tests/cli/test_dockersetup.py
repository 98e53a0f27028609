# SPDX-License-Identifier: BSD-3-Clause
"""What `migroce setup docker` does to a daemon.json: the user's settings stay, undoing gives them back."""

from __future__ import annotations

import http.server
import json
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from migroce import dockersetup, nodes
from migroce.dockersetup import Layout, merge, unmerge, wanted
from migroce.errors import MigroceError
from migroce.runtime import launcher

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
    [
        ("{", "is no JSON"),
        ('{"debug": true} // mine', "has a comment in line 1, which dockerd does not take either"),
        ('{"debug": true, # mine\n "bip": ""}', "has a comment in line 1"),
        ('{\n /* mine */ "debug": true}', "has a comment in line 2"),
        ('{"debug": "http://x" x}', "is no JSON"),
        ("[" * 100000, "is no JSON"),
        ("[]", "no JSON object"),
        ('{"runtimes": 3}', '"runtimes" is no object'),
    ],
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


# -- the whole of it, with a Docker and a systemctl that are not real ---------------------------------------


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with a `systemctl` that writes down what it was asked, and a `docker` whose daemon is away."""
    bin_, log = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    for name, text in (("systemctl", f'echo "$*" >>{log}'), ("docker", "exit 1")):
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("MIGROCE_CRIU", "/bin/true")
    monkeypatch.setattr(dockersetup, "_daemon_pid", lambda _: None)
    return log


def _layout(tmp_path: Path, *, systemd: bool = False) -> Layout:
    layout = Layout(tmp_path / "root")
    layout.daemon.parent.mkdir(parents=True)
    if systemd:
        (layout.root / "run/systemd/system").mkdir(parents=True)
    return layout


WRITTEN = [
    b'{"dns":["192.0.2.1"],\t"runtimes": { "mine" : {"path":"/mine"}},\r\n"default-runtime":"mine"}',
    b'{\n    "experimental": false\n}\n\n',
    '{"labels": ["caf\u00e9=\\u00e9"], "features": {}, "runtimes": {}}'.encode(),
    b"",
    None,
]


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.usefixtures("calls")
def test_undoing_gives_back_the_file_byte_for_byte(tmp_path: Path, text: bytes | None, default: bool) -> None:
    layout = _layout(tmp_path)
    if text is not None:
        layout.daemon.write_bytes(text)
        layout.daemon.chmod(0o600)
    before = {path for path in layout.root.rglob("*") if path.is_file()}
    dockersetup.apply(layout, default=False)
    dockersetup.apply(layout, default=default)  # twice, as users do: the first file is what counts
    assert json.loads(layout.daemon.read_text())["experimental"] is True
    dockersetup.undo(layout)
    assert {path for path in layout.root.rglob("*") if path.is_file()} == before
    if text is not None:
        assert layout.daemon.read_bytes() == text
        assert layout.daemon.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("calls")
def test_undoing_keeps_what_the_user_has_written_since(tmp_path: Path) -> None:
    layout = _layout(tmp_path)
    layout.daemon.write_text('{"debug":true}')
    dockersetup.apply(layout)
    now = json.loads(layout.daemon.read_text())
    layout.daemon.write_text(json.dumps({**now, "dns": ["192.0.2.1"]}))
    dockersetup.apply(layout, default=True)  # and sets up more after that
    dockersetup.undo(layout)
    assert json.loads(layout.daemon.read_text()) == {"debug": True, "dns": ["192.0.2.1"]}


def test_with_systemd_the_agent_is_a_service_that_undoing_ends(tmp_path: Path, calls: Path) -> None:
    layout = _layout(tmp_path, systemd=True)
    dockersetup.apply(layout)
    assert calls.read_text().splitlines() == ["daemon-reload", "enable --now migroce-agent.service"]
    dockersetup.apply(layout)
    assert len(calls.read_text().splitlines()) == 2  # it is so already
    calls.write_text("")
    dockersetup.undo(layout)
    assert calls.read_text().splitlines() == ["disable --now migroce-agent.service", "daemon-reload"]
    assert not layout.unit.exists()


@pytest.mark.parametrize("systemd", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_docker_is_restarted_only_if_that_is_asked_for(
    tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool, restart: bool
) -> None:
    layout = _layout(tmp_path, systemd=systemd)
    info = {"ServerVersion": "20.10.24", "ExperimentalBuild": False}
    monkeypatch.setattr(dockersetup, "docker_info", lambda: info)
    outcome = dockersetup.apply(layout, restart=restart)
    restarted = "restart docker" in calls.read_text().splitlines()
    assert restarted == (systemd and restart)
    todo = "\n".join(outcome.todo)
    assert ("experimental" in todo) == (not restarted)
    assert ("systemctl restart docker" in todo) == (systemd and not restart)


def test_a_failing_systemctl_is_said_with_its_own_words(tmp_path: Path, calls: Path) -> None:
    layout = _layout(tmp_path, systemd=True)
    (calls.parent / "bin/systemctl").write_text("#!/bin/sh\necho Access denied >&2\nexit 4\n")
    with pytest.raises(MigroceError, match="systemctl daemon-reload: Access denied"):
        dockersetup.apply(layout)


class _Daemon(socketserver.ThreadingUnixStreamServer):
    """Answers as a dockerd does whose daemon.json was given `experimental` by a reload, or (`on`) before."""

    daemon_threads = True

    def __init__(self, path: Path, on: bool) -> None:
        experimental = str(on).lower()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                about = {"ServerVersion": "20.10.24", "ApiVersion": "1.41", "ExperimentalBuild": True}
                body = json.dumps(about).encode()
                self.send_response(200)
                self.send_header("Docker-Experimental", experimental)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

            def address_string(self) -> str:
                return "-"

        super().__init__(str(path), Handler)


@pytest.mark.parametrize("on", [True, False])
def test_experimental_counts_from_dockerd_s_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    """After a reload `docker info` already says true."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/d")
    with _Daemon(tmp_path / "d", on) as daemon:
        thread = threading.Thread(target=daemon.serve_forever)
        thread.start()
        try:
            found = dockersetup.docker_info()
        finally:
            daemon.shutdown()
            thread.join()
    assert found is not None
    assert found["ExperimentalBuild"] is on


def test_over_ssh_the_interpreter_of_the_setup_is_taken(tmp_path: Path) -> None:
    """An installation in a .venv works without `?python=`; without a set-up it is python3."""
    layout = Layout(tmp_path)
    script = nodes._FIND_PYTHON.replace("/usr/local/lib/migroce", str(layout.programs))

    def taken() -> str:
        argv = ["sh", "-c", script, "sh", "-c", "import sys; print(sys.executable)"]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    layout.programs.mkdir(parents=True)
    other = tmp_path / "venv-python"
    other.write_text("#!/bin/sh\necho of the setup\n")
    other.chmod(0o755)
    launcher.write(layout.programs / launcher.NAME)
    assert Path(taken()) == Path(sys.executable)
    (layout.programs / launcher.NAME).write_text(f"#!{other} -IS\n")
    assert taken() == "of the setup"
    other.unlink()
    assert taken().rpartition("/")[2].startswith("python3")
