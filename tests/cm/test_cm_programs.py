# SPDX-License-Identifier: BSD-3-Clause
"""Unmodified programs of rdmacm-utils and perftest connect through our connection manager."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cm_programs import ADDRESSES, FURTHER, CmPair, finish_within
from tests.e2e.stage import wait_for

A = ADDRESSES[0]
A6 = "fd99::1"

# server, client; one line per property that something could get wrong.
PAIRS = (
    ("rping -s -C 20 -V", f"rping -c -a {A} -C 20 -V"),
    (f"rping -s -a {A} -C 5 -V -S 60000 -p 9999", f"rping -c -a {A} -C 5 -V -S 60000 -p 9999"),
    (f"rping -s -a {A6} -C 5 -V", f"rping -c -a {A6} -C 5 -V"),
    ("udaddy", f"udaddy -s {A}"),
    ("rping -s -C 5 -q", f"rping -c -a {A} -C 5 -q"),
    ("ucmatose -c 30 -C 5", f"ucmatose -s {A} -c 30 -C 5"),
    ("ucmatose -S 5000 -m", f"ucmatose -s {A} -S 5000 -m"),
    ("rdma_server", f"rdma_client -s {A}"),
    ("ib_send_bw -R -n 500", f"ib_send_bw -R -n 500 {A}"),
    ("ib_send_bw -R -n 500 -b", f"ib_send_bw -R -n 500 -b {A}"),
    ("ib_send_lat -R -n 200", f"ib_send_lat -R -n 200 {A}"),
    ("ib_write_lat -R -n 200", f"ib_write_lat -R -n 200 {A}"),
    ("udaddy -c 3", f"udaddy -s {A} -c 3"),
    ("ib_write_bw -R -n 500 -q 4", f"ib_write_bw -R -n 500 -q 4 {A}"),
)


@pytest.mark.parametrize(("server", "client"), PAIRS, ids=[s for s, _ in PAIRS])
def test_programs_connect_and_complete(pair: CmPair, server: str, client: str) -> None:
    pair.both(server, client).check()


B = FURTHER[0]


@pytest.mark.parametrize(("server", "client"), [
    (f"rping -s -a {B} -C 5 -V", f"rping -c -a {B} -I {FURTHER[1]} -C 5 -V"),
    ("rping -s -C 5 -V", f"rping -c -a {A} -I {FURTHER[1]} -C 5 -V"),
    (f"udaddy -b {B}", f"udaddy -s {B}"),
    (f"rdma_server -s {B}", f"rdma_client -s {B}"),
])  # fmt: skip
def test_programs_use_further_addresses(pair: CmPair, server: str, client: str) -> None:
    replace(pair, by_interface=True).both(server, client).check()


def test_nobody_listening_is_told_as_a_reject(pair: CmPair) -> None:
    """A device is there (the pingpong has opened it), a listener is not."""
    holder = pair.start(0, "ibv_rc_pingpong -g 1")
    try:
        pair._wait_for_listener(holder, 18515, time.monotonic() + 60)
        client = pair.start(1, f"rping -c -a {A} -C 1")
        out, err = client.communicate(timeout=60)
        assert client.returncode != 0
        assert "RDMA_CM_EVENT_REJECTED, error 8" in out + err
    finally:
        holder.kill()
        holder.communicate()


def test_a_server_is_told_that_its_client_has_gone(pair: CmPair) -> None:
    """A client that ends without a word of its own: the library takes leave for it."""
    server = pair.start(0, "rping -s -C 1 -v")
    try:
        while True:
            client = pair.start(1, f"rping -c -a {A} -C 1")
            client.communicate(timeout=60)
            if not client.returncode:
                break
            assert server.poll() is None
        out, err = server.communicate(timeout=60)
        assert "DISCONNECT EVENT" in out + err
    finally:
        server.kill()
        server.communicate()


GROUPS = {
    "239.4.3.2": ("igmp", "020304EF", ADDRESSES),
    "ff15::4:3:2": ("igmp6", "ff15", ("fd99::1", "fd99::2")),
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_joined_by_rdma_cm_hears_what_is_sent_to_it(pair: CmPair, group: str) -> None:
    table, name, own = GROUPS[group]
    receiver = pair.start(0, f"mckey -m {group} -b {own[0]} -C 20")
    sender = None
    try:
        groups = Path(f"/proc/{receiver.pid}/net/{table}")
        wait_for("a join", lambda: name in groups.read_text() and receiver.poll() is None, seconds=40)
        sender = pair.start(1, f"mckey -m {group} -b {own[1]} -s -C 20")
        for end in (sender, receiver):
            done = finish_within(end, 40)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        for program in (receiver, sender):
            if program:
                program.kill()
                program.communicate()
