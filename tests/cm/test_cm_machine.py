# SPDX-License-Identifier: BSD-3-Clause
"""Connections on a simulated network: loss, duplicates, moves at any instant, hostile datagrams."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cm_native import NEVER, SECOND, TCP, UDP, Event, Host, Native, World, address

PORT = 7174
SEEDS = 120


class Programs:
    """A client that connects, a server that accepts; then one of them, or both, disconnects."""

    def __init__(self, world: World, *, think: int = 0, ender: str = "client") -> None:
        self.world, self.lib = world, world.native.lib
        self.server, self.client = world.host(), world.host()
        self.think, self.ender = think, ender
        self.listener = self.server.listen(PORT)
        self.client_conn: Any = None
        self.server_conn: Any = None

    def connect(self) -> None:
        self.client_conn = self.client.connect(1, PORT)

    def _accept(self, conn: Any) -> None:
        msg = self.world.native.message(qpn=0x456)
        self.lib.mg_cm_send_rep(conn, self.world.now, msg)

    def _end(self) -> None:
        if self.ender in ("client", "both"):
            self.lib.mg_cm_send_dreq(self.client_conn, self.world.now)
        if self.ender in ("server", "both"):
            self.lib.mg_cm_send_dreq(self.server_conn, self.world.now)

    def handle(self, _host: Host, event: Event) -> None:
        """What the programs do."""
        conn = event.conn
        if event.name == "REQ":
            self.server_conn = conn
            self.world.at(self.think, lambda: self._accept(conn))
        elif event.name == "REP":
            self.lib.mg_cm_send_rtu(conn, self.world.now)
        elif event.name == "ESTABLISHED":
            self.world.at(SECOND, self._end)
        elif event.name == "DREQ":
            self.lib.mg_cm_send_drep(conn, self.world.now)
        elif event.name == "TIMEWAIT_EXIT":
            self.lib.mg_cm_conn_destroy(conn, self.world.now)


@pytest.mark.parametrize("block", range(6))
def test_a_connection_lives_through_loss_and_moves(native: Native, block: int) -> None:
    """Requested once, accepted once, established once on either side, ended on both, nothing left."""
    for seed in range(block * SEEDS // 6, (block + 1) * SEEDS // 6):
        rng = random.Random(seed)
        world = World(native, seed, loss=rng.choice([0, 0.1, 0.4]), dup=rng.choice([0, 0.3]))
        p = Programs(world, think=rng.choice([0, 100_000_000, 20 * SECOND]),
                     ender=rng.choice(["client", "server", "both"]))
        for host in (p.server, p.client):
            for _ in range(rng.randrange(3)):
                start, length = rng.randrange(8 * SECOND), rng.randrange(40 * SECOND)
                if not host.stopped:
                    world.at(start, host.stop)
                    world.at(start + length, host.resume)
                    break
        p.connect()
        world.run(600, p.handle)
        why = f"seed {seed}: server {p.server.told} client {p.client.told}"
        assert p.server.told["REQ"] == 1, why
        assert p.server.told["ESTABLISHED"] == 1, why
        assert p.client.told["REP"] == 1, why
        assert not p.client.told["REJ"] + p.server.told["REJ"] + p.client.told["STALE"], why
        for host in (p.server, p.client):
            assert host.told["DREQ"] + host.told["DREP"] + host.told["TIMEOUT"] >= 1, why
            assert host.told["TIMEOUT"] == 0, why
            assert host.told["TIMEWAIT_EXIT"] == 1, why
            assert host.wake == NEVER, why


def test_without_loss_each_message_goes_once(native: Native) -> None:
    p = Programs(World(native))
    p.connect()
    p.world.run(60, p.handle)
    assert p.client.attrs() == ["REQ", "RTU", "DREQ"]
    assert p.server.attrs() == ["REP", "DREP"]


@pytest.mark.parametrize("name", ["REQ", "REP", "RTU", "DREQ", "DREP"])
def test_a_lost_message_is_made_good_within_a_second(native: Native, name: str) -> None:
    p = Programs(World(native))
    p.world.drop[name] = 1
    p.connect()
    p.world.run(3, p.handle)
    assert p.server.told["ESTABLISHED"] == 1
    assert (p.client.told["DREP"], p.server.told["DREQ"]) == (1, 1)


def test_a_slow_server_asks_for_time_and_is_given_it(native: Native) -> None:
    """MRA: the client repeats at once, not for the whole of the wait."""
    p = Programs(World(native), think=60 * SECOND)
    p.connect()
    p.world.run(70, p.handle)
    assert p.server.attrs()[:1] == ["MRA"]
    assert p.client.attrs().count("REQ") == 2
    assert p.server.told["ESTABLISHED"] == 1


def test_nobody_there_is_a_timeout_after_the_kernels_time(native: Native) -> None:
    p = Programs(World(native))
    p.client_conn = p.client.connect(9, PORT)
    p.world.run(60, p.handle)
    assert p.client.told["TIMEOUT"] == 0
    p.world.run(30, p.handle)
    assert p.client.told["TIMEOUT"] == 1
    assert p.client.wake == NEVER


def test_nobody_listening_is_a_reject_with_the_standards_reason(native: Native) -> None:
    p = Programs(World(native))
    conn = p.client.connect(1, PORT + 1)
    seen: list[Event] = []
    p.world.run(1, lambda _host, event: seen.append(event))
    assert [(e.name, e.reason) for e in seen] == [("REJ", 8)]
    p.client.native.lib.mg_cm_conn_destroy(conn, p.world.now)


def test_a_listener_that_is_made_anew_misses_no_request(native: Native) -> None:
    """perftest takes one connection by a listener and the next by another."""
    p = Programs(World(native))
    native.lib.mg_cm_conn_destroy(p.listener, p.world.now)
    p.connect()
    p.world.run(0.2, p.handle)
    p.listener = p.server.listen(PORT)
    p.world.run(2, p.handle)
    assert p.server.told["ESTABLISHED"] == 1
    native.lib.mg_cm_conn_destroy(p.listener, p.world.now)
    p.world.run(60, p.handle)
    p.client.connect(1, PORT)
    p.world.run(1, p.handle)
    assert p.client.told["REJ"] == 1  # gone for good


def test_a_program_that_rejects_does_so_to_a_repeated_request_too(native: Native) -> None:
    p = Programs(World(native))
    p.world.drop["REJ"] = 1
    p.connect()
    seen: list[tuple[str, int]] = []

    def handle(_host: Host, event: Event) -> None:
        if event.name == "REQ":
            native.lib.mg_cm_send_rej(event.conn, p.world.now, 28, native.ffi.NULL, 0)
        seen.append((event.name, event.reason))

    p.world.run(0.9, handle)
    assert seen == [("REQ", 0), ("REJ", 28)]


def test_a_full_backlog_lets_the_request_be_repeated(native: Native) -> None:
    p = Programs(World(native))
    p.server.full = True
    p.connect()
    p.world.run(1, p.handle)
    p.server.full = False
    p.world.run(20, p.handle)
    assert p.server.told["ESTABLISHED"] == 1


def test_a_program_that_ends_says_so(native: Native) -> None:
    p = Programs(World(native), ender="nobody")
    p.connect()
    p.world.run(1, p.handle)
    native.lib.mg_cm_farewell(p.client.cm, p.world.now)
    p.world.run(1, p.handle)
    assert p.server.told["DREQ"] == 1


def test_destroying_an_established_connection_disconnects_and_leaves_nothing(native: Native) -> None:
    p = Programs(World(native, loss=0.3, seed=5), ender="nobody")
    p.connect()
    p.world.run(20, p.handle)
    native.lib.mg_cm_conn_destroy(p.client_conn, p.world.now)
    p.world.run(100, p.handle)
    assert p.server.told["DREQ"] == 1
    assert p.client.wake == NEVER


def test_a_peer_that_has_made_its_qp_anew_ends_the_old_connection(native: Native) -> None:
    p = Programs(World(native), ender="nobody")
    p.connect()
    p.world.run(1, p.handle)
    p.client.connect(1, PORT)  # the same QPN
    p.world.run(1, p.handle)
    assert p.server.told["STALE"] == 1
    assert p.client.told["REJ"] == 1


@pytest.mark.parametrize("lost", ["", "SIDR_REQ", "SIDR_REP"])
def test_a_datagram_service_is_resolved_once(native: Native, lost: str) -> None:
    world = World(native)
    server, client = world.host(), world.host()
    server.listen(PORT, UDP)
    if lost:
        world.drop[lost] = 1
    client.connect(1, PORT, prefix=UDP)

    def handle(_host: Host, event: Event) -> None:
        if event.name == "SIDR_REQ":
            native.lib.mg_cm_send_sidr_rep(event.conn, world.now, native.message(qpn=5, qkey=7))

    world.run(2, handle)
    assert (server.told["SIDR_REQ"], client.told["SIDR_REP"]) == (1, 1)


@pytest.mark.parametrize("before", [TCP, UDP])
def test_a_datagram_listener_that_is_made_anew_misses_no_request(native: Native, before: int) -> None:
    """Also after one for streams: perftest -R -c UD has both at one port, one after the other."""
    world = World(native)
    server, client = world.host(), world.host()
    native.lib.mg_cm_conn_destroy(server.listen(PORT, before), world.now)
    client.connect(1, PORT, prefix=UDP)

    def handle(_host: Host, event: Event) -> None:
        if event.name == "SIDR_REQ":
            native.lib.mg_cm_send_sidr_rep(event.conn, world.now, native.message(qpn=5, qkey=7))

    world.run(0.2, handle)
    server.listen(PORT, UDP)
    world.run(2, handle)
    assert (server.told["SIDR_REQ"], client.told["SIDR_REP"]) == (1, 1)


def test_ids_begin_with_the_slot(native: Native) -> None:
    p = Programs(World(native))
    p.connect()
    p.world.run(1, p.handle)
    assert p.client_conn.local_id >> 26 == 2
    assert p.server_conn.local_id >> 26 == 1


def test_only_the_peer_may_speak_about_a_connection(native: Native) -> None:
    """A third host that knows both ids, which it cannot, still ends nothing."""
    p = Programs(World(native), ender="nobody")
    p.connect()
    p.world.run(1, p.handle)
    forged = native.message(attr=0x15, local_id=p.client_conn.local_id, remote_id=p.server_conn.local_id,
                            qpn=0x456)
    p.server.receive(address(77), native.build(forged))
    assert p.server.told["DREQ"] == 0
    assert native.ffi.string(native.lib.mg_cm_state_name[p.server_conn.state]) == b"established"


@pytest.mark.parametrize("seed", range(10))
def test_hostile_datagrams_change_nothing_for_others(native: Native, seed: int) -> None:
    """Random bytes behind a right header, and mutations of what was really sent."""
    world = World(native, seed)
    p = Programs(world, ender="nobody")
    p.connect()
    world.run(1, p.handle)
    rng = random.Random(seed)
    real = [*p.client.sent, *p.server.sent]
    for _ in range(3000):
        if rng.random() < 0.5:
            mad = bytearray(bytes([1, 7, 2, 3]) + rng.randbytes(252))
            mad[16:18] = bytes([0, rng.randrange(0x0E, 0x1C)])
        else:
            mad = bytearray(rng.choice(real))
            for _ in range(rng.randrange(1, 4)):
                mad[rng.randrange(256)] = rng.randrange(256)
        rng.choice([p.server, p.client]).receive(address(66), bytes(mad))
    world.run(1, lambda _host, _event: None)
    for conn in (p.server_conn, p.client_conn):
        assert native.ffi.string(native.lib.mg_cm_state_name[conn.state]) == b"established"
