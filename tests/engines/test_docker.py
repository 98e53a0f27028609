# SPDX-License-Identifier: BSD-3-Clause
"""What migroce makes of a dockerd's answers."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from migroce.engines import context
from migroce.engines.docker import DockerEngine


class _Api:
    """Docker's client, as far as `holder` asks."""

    def __init__(self, tasks: list[dict[str, Any]] | None) -> None:
        self._services = None if tasks is None else {"": {"VIP": "<nil>", "Ports": [], "Tasks": tasks}}

    def inspect_network(self, _name: str, *, verbose: bool) -> dict[str, Any]:
        return {"Name": "net", "Services": self._services} if verbose else {"Name": "net"}


def _task(name: str, ip: str, host: str) -> dict[str, Any]:
    return {"Name": name, "EndpointID": "e", "EndpointIP": ip, "Info": {"Host IP": host}}


@pytest.mark.parametrize("first", [True, False])
def test_a_second_holder_of_an_address_is_found_beside_the_container_itself(first: bool) -> None:
    tasks = [_task("box", "10.0.1.7", "192.0.2.1"), _task("thief", "10.0.1.7", "192.0.2.2")]
    tasks.append(_task("other", "10.0.1.8", "192.0.2.2"))
    engine = DockerEngine(context.machine())
    engine._client = _Api(tasks if first else tasks[::-1])  # type: ignore[assignment]
    assert engine.holder("net", "10.0.1.7", but="box") == ("thief", "192.0.2.2")
    assert engine.holder("net", "10.0.1.8", but="other") is None
    assert engine.holder("net", "10.0.1.9", but="box") is None
    engine._client = _Api(None)  # type: ignore[assignment]
    assert engine.holder("net", "10.0.1.7", but="box") is None


def test_whether_a_manager_of_the_swarm_can_be_reached() -> None:
    engine = DockerEngine(context.machine())
    with socket.create_server(("127.0.0.1", 0)) as manager:
        here, closed = manager.getsockname()[1], _closed_port()
        for addresses, answers in (
            ([], False),
            ([f"127.0.0.1:{closed}"], False),
            ([f"127.0.0.1:{closed}", f"127.0.0.1:{here}"], True),
        ):
            managers = [{"NodeID": str(number), "Addr": each} for number, each in enumerate(addresses)]
            engine.__dict__["about"] = {"Swarm": {"RemoteManagers": managers or None}}
            assert engine.manager_answers() is answers


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as once:
        return int(once.getsockname()[1])
