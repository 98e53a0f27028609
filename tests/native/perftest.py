# SPDX-License-Identifier: BSD-3-Clause
"""What perftest's programs say."""

NO_CLOCK = "Correlation coefficient r^2"
"""What perftest says, and gives up, when a busy machine kept it from measuring the clock: not about us."""
