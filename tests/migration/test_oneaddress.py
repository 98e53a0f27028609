# SPDX-License-Identifier: BSD-3-Clause
"""What a namespace keeps of its addresses when its container has another main one elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.native.netns import Node, ip, pair

from migroce.engines import network
from migroce.migration import oneaddress

MAIN = "10.9.0.1"
OTHERS = ("10.9.0.5/24", "10.9.1.1/24", "fd97::1/64")


@pytest.fixture
def node() -> Iterator[Node]:
    """A namespace with one interface."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    with pair(f"mgo{os.getpid()}") as (first, _):
        yield first


def addresses(node: Node) -> set[str]:
    (interface,) = network.inspect(node.path)
    return set(interface.addresses)


@pytest.mark.parametrize("own", [MAIN, "10.9.0.5"], ids=["a network's first", "not the first"])
def test_one_address_stays_and_all_come_back(node: Node, tmp_path: Path, own: str) -> None:
    for each in OTHERS:
        ip("-n", node.netns, "address", "add", each, "dev", node.iface, *(["nodad"] if ":" in each else []))
    before = network.inspect(node.path)
    assert addresses(node) == {f"{MAIN}/24", *OTHERS}
    for _ in range(2):
        oneaddress.keep(node.path, own, network.inspect(node.path), tmp_path)
        assert addresses(node) == {f"{own}/24"}
    again = oneaddress.take_back(node.path, tmp_path)
    assert {each for interface in again for each in interface.addresses} == {f"{MAIN}/24", *OTHERS}
    assert addresses(node) == {f"{MAIN}/24", *OTHERS}
    assert [each.mac for each in again] == [each.mac for each in before]


def test_a_single_address_is_left_alone(node: Node, tmp_path: Path) -> None:
    oneaddress.keep(node.path, MAIN, network.inspect(node.path), tmp_path)
    assert not list(tmp_path.iterdir())
    assert oneaddress.take_back(node.path, tmp_path) == []
    assert addresses(node) == {f"{MAIN}/24"}
