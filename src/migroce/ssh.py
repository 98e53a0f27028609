# SPDX-License-Identifier: BSD-3-Clause
"""What went wrong with ssh, said in a sentence: the reason and the mend.

ssh has one exit status (255) for all that fails before the command runs; which it was is only in its words
(OpenSSH, LogLevel INFO; it is not localized). The words of what could not be run come from the shell there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

Explanation = tuple[str, str]
"""(reason, mend)."""


def _changed(host: str, _: re.Match[str]) -> Explanation:
    mend = f"if that is right, remove the old one (`ssh-keygen -R {host}`) and log in once by hand"
    return "its host key is not the one that is known: another machine, or somebody in between", mend


def _unknown(host: str, _: re.Match[str]) -> Explanation:
    return "its host key is not known here", f"log in once by hand (`ssh {host}`) and compare the key"


def _refused(_: str, found: re.Match[str]) -> Explanation:
    methods = found[1] or "nothing"
    mend = "log in with a key that it accepts (ssh-copy-id, or ssh-add); passwords are not asked for"
    return f"it does not let us in (it accepts {methods.replace(',', ', ')})", mend


def _unreachable(_: str, found: re.Match[str]) -> Explanation:
    mend = "see whether the machine is up, its address and port right, and sshd running there"
    return f"ssh cannot connect: {found[0].strip().lower()}", mend


def _unresolved(host: str, _: re.Match[str]) -> Explanation:
    return f"there is no host {host}", "see whether its name is written right"


def _lost(_: str, found: re.Match[str]) -> Explanation:
    return f"the connection was lost ({found[0].strip().rstrip('.').lower()})", "see the network between"


def _no_module(_: str, found: re.Match[str]) -> Explanation:
    mend = "install it there, or name the interpreter that has it: ssh://user@host?python=/path/to/python3"
    return f"{found[1]} there has no migroce", mend


def _no_program(_: str, found: re.Match[str]) -> Explanation:
    mend = "install it there, or name another interpreter: ssh://user@host?python=/path/to/python3"
    return f"there is no {found[1]} there", mend


_NO_CONNECTION = (
    r"Connection refused|No route to host|Network is unreachable|Connection timed out|Operation timed out"
    r"|kex_exchange_identification[^\n]*|Connection (?:closed|reset) by [^\n]*port \d+"
)
_LOST = (
    r"Timeout, server \S+ not responding|client_loop: [^\n]*|Connection to \S+ closed by remote host"
    r"|Broken pipe|mux_client[^\n]*"
)
_QUOTE = "['\u2018\u2019]?"
_WORDS: tuple[tuple[str, Callable[[str, re.Match[str]], Explanation]], ...] = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for .* has changed", _changed),
    (r"Host key verification failed|No \S+ host key is known", _unknown),
    (r"Permission denied \(([^)]*)\)|Too many authentication failures()", _refused),
    (r"Could not resolve hostname|Name or service not known", _unresolved),
    (_NO_CONNECTION, _unreachable),
    (_LOST, _lost),
    (r"(\S+): (?:Error while finding module specification for|No module named) '?migroce", _no_module),
    (r"(?:\d+: )?(\S+?): (?:command )?not found", _no_program),
    (rf"env: {_QUOTE}(\S+?){_QUOTE}: No such file or directory", _no_program),
    (r"(?:line \d+: |\d+: )?(\S+?): No such file or directory", _no_program),
)


def explain(words: str, host: str) -> Explanation | None:
    """(reason, mend) for what ssh or the shell at its other end wrote; None if that is not known."""
    for pattern, sentence in _WORDS:
        found = re.search(pattern, words)
        if found is not None:
            return sentence(host, found)
    return None


def remote_command(argv: list[str]) -> str:
    """The one string that ssh gives to the shell there."""
    return shlex.join(argv)
