# The first Python that is new enough and can make a virtual environment; override with make PYTHON=...
CANDIDATES := python3 python3.13 python3.12 python3.11
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(USABLE)' 2>/dev/null && echo $(p))) python3)

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt

# Tests go to so many processes, which start up to eight ranks each: more than two want cores and memory to match.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint clean

help:  ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s%s\n", $$1, $$2 }' Makefile

demo: export OMP_NUM_THREADS ?= 1
demo: $(STAMP)  ## Plan GPT-2 for eight A100s, then train it for a minute on four local processes
	$(BIN)/autopar-solve --model gpt2 --cluster 8xA100-80GB --batch 64 --seq 1024
	$(BIN)/torchrun --standalone --nproc-per-node 4 examples/train_gpt2.py --minutes 1

test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)  ## Run the tests, the slow ones left out; kernels by Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" tests/kernels
	$(PYTEST) -m "not slow"

test-all: export OMP_NUM_THREADS ?= 1
test-all: $(STAMP)  ## Run every test
	$(PYTEST)

lint: $(STAMP)  ## Run ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## Remove the environment, caches and build leftovers
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is touched last, so an interrupted install is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "autopar: no $(PYTHON) found; install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "autopar: $(PYTHON) is $$($(PYTHON) --version); 3.11 or later is needed: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "autopar: $(PYTHON) cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=..." >&2; exit 1; }
	@echo "[1/3] virtual environment .venv, $$($(PYTHON) --version)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "[2/3] torch (a large download the first time)"
	@$(PIP) torch
	@echo "[3/3] autopar and its other dependencies"
	@$(PIP) --editable '.[models,plot,dev]'
	@touch $@
