# SPDX-License-Identifier: BSD-3-Clause
"""The demo: an unmodified ib_send_bw is moved between two nodes while it runs."""
