# SPDX-License-Identifier: BSD-3-Clause
"""`migroce run`: the program gets the device and keeps everything else of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migroce import launch, paths
from migroce.agent.client import AgentClient, AgentError
from migroce.errors import MigroceError

from .conftest import Migroce


@pytest.fixture(autouse=True)
def _end_agent(run_dir: Path) -> Iterator[None]:
    yield
    try:
        with AgentClient(run_dir / "admin.sock") as client:
            client.shutdown()
    except AgentError:
        pass


def test_the_exit_status_is_the_programs(migroce: Migroce) -> None:
    assert migroce("run", "--", "sh", "-c", "exit 7").returncode == 7


def test_the_programs_output_is_untouched(migroce: Migroce) -> None:
    assert migroce("run", "--no-agent", "--", "printf", "%s", "a b").stdout == "a b"


def test_options_after_the_program_are_the_programs(migroce: Migroce) -> None:
    assert migroce("run", "--no-agent", "echo", "--help", "-n").stdout == "--help -n\n"


def test_the_device_is_there(migroce: Migroce) -> None:
    done = migroce("run", "--iface", "lo", "--", "ibv_devices")
    assert done.returncode == 0, done.stderr
    assert "rxe0" in done.stdout


def test_a_second_program_uses_the_same_agent(migroce: Migroce, run_dir: Path) -> None:
    migroce("run", "--", "true")
    with AgentClient(run_dir / "admin.sock") as client:
        first = client.status()["pid"]
    migroce("run", "--", "true")
    with AgentClient(run_dir / "admin.sock") as client:
        assert client.status()["pid"] == first


def test_without_agent_none_is_started(migroce: Migroce, run_dir: Path) -> None:
    assert migroce("run", "--no-agent", "--", "true").returncode == 0
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [
        ("no-such-program", 127, "not on PATH"),
        ("/no/such", 127, "not a file"),
        ("/etc/passwd", 126, "not executable"),
    ],
)
def test_a_program_that_cannot_be_run_is_named(
    program: str, status: int, words: str, migroce: Migroce
) -> None:
    done = migroce("run", "--no-agent", "--", program)
    assert done.returncode == status
    assert program in done.stderr
    assert words in done.stderr


def test_a_foreign_run_directory_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "shared"
    mine.mkdir()
    mine.chmod(0o777)
    with pytest.raises(MigroceError, match="not a directory of yours alone"):
        launch.private_directory(mine)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(MigroceError):
        launch.private_directory(link)


def test_the_library_is_preloaded_once_and_first() -> None:
    library = str(paths.library())
    env = launch.environment({"LD_PRELOAD": f"/a.so {library}:/b.so"}, None, {"MIGROCE_ADDR": "10.0.0.1"})
    assert env["LD_PRELOAD"] == f"{library}:/a.so:/b.so"
    assert env["MIGROCE_ADDR"] == "10.0.0.1"
    assert not Path(env["MIGROCE_AGENT"]).exists()


def test_an_agent_that_cannot_start_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    (run_dir / "state.json").mkdir()  # where the agent wants to write
    (run_dir / "agent.lock").mkdir()
    with pytest.raises(MigroceError, match="the agent did not start: "):
        launch.ensure_agent(run_dir)


@pytest.mark.root
def test_two_programs_share_the_address(run_dir: Path) -> None:
    script = f"""
        ip link set lo up
        m="{sys.executable} -m migroce run --iface lo --"
        $m ib_send_bw -d rxe0 -n 2000 & server=$!
        until grep -q ':4853 .* 0A' /proc/net/tcp /proc/net/tcp6; do read -t 0.01 _ < <(:) || true; done
        $m ib_send_bw -d rxe0 -n 2000 127.0.0.1 || exit 3
        wait $server || exit 4
    """
    env = {**os.environ, "MIGROCE_RUN_DIR": str(run_dir)}
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("65536      2000") == 2


@pytest.mark.root
def test_ps_shows_programs_that_run_without_a_container(run_dir: Path) -> None:
    script = f"""
        ip link set lo up
        {sys.executable} -m migroce run --iface lo -- ib_send_bw -d rxe0 -p 18600 & server=$!
        until grep -q ':48A8 .* 0A' /proc/net/tcp /proc/net/tcp6; do read -t 0.01 _ < <(:) || true; done
        {sys.executable} -m migroce ps --on local
        kill $server
    """
    env = {**os.environ, "MIGROCE_RUN_DIR": str(run_dir), "NO_COLOR": "1"}
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "ib_send_bw (pid" in done.stdout, done.stdout + done.stderr
