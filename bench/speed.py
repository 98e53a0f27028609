# SPDX-License-Identifier: BSD-3-Clause
"""Bandwidth, latency, message rate, and what an agent adds to them, between two ends over veth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench import traffic
from bench.agents import agent
from bench.ends import End, two_ends
from bench.results import Section
from bench.settings import Settings

BIG = 65536
BW_TESTS = ("ib_send_bw", "ib_write_bw", "ib_read_bw")
LAT_TESTS = ("ib_send_lat", "ib_write_lat")
Measure = Callable[[], float]


def in_turns(settings: Settings, what: dict[str, Measure]) -> dict[str, list[float]]:
    """Each measurement once per round, in turns; the samples by name. The first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(-settings.warm_up, settings.rounds):
        for name, measure in what.items():
            settings.tell(f"{name} ({turn + 1}/{settings.rounds})" if turn >= 0 else f"{name} (warming up)")
            value = measure()
            if turn >= 0:
                found[name].append(value)
    return found


def bandwidth(settings: Settings) -> Section:
    """ib_send_bw, ib_write_bw and ib_read_bw at 64 KiB beside raw UDP with GSO and GRO."""
    section = Section("bandwidth", "Bandwidth at 64 KiB", "raw UDP: same packet size, GSO/GRO, unreliable")
    with two_ends() as ends:
        device = traffic.without_agent()
        messages = settings.scaled(32768)
        seconds = settings.scaled(1.0)
        what: dict[str, Measure] = {"raw UDP": partial(traffic.raw_bandwidth, ends, seconds)}
        for name in BW_TESTS:
            what[name] = partial(traffic.bandwidth, ends, device, name, BIG, messages)
        what["raw UDP, packet by packet"] = partial(traffic.raw_bandwidth, ends, seconds, trains=False)
        found = in_turns(settings, what)
    series = {name: section.add(name, "Gb/s", samples) for name, samples in found.items()}
    for name in BW_TESTS:
        ratio = section.ratio(f"{name} / raw UDP", series[name], series["raw UDP"])
        section.target(f"{name}: at least 0.5 of raw UDP", ratio, 0.5, at_least=True)
    return section


def latency(settings: Settings) -> Section:
    """ib_send_lat and ib_write_lat at 2 bytes beside a raw UDP ping-pong."""
    section = Section("latency", "Half round trip at 2 bytes", "medians of each run; both ends spin")
    with two_ends() as ends:
        device = traffic.without_agent()
        rounds = settings.scaled(20000)
        what: dict[str, Measure] = {"raw UDP": partial(traffic.raw_latency, ends, rounds)}
        for name in LAT_TESTS:
            what[name] = partial(traffic.latency, ends, device, name, 2, rounds)
        found = in_turns(settings, what)
    series = {name: section.add(name, "us", samples) for name, samples in found.items()}
    for name in LAT_TESTS:
        ratio = section.ratio(f"{name} / raw UDP", series[name], series["raw UDP"])
        section.target(f"{name}: at most 2 times raw UDP", ratio, 2.0)
    return section


def message_rate(settings: Settings) -> Section:
    """ib_send_bw at 8 bytes."""
    section = Section("rate", "Messages per second at 8 bytes", "ib_send_bw -s 8, one QP")
    with two_ends() as ends:
        device = traffic.without_agent()
        messages = settings.scaled(1_000_000)
        what: dict[str, Measure] = {
            "ib_send_bw -s 8": partial(traffic.message_rate, ends, device, "ib_send_bw", 8, messages)
        }
        found = in_turns(settings, what)
    series = section.add("ib_send_bw -s 8", "msg/s", found["ib_send_bw -s 8"])
    section.target("at least 500,000 messages/s", series, 500_000, at_least=True)
    return section


@contextlib.contextmanager
def _both_agents(ends: tuple[End, End], where: Path) -> Iterator[traffic.Device]:
    with agent(ends[0], where / "a") as first, agent(ends[1], where / "b") as second:
        yield traffic.with_agents(str(first.library_socket), str(second.library_socket))


def support(settings: Settings) -> Section:
    """The same programs with and without an agent at each end, while nothing migrates."""
    section = Section("support", "Migration support while nothing migrates", "an agent at each end / none")
    with settings.scratch() as where, two_ends() as ends, _both_agents(ends, where) as agents:
        alone = traffic.without_agent()
        messages, rounds, small = settings.scaled(32768), settings.scaled(20000), settings.scaled(1_000_000)
        what: dict[str, Measure] = {}
        for label, device in (("alone", alone), ("agent", agents)):
            what[f"bandwidth, {label}"] = partial(
                traffic.bandwidth, ends, device, "ib_send_bw", BIG, messages
            )
            what[f"latency, {label}"] = partial(traffic.latency, ends, device, "ib_send_lat", 2, rounds)
            what[f"rate, {label}"] = partial(traffic.message_rate, ends, device, "ib_send_bw", 8, small)
        found = in_turns(settings, what)
    for kind, unit in (("bandwidth", "Gb/s"), ("latency", "us"), ("rate", "msg/s")):
        without = section.add(f"{kind}, alone", unit, found[f"{kind}, alone"])
        with_agent = section.add(f"{kind}, agent", unit, found[f"{kind}, agent"])
        ratio = section.ratio(f"{kind}: agent / alone", with_agent, without)
        if kind == "latency":
            section.target("latency with agents: within 10 %", ratio, 1.1)
        else:
            section.target(f"{kind} with agents: within 10 %", ratio, 0.9, at_least=True)
    return section
