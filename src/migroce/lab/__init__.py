# SPDX-License-Identifier: BSD-3-Clause
"""The lab: nodes on one machine, as network namespaces with state of their own."""
