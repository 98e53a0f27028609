# SPDX-License-Identifier: BSD-3-Clause
# Each target sets up by itself what it needs (scripts/setup says what it installs).
# The first thing to try: make demo

PY = .venv/bin/python
PYTEST = $(PY) -m pytest -q

.PHONY: help build demo test test-unit test-e2e test-e2e-quick test-interop test-moves test-docker test-podman test-sweep demo-docker test-sanitizers lint format bench fuzz clean distclean

help:
	@sed -n 's/^## //p' Makefile

## make demo      watch ib_send_bw being moved between two nodes while it runs (root)
demo:
	@scripts/setup run
	@.venv/bin/migroce demo

## make demo-docker  the same with Docker: a dockerd on each node, a swarm's overlay network (root)
demo-docker:
	@scripts/setup run
	@scripts/docker
	@.venv/bin/migroce demo --docker

## make build     .venv and the C library only
build:
	@scripts/setup build

## make test      everything that must hold before a commit (root; under 15 minutes on two cores)
test:
	@scripts/setup test
	@scripts/test

## make test-e2e  all end-to-end tests, the long ones too (root)
test-e2e:
	@scripts/setup test
	$(PYTEST) tests/e2e tests/native tests/verbs --timeout 900

## make test-moves  perftest, UCX, libfabric, fio, MPI, rsockets, uDAPL, iSER, QEMU and others moved there and back, either end and both at once (root)
test-moves:
	@scripts/setup test
	$(PYTEST) tests/e2e/test_journeys.py tests/e2e/test_pending.py tests/e2e/test_rdmacm.py tests/e2e/test_qemu.py tests/e2e/test_mpi.py tests/e2e/test_iser.py tests/e2e/test_moves.py tests/e2e/test_hostile.py --timeout 900

## make test-docker  Docker's recipe by hand and by command, with Docker 20.10 and 26.1 in the lab (root)
test-docker:
	@scripts/setup test
	@scripts/docker 20.10 26.1 image
	PATH=$$PWD/.venv/bin:$$PATH $(PYTEST) tests/docker --timeout 900

## make test-podman  docs/podman.md line by line, and Podman's moves with verified data; installs podman (root)
test-podman:
	@scripts/setup podman
	@scripts/docker 26.1 image
	PATH=$$PWD/.venv/bin:$$PATH $(PYTEST) tests/podman --timeout 900

## make test-interop  against the kernel's own SoftRoCE in an emulated machine (root; docs/interop.md)
test-interop:
	@scripts/setup interop
	@scripts/interop

## make test-sweep  all of perftest and other programs, option by option (root; an hour)
test-sweep:
	@scripts/setup test
	$(PY) -m tests.workload.sweep

## make lint      ruff, mypy --strict, clang-format, -Werror with gcc and clang
lint:
	@scripts/setup test
	@scripts/lint

## make format    bring the sources into the form that lint asks for
format:
	@scripts/setup test
	@scripts/lint --fix

## make bench     speed, latency, blackout and memory, each beside its yardstick (root)
bench:
	@scripts/setup bench
	@.venv/bin/migroce bench

## make fuzz      the fuzzers, a minute each (FUZZ_SECONDS=n)
fuzz:
	@scripts/setup fuzz
	@scripts/fuzz $(or $(FUZZ_SECONDS),60)

## make clean     remove what was built; distclean: .venv and the private CRIU too
clean:
	rm -rf build build-* out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf .venv .criu .criu.new .criu.old .docker .setup.lock
