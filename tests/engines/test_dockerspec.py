# SPDX-License-Identifier: BSD-3-Clause
"""From `docker inspect` of a container with many options: what moves, what is refused, how it is made again.

inspect-20.10.json: docker run --runtime migroce --hostname hh --network rdma-net --ip 10.0.1.9 -v vol2:/data
-v /anon -v /tmp:/host:ro --tmpfs /scratch -e A=b --label k=v --ulimit nofile=1000:2000 --memory 300m
--cpus 1.5 --user 0 -w /tmp --restart on-failure:3 --entrypoint sleep docker-repo/perftest 1000
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migroce.engines import docker, dockerspec
from migroce.errors import EngineError

FOUND: dict[str, Any] = json.loads((Path(__file__).parent / "inspect-20.10.json").read_text())


def test_a_container_is_made_again_as_it_was() -> None:
    body = dockerspec.creation(FOUND, "docker-repo/perftest")
    for key in ("Hostname", "User", "Env", "Cmd", "WorkingDir", "Entrypoint", "Labels"):
        assert body[key] == FOUND["Config"][key]
    limits = ("Memory", "NanoCpus", "Ulimits", "RestartPolicy")
    for key in (*limits, "LogConfig", "Runtime", "Binds", "Tmpfs", "PortBindings"):
        assert body["HostConfig"][key] == FOUND["HostConfig"][key]
    (endpoint,) = body["NetworkingConfig"]["EndpointsConfig"].items()
    assert endpoint[0] == "rdma-net"
    assert endpoint[1]["IPAMConfig"] == {"IPv4Address": "10.0.1.9"}
    assert endpoint[1]["Aliases"] == ["hh"]  # the short id is another one there
    assert "EndpointID" not in endpoint[1]
    assert "MacAddress" not in endpoint[1]  # made from the address there as well
    found = copy.deepcopy(FOUND)
    found["NetworkSettings"]["Networks"]["rdma-net"]["MacAddress"] = "02:42:aa:bb:cc:dd"
    assert dockerspec.endpoints(found)["rdma-net"]["MacAddress"] == "02:42:aa:bb:cc:dd"


def test_an_address_that_swarm_chose_moves_too() -> None:
    found = copy.deepcopy(FOUND)
    found["NetworkSettings"]["Networks"]["rdma-net"]["IPAMConfig"] = None
    endpoint = dockerspec.endpoints(found)["rdma-net"]
    assert endpoint["IPAMConfig"] == {"IPv4Address": "10.0.1.9"}


def test_named_and_anonymous_volumes_are_told_apart() -> None:
    found = {each.destination: each for each in dockerspec.volumes(FOUND)}
    assert not found["/data"].anonymous
    assert found["/anon"].anonymous
    assert "/host" not in found
    assert [path for path, _ in dockerspec.binds(FOUND)] == ["/tmp"]


def set_to(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


_BRIDGE = {"bridge": {"IPAddress": "172.17.0.2"}}
_NFS = {"Type": "volume", "Name": "v", "Driver": "nfs", "Destination": "/v"}
REFUSED = {
    "exited, not running": set_to("State", value={"Status": "exited", "Running": False}),
    "is paused": set_to("State", "Paused", value=True),
    "made with --init": set_to("HostConfig", "Init", value=True),
    "has a terminal": set_to("Config", "Tty", value=True),
    "docker exec": set_to("ExecIDs", value=["abc"]),
    "storage driver btrfs": set_to("Driver", value="btrfs"),
    "network of the node": set_to("HostConfig", "NetworkMode", value="host"),
    "network of another container": set_to("HostConfig", "NetworkMode", value="container:abc"),
    "--pid host": set_to("HostConfig", "PidMode", value="host"),
    "--ipc shareable": set_to("HostConfig", "IpcMode", value="shareable"),
    "--uts host": set_to("HostConfig", "UTSMode", value="host"),
    "--link": set_to("HostConfig", "Links", value=["/db:/x/db"]),
    "swarm service": set_to("Config", "Labels", value={"com.docker.swarm.task.id": "x"}),
    "Docker's default network": set_to("NetworkSettings", "Networks", value=_BRIDGE),
    "of driver nfs": set_to("Mounts", value=[_NFS]),
    "mount of type npipe": set_to("Mounts", value=[{"Type": "npipe", "Destination": "/v"}]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_move_is_refused_with_its_reason(reason: str) -> None:
    dockerspec.check_movable(FOUND)
    found = copy.deepcopy(FOUND)
    REFUSED[reason](found)
    with pytest.raises(EngineError) as caught:
        dockerspec.check_movable(found)
    assert reason in caught.value.reason
    assert caught.value.mend


@pytest.mark.parametrize(
    ("version", "experimental", "reason"),
    [("28.2.2", True, "28.2.2, whose `docker start --checkpoint` fails"), ("19.03.1", True, "too old"),
     ("26.1.5+dfsg1", False, "experimental features are off")],
)  # fmt: skip
def test_releases_that_cannot_restore_are_named(version: str, experimental: bool, reason: str) -> None:
    networks = {"rdma-net": {}}
    about = {"ServerVersion": version, "ExperimentalBuild": experimental}
    with pytest.raises(EngineError) as caught:
        dockerspec.check_release("node-b", about, networks)
    assert reason in str(caught.value)


@pytest.mark.parametrize("version", ["20.10.24+dfsg1", "26.1.5+dfsg1", "27.5.1"])
def test_releases_that_can_restore_are_taken(version: str) -> None:
    about = {"ServerVersion": version, "ExperimentalBuild": True}
    dockerspec.check_release("node-b", about, {"rdma-net": {}})


def test_only_containers_of_our_runtime_have_the_device() -> None:
    assert docker.device(FOUND)
    found = copy.deepcopy(FOUND)
    found["HostConfig"]["Runtime"] = "runc"
    assert not docker.device(found)
    found["HostConfig"]["DeviceRequests"] = [{"Driver": "cdi", "DeviceIDs": ["migroce/rdma=rxe0"]}]
    assert docker.device(found)
