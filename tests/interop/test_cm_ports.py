# SPDX-License-Identifier: BSD-3-Clause
"""The kernel's rdma_cm gives ports by the rules that ours has (tests/cm/test_cm_ports.py)."""

from __future__ import annotations

import pytest
from tests.cm.port_rules import RULES, V4, V6
from tests.e2e.stage import built
from tests.interop import ends as of
from tests.interop.ends import Kernels, Ours

SCRIPT = """
cd "$(mktemp -d)"; mkdir one other
i=0; for line in "new 0 $1" $3 "bind 0 $2 7300"; do echo "${line//_/ }" > one/$i; i=$((i + 1)); done
cmports one & first=$!
while [ ! -e one/$((i - 1)).said ]; do sleep 0.05; done
cat one/$((i - 1)).said; echo
i=0; for line in "new 0 $4" $6 "bind 0 $5 7300"; do echo "${line//_/ }" > other/$i; i=$((i + 1)); done
cmports other & second=$!
while [ ! -e other/$((i - 1)).said ]; do sleep 0.05; done
cat other/$((i - 1)).said
kill $first $second
"""


@pytest.fixture(scope="module")
def kernels(ends: tuple[Ours, Kernels]) -> Kernels:
    """The emulated machine with cmports in it."""
    ends[1].guest.put(built("tests/workload/cmports"), "/usr/local/bin/cmports")
    return ends[1]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("ps", "address", "option", "ps2", "address2", "option2", "answer"), RULES)
def test_the_kernel_gives_ports_by_these_rules(
    kernels: Kernels, ps: str, address: str, option: str, ps2: str, address2: str, option2: str, answer: str
) -> None:
    own = {V4: kernels.address(of.V4), V6: kernels.address(of.V6)}
    words = [ps, own.get(address, address), option and f"{option}_0"]
    words += [ps2, own.get(address2, address2), option2 and f"{option2}_0"]
    ended = kernels.guest.run(["bash", "-c", SCRIPT, "bash", *words], 90)
    assert ended.output.split("\n")[0] == "0 7300", ended
    assert ended.output.split("\n")[1].split()[0] == answer, ended
