# SPDX-License-Identifier: BSD-3-Clause
"""The migroce agent: the device's control plane on one node. Never on the data path.

It hands out UDP sockets and QPN ranges to processes, stops and resumes their QPs, keeps the dumps of
stopped contexts and stands in for stopped containers on the wire. `python -m migroce.agent` runs it;
`migroce.agent.client.AgentClient` talks to it; docs/control.md is the reference of both interfaces.

Nothing is imported here: the agent must start fast and stay small.
"""
