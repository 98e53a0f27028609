# SPDX-License-Identifier: BSD-3-Clause
"""What a container's namespace keeps when the container has moved to another main address: the old one alone.

The stand-in answers there. Other addresses have moved along: here they are taken away, or both had them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from migroce.engines import network
from migroce.engines.context import read_json, write_json

_RECORD = "addresses.json"


def keep(netns: Path | None, own: str | None, interfaces: list[network.Interface], where: Path) -> None:
    """Take away all addresses but `own`; `where` notes what there was. Can be repeated. Raises OSError."""
    left = [
        dataclasses.replace(each, addresses=tuple(a for a in each.addresses if a.partition("/")[0] == own))
        for each in interfaces
    ]
    if netns is None or left == interfaces:
        return
    if not (where / _RECORD).exists():
        write_json(where / _RECORD, {"interfaces": [dataclasses.asdict(each) for each in interfaces]})
    network.set_addresses(netns, left)


def take_back(netns: Path, where: Path) -> list[network.Interface]:
    """Undo `keep`; the interfaces, none if there was nothing to undo. Raises OSError."""
    record = where / _RECORD
    if not record.exists():
        return []
    interfaces = [network.Interface.decode(raw) for raw in read_json(record)["interfaces"]]
    network.set_addresses(netns, interfaces)
    return interfaces
