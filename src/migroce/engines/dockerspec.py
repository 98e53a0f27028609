# SPDX-License-Identifier: BSD-3-Clause
"""What a Docker container is made of: whether it can be moved, and how to make one like it elsewhere.

From `docker inspect` alone, nothing is asked or changed here.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from migroce.engines import docker
from migroce.errors import EngineError

Json = dict[str, Any]
_FIRST_BROKEN, _LAST_BROKEN = (28, 0), (28, 999)
"""Releases whose `docker start --checkpoint` fails for containers with a network of their own."""
WORKING = "20.10 to 27 work"
_RUN_TIME_ONLY = (
    "Gateway", "IPAddress", "IPPrefixLen", "IPv6Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen",
    "NetworkID", "EndpointID", "DNSNames",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """A volume of a container."""

    name: str
    source: str
    """Its directory on the node."""
    destination: str
    """Where the container sees it."""
    anonymous: bool
    """Made by `docker run` without a name: it lives and dies with the container."""


def check_movable(found: Mapping[str, Any]) -> None:
    """Raise EngineError if the container uses something that cannot be moved."""
    name, host, config = docker.name_of(found), found["HostConfig"], found["Config"]
    state = found["State"]

    def refuse(reason: str, mend: str) -> None:
        raise EngineError("check", f"{name} {reason}", mend)

    if not state.get("Running") or state.get("Restarting"):
        refuse(f"is {state.get('Status')}, not running", "only running containers move")
    if state.get("Paused"):
        refuse("is paused", f"`docker unpause {name}` first")
    if "com.docker.swarm.task.id" in (config.get("Labels") or {}):
        refuse("is a task of a swarm service, which swarm itself places", "let swarm move it")
    if host.get("Init"):
        refuse("was made with --init, and docker's init cannot be restored", "make it without --init")
    if config.get("Tty"):
        refuse("has a terminal (-t), which belongs to this machine", "make it without -t")
    if found.get("ExecIDs"):
        refuse("has a `docker exec` going on", "end that first")
    if found.get("Driver") != "overlay2" or "UpperDir" not in (
        (found.get("GraphDriver") or {}).get("Data") or {}
    ):
        refuse(f"has its files in storage driver {found.get('Driver')}", "only overlay2 is supported")
    _check_namespaces(host, refuse)
    networks = docker.addresses(found)
    if docker.device(found) and "bridge" in networks:
        mend = "give it a network of its own: docker network create, and run --network ... --ip ..."
        refuse("is on Docker's default network, where no address can be kept", mend)
    for each in found.get("Mounts") or []:
        if each["Type"] == "volume" and each.get("Driver") not in ("local", "", None):
            refuse(
                f"has a volume ({each['Name']}) of driver {each['Driver']}",
                "only local volumes can be copied",
            )
        if each["Type"] not in ("volume", "bind", "tmpfs"):
            refuse(
                f"has a mount of type {each['Type']} at {each['Destination']}", "use a volume or a bind mount"
            )


def _check_namespaces(host: Mapping[str, Any], refuse: Any) -> None:
    mode = str(host.get("NetworkMode") or "")
    if mode == "host":
        refuse("uses the network of the node, which stays here", "give it a network of its own")
    if mode.startswith("container:"):
        refuse("uses the network of another container", "give it a network of its own")
    for key, option in (("PidMode", "--pid"), ("IpcMode", "--ipc"), ("UTSMode", "--uts")):
        value = str(host.get(key) or "")
        if value == "host" or value.startswith("container:") or value == "shareable":
            refuse(f"was made with {option} {value}, which others share", f"make it without {option}")
    if host.get("Links"):
        refuse("was made with --link", "use a network of its own, where names are found without")


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a Docker release."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_release(node: str, about: Mapping[str, Any], networks: Mapping[str, str]) -> None:
    """Raise EngineError if the Docker that `about` (`docker info`) tells of cannot restore."""
    text = str(about.get("ServerVersion", "?"))
    version = version_of(text)
    if version < (20, 10):
        raise EngineError("check", f"{node} has Docker {text}, which is too old", WORKING)
    if _FIRST_BROKEN <= version <= _LAST_BROKEN and networks:
        reason = (
            f"{node} has Docker {text}, whose `docker start --checkpoint` fails for containers on a network"
        )
        raise EngineError("check", reason, f"install another release there ({WORKING})")
    if not about.get("ExperimentalBuild"):
        reason = f"Docker on {node} does not restore checkpoints: its experimental features are off"
        raise EngineError("check", reason, "run `migroce setup docker` there; it says how to go on")


def volumes(found: Mapping[str, Any]) -> list[Volume]:
    """The container's volumes, in the order of their destinations."""
    made = []
    for each in found.get("Mounts") or []:
        if each["Type"] == "volume":
            name = str(each["Name"])
            named = re.fullmatch(r"[0-9a-f]{64}", name) is None
            made.append(Volume(name, str(each["Source"]), str(each["Destination"]), anonymous=not named))
    return sorted(made, key=lambda it: it.destination)


