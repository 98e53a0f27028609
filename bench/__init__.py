# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks: speed, latency, blackout and memory, each beside its yardstick in the same run.

``python -m bench`` (or ``make bench``, ``migroce bench``) runs them; ``--help`` tells the choices.
Every comparison is made in turns (A B A B ...) and judged by the median of the ratios, because the speed
of a shared machine drifts more than what is to be measured.
"""
