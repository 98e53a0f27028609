# SPDX-License-Identifier: BSD-3-Clause
"""migroce-runtime reads of a command line what it needs, in every spelling, and changes nothing else."""

from __future__ import annotations

import pytest

from migroce.runtime.commandline import CommandLine

SHIM = ["--root", "/r", "--log", "/b/log.json", "--log-format", "json"]


@pytest.mark.parametrize(
    ("words", "container"),
    [
        (["create", "--bundle", "/b", "--pid-file", "/b/pid", "box"], "box"),
        (["create", "--bundle=/b", "--no-pivot", "box"], "box"),
        (["restore", "--image-path", "/i", "-detach", "-no-subreaper", "--bundle", "/b", "box"], "box"),
        (["checkpoint", "--leave-running", "--work-path", "/w", "--image-path", "/i", "box"], "box"),
        (["exec", "--process", "/p", "-d", "--pid-file", "/x", "box"], "box"),
        (["exec", "-t", "box", "sh", "-c", "true"], "box"),
        (["delete", "--force", "--", "box"], "box"),
        (["delete"], ""),
    ],
)
def test_the_container_is_found(words: list[str], container: str) -> None:
    line = CommandLine([*SHIM, *words])
    assert (line.command, line.container) == (words[0], container)
    assert line.args == [*SHIM, *words]
    assert line.option("--log") == "/b/log.json"


def test_options_are_read_and_set_where_they_stand() -> None:
    words = ["-detach", "--image-path=/i", "--bundle", "/b", "box", "--image-path"]
    line = CommandLine([*SHIM, "restore", *words])
    assert line.has("--detach", "-d")
    assert line.option("--image-path") == "/i"
    assert line.option("--bundle", "-b") == "/b"
    assert line.option("--work-path") is None
    line.set_option("--image-path", "/other")
    line.set_option("--work-path", "/w")
    line.add_flag("--tcp-established")
    line.add_flag("--detach")
    rest = ["-detach", "--image-path=/other", "--bundle", "/b", "box", "--image-path"]
    assert line.args == [*SHIM, "restore", "--tcp-established", "--work-path", "/w", *rest]
    assert line.args[line.rest] == "box"
