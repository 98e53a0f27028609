# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's own live migration by RDMA, while the containers of both QEMUs are being moved."""

from __future__ import annotations

import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.stage import Box, Stage, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

MIB = 1 << 20
DATA = 32 * MIB
"""Bytes of the guest's memory that are random; the rest is zero, and travels as a word about it."""
AT = 32 * MIB
"""Where in the guest's memory they are."""
SLOWLY = 2 * MIB
"""Bytes a second, until the containers have been moved."""
MACHINE = (
    "exec qemu-system-x86_64 -accel tcg -m 128 -nodefaults -display none -S "
    "-qmp unix:/qmp,server=on,wait=off "
)


def ask(box: Box, command: str, **arguments: object) -> Any:
    """A command of QEMU's monitor, and what it returned."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(60)
        monitor.connect(str(box.file("/qmp")))
        with monitor.makefile("rw") as lines:

            def one(name: str, given: dict[str, object]) -> Any:
                lines.write(json.dumps({"execute": name, "arguments": given}) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
                assert "return" in answer, f"{name}: {answer}"
                return answer["return"]

            lines.readline()  # its greeting
            one("qmp_capabilities", {})
            return one(command, arguments)


def test_a_guest_is_migrated_by_rdma_between_containers_that_move(stage: Stage, tmp_path: Path) -> None:
    """Each end and both at once, in the middle of it; every byte of the guest's is compared."""
    data = os.urandom(DATA)
    (tmp_path / "data").write_bytes(data)
    loaded = f"-device loader,file=/data,addr={AT},force-raw=on"
    source = stage.box("qemu", "a", ["sh", "-c", MACHINE + loaded], files={"/data": str(tmp_path / "data")})
    target = stage.box("qemu", "b", ["sh", "-c", f"{MACHINE} -incoming rdma:0:4444"])
    boxes = (source, target)
    for box in boxes:
        wait_for("QEMU's monitor", lambda box=box: box.file("/qmp").exists())  # type: ignore[misc]
    ask(source, "migrate-set-parameters", **{"max-bandwidth": SLOWLY})
    ask(source, "migrate", uri=f"rdma:{target.ip}:4444")

    def state() -> dict[str, Any]:
        found = dict(ask(source, "query-migrate"))
        assert found["status"] in ("setup", "active", "device", "completed"), found
        return found

    wait_for("the beginning", lambda: state().get("ram", {}).get("transferred", 0) > MIB)
    for moving in ([source], [target], [source, target], [source, target]):
        assert state()["status"] == "active"
        before = source.packets()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(box.move) for box in moving]:
                assert done.result().warnings == []
        wait_for("traffic", lambda before=before: source.packets() > before + 20)  # type: ignore[misc]
    ask(source, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    wait_for("the migration's end", lambda: state()["status"] == "completed")
    ask(target, "pmemsave", val=AT, size=DATA, filename="/arrived")
    assert target.file("/arrived").read_bytes() == data
    for box in boxes:
        ask(box, "quit")
        assert box.wait() == 0, box.log()
