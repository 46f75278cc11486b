# Verbs of the house; `make help` lists them. CI runs the same ones.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first Python that exists and runs (a shim on the PATH may do only the former). Another one: make PYTHON=... setup
RUNS := import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(RUNS)' 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
UV := $(BIN)/uv
# What was installed is known by content, not by date: a changed lock is a new stamp.
STAMP := .venv/setup-$(shell cat requirements/cpu.lock requirements/uv.lock pyproject.toml | cksum | cut -d' ' -f1)
BENCH_GPU_STAMP := .venv-bench-gpu/setup-$(shell cat requirements/bench-gpu.lock | cksum | cut -d' ' -f1)
BENCH_STAMP := .venv-bench/setup-$(shell cat requirements/bench.lock | cksum | cut -d' ' -f1)
SMOLLM2 := models/smollm2-135m-instruct
COMPILE := $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header
# Compiled once: where PYTHONDONTWRITEBYTECODE is set each process would do it anew, half a minute of a start.
INSTALL := $(UV) pip install --compile-bytecode
SLOW_LOG := .build/slow-tests.log

.PHONY: help setup quickstart test lint typecheck audit lock sbom images generate schema manifests dashboards chart-docs bench bench-gpu kills chaos soak e2e clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*  ## /  \1\t/' | expand -t 14

setup: $(STAMP)  ## Python environment in .venv: every package pinned and hashed, for the CPU

quickstart: setup  ## set-up, then a small model learns arithmetic with the real stack, in minutes
	$(BIN)/grpo train examples/quickstart.yaml run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: setup lint typecheck  ## lint, types and all tests that need no GPU, but for those of `make kills`
	@# Beside each other: a real stack waits for a part of its time, and two of them are too many for two cores.
	@mkdir -p $(dir $(SLOW_LOG)); $(BIN)/python -m pytest -m "slow and not kills" >$(SLOW_LOG) 2>&1 & slow=$$!; \
	trap 'kill $$slow' INT TERM; failed=0; \
	echo "the slow tests run beside these, their log is $(SLOW_LOG)"; \
	$(BIN)/python -m pytest -m "not slow" || failed=$$?; \
	echo "the slow tests:"; wait $$slow || failed=$$?; cat $(SLOW_LOG); exit $$failed

kills: setup  ## 24 kills of the real stack, which CI makes too: is the run still the same? some minutes
	$(BIN)/python -m pytest -m kills

lint: setup  ## ruff
	$(BIN)/ruff check

typecheck: setup  ## mypy --strict on grpo/
	$(BIN)/mypy

audit: setup  ## pinned versions against the known vulnerabilities; fails where the index cannot be asked
	$(BIN)/python requirements/audit.py $(wildcard requirements/*.lock)

lock: $(UV)  ## resolve the dependencies again into requirements/*.lock
	$(COMPILE) pyproject.toml --extra cpu --extra dev -c requirements/shared.in -o requirements/cpu.lock
	$(COMPILE) pyproject.toml --extra gpu --extra dev -c requirements/shared.in -o requirements/gpu.lock
	$(COMPILE) pyproject.toml -c requirements/cpu.lock -o requirements/controller.lock
	$(COMPILE) pyproject.toml --extra cpu -c requirements/cpu.lock -o requirements/worker-cpu.lock
	$(COMPILE) pyproject.toml --extra gpu -c requirements/gpu.lock -o requirements/worker-gpu.lock
	$(COMPILE) requirements/bench.in -o requirements/bench.lock
	$(COMPILE) pyproject.toml requirements/bench-gpu.in --extra gpu -c requirements/gpu.lock -o requirements/bench-gpu.lock
	$(COMPILE) requirements/uv.in -c requirements/cpu.lock -o requirements/uv.lock

sbom: setup  ## dist/*.cdx.json: what is in each image, CycloneDX from the locks
	$(BIN)/python requirements/sbom.py

generate: schema manifests dashboards chart-docs  ## all that is generated around the chart; the tests compare it

schema: setup  ## charts/grpo/values.schema.json, from grpo/config/schema.py and charts/grpo/values.yaml
	$(BIN)/python -m charts.generate.schema

manifests: setup  ## manifests/*.yaml, from the chart's value profiles
	$(BIN)/python -m charts.generate.manifests

dashboards: setup  ## charts/grpo/dashboards/*.json, from charts/generate/boards
	$(BIN)/python -m charts.generate.dashboards

chart-docs: setup  ## charts/grpo/README.md, from the comments of values.yaml; needs Go
	$(BIN)/python -m charts.generate.docs

images:  ## container images with docker, podman or buildah: IMAGE_PREFIX=registry/team/ TAG= BASE= TARGETS="controller cpu gpu"
	IMAGE_PREFIX="$(IMAGE_PREFIX)" TAG="$(TAG)" BASE="$(BASE)" TARGETS="$(TARGETS)" docker/build.sh

bench: setup $(BENCH_STAMP) $(SMOLLM2)  ## the same work side by side: TRL's GRPOTrainer and grpo (not part of the tests)
	$(BIN)/python benchmarks/bench.py --trl-python .venv-bench/bin/python

bench-gpu: $(BENCH_GPU_STAMP)  ## the same on the GPUs of this machine, an even number: grpo's three modes and both trainers of TRL. ARGS="--cases s1,trl"
	.venv-bench-gpu/bin/python -m benchmarks.gpu $(ARGS)

chaos: setup  ## some hundred kills and freezes of every role at every point, and slowed runs: is the run still the same? MODE=sync, between, flight, refill or turns
	$(BIN)/python -m tests.chaos --mode $(or $(MODE),sync)

soak: setup  ## half an hour of the real stack with a kill every few minutes: does anything grow?
	$(BIN)/python -m tests.chaos.soak

e2e: setup  ## the chart on a real Kubernetes: the cluster in KUBECONFIG, or one that is made for it
	tests/e2e/run

clean:  ## remove environments and caches; runs stay
	rm -rf .venv .venv-* .build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@test -n "$(PYTHON)" || { echo "error: setup needs Python 3.11 or 3.12; none on the PATH runs. Try: make PYTHON=/path/to/python3.11 setup" >&2; exit 1; }
	@echo "setup 1/3: .venv with $$($(PYTHON) --version), and uv in it"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock

$(STAMP): | $(UV)
	@echo "setup 2/3: $$(grep -c == requirements/cpu.lock) packages of requirements/cpu.lock (a few GB the first time)"
	@$(INSTALL) --python $(BIN)/python --no-deps --require-hashes -r requirements/cpu.lock
	@echo "setup 3/3: grpo itself, editable"
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/setup-*
	@touch $@
	@echo "setup: done"

$(BENCH_STAMP): | $(UV)
	@echo "setup: .venv-bench, TRL's own environment"
	@$(UV) venv --quiet --clear --python $(BIN)/python .venv-bench
	@$(INSTALL) --python .venv-bench/bin/python --no-deps --require-hashes -r requirements/bench.lock
	@touch $@

$(BENCH_GPU_STAMP): | $(UV)
	@echo "setup: .venv-bench-gpu, grpo's packages for GPUs, TRL and matplotlib"
	@$(UV) venv --quiet --clear --python $(BIN)/python .venv-bench-gpu
	@$(INSTALL) --python .venv-bench-gpu/bin/python --no-deps --require-hashes -r requirements/bench-gpu.lock
	@touch $@

$(SMOLLM2): | $(STAMP)
	$(BIN)/python examples/smollm2.py --out $@
