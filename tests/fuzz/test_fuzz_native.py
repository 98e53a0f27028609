# SPDX-License-Identifier: BSD-3-Clause
"""Each libFuzzer target for a bounded number of runs, from the seeds in the tree, under ASan and UBSan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).resolve().parents[2] / "native" / "fuzz" / "corpus"
RUNS = {
    "cm": 8_000, "packet": 50_000, "icrc": 20_000, "control": 50_000, "engine": 10_000, "unack": 10_000,
    "shared": 5_000,
}  # fmt: skip
MAX_LEN = {
    "cm": 512, "packet": 512, "icrc": 2048, "control": 256, "engine": 1024, "unack": 1024, "shared": 1024,
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_fuzzer_finds_nothing(name: str, fuzzers: Path, tmp_path: Path) -> None:
    command = [
        str(fuzzers / f"fuzz_{name}"), f"-runs={RUNS[name]}", f"-max_len={MAX_LEN[name]}", "-seed=1",
        "-len_control=0", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={fuzzers}/", "-verbosity=0",
        str(tmp_path), str(CORPUS / name),
    ]  # fmt: skip
    env = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env, check=False)
    if done.returncode:
        found = re.search(r"Test unit written to (\S+)", done.stderr)
        again = f"{command[0]} {found[1]}" if found else " ".join(command)
        invariant = (CORPUS.parent / f"fuzz_{name}.c").read_text().splitlines()[0]
        pytest.fail(f"{invariant}\nreproduce: {again}\n{done.stderr[-6000:]}", pytrace=False)


def test_the_seeds_are_what_their_script_writes(tmp_path: Path) -> None:
    root = CORPUS.parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests' / 'wire'}"}
    subprocess.run([sys.executable, str(CORPUS.parent / "make_seeds.py"), str(tmp_path)], env=env, check=True)
    for seed in tmp_path.rglob("*"):
        if seed.is_file():
            assert (CORPUS / seed.relative_to(tmp_path)).read_bytes() == seed.read_bytes(), seed.name


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_fuzzer_has_seeds_and_says_its_invariant_first(name: str) -> None:
    assert any((CORPUS / name).iterdir())
    assert (CORPUS.parent / f"fuzz_{name}.c").read_text().startswith("/* Invariant: ")
