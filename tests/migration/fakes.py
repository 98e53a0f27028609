# SPDX-License-Identifier: BSD-3-Clause
"""Two nodes that only remember: what a migration's sides would do to a container, and faults to order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

from migroce.errors import EngineError

Fault = Callable[[str, str], None]
"""Called before each call with the side and the method; may raise."""


class World:
    """One container, as both nodes see it."""

    def __init__(self, *, device: bool = True) -> None:
        self.device = device
        self.calls: list[str] = []
        self.phases: list[str] = []
        self.looks = 0
        self.fault: Fault = lambda _side, _method: None
        # The source's container.
        self.here = True
        self.stopped = self.frozen = self.unplugged = self.opened = False
        self.lost = False
        """Whether something else has ended its processes."""
        self.moved_to = ""
        self.given_up = False
        """Whether the command has left the rest to `recover`."""
        self.ended = ""
        # The destination's.
        self.prepared = self.restored = self.plugged = self.resumed = self.committed = False
        self.qps = [{
            "qpn": 5, "type": "RC", "state": "RTS", "mstate": "normal", "peer_gid": "10.0.1.3", "peer_qpn": 6,
            "peer_capable": True, "token_acked": True, "retransmits": 10, "duplicates": 1,
            "una_psn": 1, "next_psn": 1,
        }]  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {
            "container": "c", "metadata": {"ip": "10.0.1.7"}, "config": {}, "device": self.device,
            "plain": False,
            "interfaces": [{"name": "eth0", "mac": "02:6d:0a:00:01:07", "mtu": 1500,
                            "addresses": ["10.0.1.7/24"]}],
            "memory": 1 << 20, "engine": "oci", "before": ["layer"], "after": ["layer-rest", "shm", "images"],
        }  # fmt: skip

    def runs_on(self) -> list[str]:
        """Where the container runs with its network and its connections."""
        whole = not self.device
        source = self.here and not self.frozen and not self.unplugged and not self.stopped
        there = self.restored and self.plugged and self.committed and (whole or self.resumed)
        return ["source"] * source + ["destination"] * there

    # -- the source ----------------------------------------------------------------------------------------

    def source(self, method: str, args: dict[str, Any]) -> Any:
        match method:
            case "describe":
                return self.about()
            case "open":
                self.opened = True
            case "note":
                self.phases.append(args["phase"])
            case "standing":
                point = self.phases and self.phases[-1] in ("resume", "commit")
                return {"ended": self.ended, "past_the_point": bool(point)}
            case "stop":
                self.stopped = self.device
                return {"contexts": 1, "qps": 1}
            case "dump":
                self.frozen = True
                return {"freeze_ms": 1.0, "dump_ms": 2.0, "neighbours": []}
            case "push":
                early = ["early"] * ("images" in args["whats"])
                return dict.fromkeys([*args["whats"], *early], 100)
            case "leave":
                self.unplugged = not args["ip"]
                self.moved_to = args["ip"]
            case "adopt":
                return not self.ended
            case "undo" if self.lost:
                self.here = False
                self.ended = "lost"
                return {"lost": True}
            case "undo":
                self.frozen = self.unplugged = self.stopped = False
                self.ended = "undone"
            case "commit":
                self.here = False
                self.ended = "done"
            case "stopped_counters" | "qps":
                return [dict(qp) for qp in self.qps]
            case "can_change":
                pass
            case "give_up":
                self.given_up = True
            case _:
                raise AssertionError(f"source.{method} is not known to the fake")
        return None

    # -- the destination -----------------------------------------------------------------------------------

    def destination(self, method: str, args: dict[str, Any]) -> Any:  # noqa: ARG002
        match method:
            case "check":
                return {}
            case "prepare":
                self.prepared = True
                return "/in.sock"
            case "restore":
                self.restored = True
                return {"pid": 1, "ms": 3.0}
            case "plug":
                if not self.restored:
                    raise EngineError("resume", "c is not here")
                self.plugged = True
            case "resume":
                self.resumed = True
                return {"contexts": 1, "qps": 1, "ms": 1.0}
            case "settle":
                return [{**qp, "retransmits": qp["retransmits"] + 4} for qp in self.qps]
            case "status":
                return {"here": self.restored, "alive": self.restored, "exit_status": None}
            case "commit":
                self.committed = True
            case "undo":
                self.prepared = self.restored = self.plugged = self.resumed = False
            case "received" | "prepare_rdma" | "adopt":
                pass
            case _:
                raise AssertionError(f"destination.{method} is not known to the fake")
        return None


class FakeNode:
    """A node of a World: `kind` is the side it plays."""

    def __init__(self, world: World, kind: str) -> None:
        self.world, self.kind = world, kind
        self.name = self.spec = f"node-{kind}"

    def call(self, op: str, *, method: str, args: dict[str, Any] | None = None, **_: Any) -> Any:
        if op == "agent":
            self.world.looks += 1
            peer = {"local_gid": "10.0.1.3", "qpn": 6, "retransmits": 7 * self.world.looks}
            return [{"contexts": [{"dump": {"qps": [peer]}}, {"dump": None}]}]
        assert op == self.kind
        assert args is not None
        self.world.calls.append(f"{op}.{method}")
        self.world.fault(op, method)
        return getattr(self.world, op)(method, args)

    def submit(self, op: str, *, method: str, args: dict[str, Any], **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(self.call(op, method=method, args=args, **more))
        except Exception as exc:  # noqa: BLE001 - it is for who waits
            future.set_exception(exc)
        return future

    def worker(self) -> FakeNode:
        return self

    def shares_files_with(self, other: object) -> bool:
        return isinstance(other, FakeNode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
