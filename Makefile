# The two commands are `make demo` and `make test`. Both install what they need into .venv first, and
# do that again only after a requirements file has changed.
#
#   PYTHON=/path/to/python3.12   which Python makes .venv (3.11 or newer)
#   KEEP=1                       `make demo` leaves its servers running
#   ARGS="-k manifest -x"        passed to pytest
#   WORKERS=0                    how many processes run tests: 2 by default, whole files each; 0 is pytest itself
#
# On Linux the torch that pip takes from PyPI comes with gigabytes of CUDA libraries. Where there is
# no NVIDIA card, PIP_EXTRA_INDEX_URL naming PyTorch's CPU builds makes it a much smaller download.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
# Tests wait for servers half of their time; models are small, but each process has a torch of its own.
WORKERS ?= 2
SKY_VENV := .venv-sky
BENCH_VENV := .venv-bench
PY := $(VENV)/bin/python
NEEDS_311 := import sys; sys.exit(sys.version_info < (3, 11))
# Without --no-compile pip spends a minute on bytecode of which the first run uses a tenth.
PIP_INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check

# The first one that is there, runs, and is new enough.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	if $$candidate -c '$(NEEDS_311)' >/dev/null 2>&1; then echo $$candidate; exit; fi; done)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: demo
demo: $(VENV)/.installed ## Bucket in, image out, on this machine; KEEP=1 leaves it serving
	@KEEP="$(KEEP)" $(PY) -m demo

# torch's threads wait for each other awake by default, which on cores that servers and other tests use as well makes
# them wait 5 to 10 times as long (2 cores).
.PHONY: test
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/.installed $(SKY_VENV)/.installed ## Run the tests; ARGS="-k name" selects some
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed ## Check style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: format
format: $(VENV)/.installed ## Format, and repair what can be repaired
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: types
types: $(VENV)/.installed ## Check types
	@$(PY) -m mypy

.PHONY: schema
schema: $(VENV)/.installed ## Write .cog/openapi_schema.json from predict.py
	@$(PY) scripts/generate_schema.py

.PHONY: check
check: lint types ## Everything .ci/run checks, short of the tests and the demo
	@$(PY) scripts/generate_schema.py --check

.PHONY: bench
bench: $(BENCH_VENV)/.installed ## Measure the loader beside its peers; ARGS="--size 256MB --rounds 1" for a look
	@$(BENCH_VENV)/bin/python benchmarks/weights.py $(ARGS)

.PHONY: bench-engine
bench-engine: $(BENCH_VENV)/.installed ## Measure the engine beside stock diffusers; ARGS="--parts single --rounds 1" for a look
	@$(BENCH_VENV)/bin/python benchmarks/engine.py $(ARGS)

.PHONY: bench-gateway
bench-gateway: $(BENCH_VENV)/.installed ## Measure the gateway beside Cog bare; ARGS="--parts card --requests 20 --rounds 1" for a look
	@$(BENCH_VENV)/bin/python benchmarks/gateway.py $(ARGS)

.PHONY: install
install: $(VENV)/.installed ## Only install into .venv

.PHONY: clean
clean: ## Remove what these commands have made, .venv included
	rm -rf $(VENV) $(SKY_VENV) $(BENCH_VENV) .mypy_cache .pytest_cache .ruff_cache demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python
python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(NEEDS_311)' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(if $(PYTHON),'$(PYTHON)' is not that,none was found)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: its venv module is not complete." >&2; \
		echo "On Debian and Ubuntu: sudo apt-get install $$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }

$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(MAKE) --no-print-directory python
	@echo "Installing into $(VENV): several minutes the first time."
	@test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	@$(PY) $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

# SkyPilot's pins and ours do not go together (click, for one), so its parser has a place of its own.
$(SKY_VENV)/.installed: requirements-sky.txt
	@$(MAKE) --no-print-directory python
	@echo "Installing SkyPilot's parser into $(SKY_VENV): about a minute the first time."
	@test -x $(SKY_VENV)/bin/python || "$(PYTHON)" -m venv $(SKY_VENV)
	@$(SKY_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements-sky.txt
	@touch $@

# The peers bring much that nothing else needs. The .gitignore keeps linters and git out of what they bring.
$(BENCH_VENV)/.installed: requirements.txt requirements-bench.txt
	@$(MAKE) --no-print-directory python
	@echo "Installing the product and its peers into $(BENCH_VENV): several minutes the first time."
	@test -x $(BENCH_VENV)/bin/python || "$(PYTHON)" -m venv $(BENCH_VENV)
	@echo '*' > $(BENCH_VENV)/.gitignore
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) -r requirements-bench.txt
	@touch $@
