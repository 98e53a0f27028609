# SPDX-License-Identifier: BSD-3-Clause
"""The part of an OCI runtime's command line that we need; all else stays as it is."""

from __future__ import annotations

import os

from migroce.errors import MigroceError
from migroce.runtime import runtime, split

_FLAGS = {
    "create": {"--no-pivot", "--no-new-keyring"},
    "run": {"--detach", "-d", "--keep", "--no-subreaper", "--no-pivot", "--no-new-keyring"},
    "exec": {"--tty", "-t", "--detach", "-d", "--no-new-privs", "--ignore-paused"},
    "checkpoint": {
        "--leave-running", "--tcp-established", "--tcp-skip-in-flight", "--ext-unix-sk", "--shell-job",
        "--lazy-pages", "--file-locks", "--pre-dump", "--auto-dedup", "--link-remap",
    },
    "restore": {
        "--tcp-established", "--tcp-close", "--ext-unix-sk", "--shell-job", "--file-locks", "--detach", "-d",
        "--no-subreaper", "--no-pivot", "--auto-dedup", "--lazy-pages", "--link-remap",
    },
    "delete": {"--force", "-f"},
    "pause": set(),
    "resume": set(),
}  # fmt: skip
"""Options without a value; every other one has one, behind it or after '='."""


class CommandLine:
    """A command line with our eyes: global options, command, its options, the container."""

    def __init__(self, args: list[str], at: int | None = None) -> None:
        self.at = split(args) if at is None else at
        self.args = list(args)
        self.command = args[self.at] if self.at < len(args) else ""
        self.container = ""
        flags = _FLAGS.get(self.command, set())
        rest = self.at + 1
        while rest < len(args):
            word = args[rest]
            if word == "--":
                rest += 1
                break
            if not word.startswith("-") or word == "-":
                break
            rest += 1 if "=" in word or _long(word) in flags else 2
        if rest < len(args):
            self.container = args[rest]
        self.rest = min(rest, len(args))
        """Index of the container's id."""

    def option(self, *names: str) -> str | None:
        """The value of an option, global or of the command; None: it is not given."""
        found = None
        before, own = self.args[: self.at], self.args[self.at + 1 : self.rest]
        for words in (before, own):
            for index, word in enumerate(words):
                name, equals, value = word.partition("=")
                if _long(name) in names:
                    found = value if equals else words[index + 1] if index + 1 < len(words) else ""
        return found

    def has(self, *names: str) -> bool:
        """Whether one of the flags is given to the command."""
        return any(_long(word.partition("=")[0]) in names for word in self.args[self.at + 1 : self.rest])

    def set_option(self, name: str, value: str) -> None:
        """Give the command's option this value."""
        for index in range(self.at + 1, self.rest):
            if _long(self.args[index]) == name:
                self.args[index + 1] = value
                return
            if _long(self.args[index]).startswith(f"{name}="):
                self.args[index] = f"{name}={value}"
                return
        self.args[self.at + 1 : self.at + 1] = [name, value]
        self.rest += 2

    def spawn(self, env: dict[str, str] | None = None, err: int = 2) -> int:
        """Run the real runtime with what the command line is now, errors to `err`; its exit status.

        Raises MigroceError.
        """
        program = runtime()
        actions = [(os.POSIX_SPAWN_DUP2, err, 2)] if err != 2 else []
        argv = [program, *self.args]
        try:
            pid = os.posix_spawnp(program, argv, env or dict(os.environ), file_actions=actions)
        except OSError as exc:
            raise MigroceError(f"{program} cannot be run: {exc.strerror}; install runc") from exc
        while True:
            _, status = os.waitpid(pid, 0)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code

    def add_flag(self, name: str) -> None:
        """Give the command this flag."""
        if not self.has(name):
            self.args.insert(self.at + 1, name)
            self.rest += 1


def _long(name: str) -> str:
    """An option as it is documented: Go's parsers take -detach for --detach, and containerd writes it so."""
    return f"-{name}" if len(name) > 2 and name[0] == "-" != name[1] else name