def binds(found: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(path on the node, whether Docker makes it itself) of bind mounts."""
    made_by_docker = {str(each).split(":")[0] for each in found["HostConfig"].get("Binds") or []}
    return [
        (str(each["Source"]), str(each["Source"]) in made_by_docker)
        for each in found.get("Mounts") or []
        if each["Type"] == "bind"
    ]


def endpoints(found: Mapping[str, Any]) -> dict[str, Json]:
    """Settings to connect a container like this to the same networks with the same addresses.

    The network that it was made with comes first.
    """
    made: dict[str, Json] = {}
    short = str(found["Id"])[:12]
    for name, raw in (found["NetworkSettings"].get("Networks") or {}).items():
        if name in ("none", "host"):
            continue
        endpoint = {key: value for key, value in (raw or {}).items() if key not in _RUN_TIME_ONLY and value}
        if name == "bridge":
            made[name] = {}
            continue
        ipam = dict((raw or {}).get("IPAMConfig") or {})
        if (raw or {}).get("IPAddress"):
            ipam["IPv4Address"] = raw["IPAddress"]
        if (raw or {}).get("GlobalIPv6Address"):
            ipam["IPv6Address"] = raw["GlobalIPv6Address"]
        if endpoint.get("MacAddress") == _made_mac(str((raw or {}).get("IPAddress") or "")):
            del endpoint["MacAddress"]  # Docker makes it from the address there as well
        endpoint["IPAMConfig"] = ipam
        endpoint["Aliases"] = [each for each in (raw or {}).get("Aliases") or [] if each != short]
        made[name] = endpoint
    first = str(found["HostConfig"].get("NetworkMode") or "")
    return dict(sorted(made.items(), key=lambda item: (item[0] != first, item[0])))


def _made_mac(ip: str) -> str:
    """The MAC address that Docker makes from an IPv4 address."""
    parts = [int(part) for part in ip.split(".") if part.isdigit()]
    return ":".join(f"{part:02x}" for part in (2, 0x42, *parts))


def creation(found: Mapping[str, Any], image: str) -> Json:
    """The body of `POST /containers/create` for a container like this, from `image`, on its first network."""
    body: Json = copy.deepcopy(dict(found["Config"]))
    body["Image"] = image
    host: Json = copy.deepcopy(dict(found["HostConfig"]))
    host["ContainerIDFile"] = ""
    host["VolumesFrom"] = None  # what they gave is among Mounts
    given = {str(each).split(":")[1] for each in host.get("Binds") or [] if ":" in str(each)}
    given |= {str(each.get("Target")) for each in host.get("Mounts") or []}
    extra = [
        f"{each['Name'] if each['Type'] == 'volume' else each['Source']}:{each['Destination']}"
        + ("" if each.get("RW", True) else ":ro")
        for each in found.get("Mounts") or []
        if each["Destination"] not in given and each["Type"] in ("volume", "bind")
        and not re.fullmatch(r"[0-9a-f]{64}", str(each.get("Name", "")))
    ]  # fmt: skip
    if extra:
        host["Binds"] = [*(host.get("Binds") or []), *extra]
    body["HostConfig"] = host
    first = next(iter(endpoints(found).items()), None)
    body["NetworkingConfig"] = {"EndpointsConfig": dict([first]) if first else {}}
    return body
