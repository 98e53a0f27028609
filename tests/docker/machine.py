# SPDX-License-Identifier: BSD-3-Clause
"""node-b as a machine that is reached by ssh or by a docker context, and that knows nothing of a lab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docker.stage import Box, Stage
from tests.e2e.sshd import Keys, Sshd, serve

HOST = "192.168.77.2"


class Machine:
    """node-b with an sshd; who logs in finds its Docker and agent where they are on a machine of its own."""

    def __init__(self, stage: Stage, where: Path) -> None:
        self.stage, self.keys, self.where = stage, Keys(where), where
        there = stage.lab.node("b").context
        self.sshd: Sshd
        (self.sshd,) = serve(
            stage.lab, self.keys, ("b",), "a",
            {
                "DOCKER_HOST": str(there.docker_host), "MIGROCE_ADMIN": str(there.agent),
                "MIGROCE_RUN_DIR": str(where / "run"),
                "HOME": str(where),  # no ~/.bashrc with another PATH
                "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            },
        )  # fmt: skip
        context = ["docker", "context", "create", "other", "--docker", f"host=ssh://root@{HOST}"]
        stage.lab.node("a").run(context, env={"DOCKER_CONFIG": str(where / "config")})

    def migroce(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Type a command on node-a."""
        env["PATH"] = f"{self.keys.bin}:{os.environ['PATH']}"
        env["DOCKER_CONFIG"] = str(self.where / "config")
        argv = self.stage.lab.node("a").command([sys.executable, "-m", "migroce", *args], env)
        return subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)

    def move(self, box: Box, to: str, **env: str) -> str:
        """`migroce migrate` from where the box is; what the command says if it fails."""
        here = f"{self.stage.lab.name}/node-a"
        from_, to = (here, to) if box.home == "node-a" else (to, here)
        done = self.migroce("migrate", box.name, "--from", from_, "--to", to, **env)
        assert done.returncode in (0, 1), done.stderr
        if done.returncode == 0:
            box.home = box.other()
        return " ".join(done.stderr.split())
