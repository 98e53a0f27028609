# SPDX-License-Identifier: BSD-3-Clause
"""A disk by iSER: a target in user space (tgt) and QEMU's block layer (libiscsi), moved while in use."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.stage import Stage, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("tgtd", "qemu-io"))),
        reason="tgt, qemu-utils, qemu-block-extra are not installed",
    ),
]

TARGET = "iqn.2026-11.example.disk:one"
INITIATOR = "iqn.2026-11.example.user:one"
SERVER = f"""
truncate -s 64M /disk
(
	until tgtadm --lld iser --mode target --op new --tid 1 --targetname {TARGET}; do sleep 0.1; done
	tgtadm --lld iser --mode logicalunit --op new --tid 1 --lun 1 --backing-store /disk &&
	tgtadm --lld iser --mode target --op bind --tid 1 --initiator-address ALL &&
	tgtadm --lld iser --mode target --op bind --tid 1 --initiator-name {INITIATOR} &&
	touch /ready
) &
exec tgtd -f --iser pool_sz_mb=64
"""
CLIENT = f"""
commands() {{
	i=0
	while [ ! -e /stop ]; do
		at=$((i * 896 % 65024))k
		echo "write -P $((i % 251 + 1)) $at 128k"
		echo "read -P $((i % 251 + 1)) $at 128k"
		i=$((i + 1))
	done
}}
commands | exec qemu-io --image-opts \
	driver=raw,file.driver=iscsi,file.transport=iser,file.portal={{ip}}:3260,file.target={TARGET},file.lun=1,file.initiator-name={INITIATOR}
"""


def test_a_disk_in_use_outlives_moves_of_target_and_initiator(stage: Stage) -> None:
    """Over one session; each block that is written is read back and compared."""
    target = stage.box("target", "a", ["sh", "-c", SERVER])
    wait_for("the target", lambda: target.file("/ready").exists())
    user = stage.box("user", "b", ["sh", "-c", CLIENT.replace("{ip}", target.ip)])

    def compared() -> int:
        assert user.info()["status"] != "exited", user.log()
        return user.log().count("read 131072/131072 bytes")

    for moving in ([], [target], [target], [user], [user], [target, user], [target, user]):
        before = compared()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(box.move) for box in moving]:
                assert done.result().warnings == []
        wait_for("more of the disk", lambda before=before: compared() > before + 20)  # type: ignore[misc]
    user.file("/stop").touch()
    assert user.wait() == 0, user.log()
    log = user.log()
    assert log.count("wrote 131072/131072 bytes") == log.count("read 131072/131072 bytes")
    assert "verification failed" not in log
    assert "rror" not in log, log
    target.kill("KILL")
