# Every target works on a fresh machine with Python 3.10+ and make; nothing else is assumed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The release this project is tested with; `make TORCH=torch==2.11.0 test` tries another.
TORCH  ?= torch==2.13.0
USE    := $(VENV)/.installed-demo
STAMP  := $(VENV)/.installed-dev
# One thread each: the test processes share the cores among themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(USE): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" setuptools
	$(PIP) -e ".[demo,zoo]"
	@touch $@

$(STAMP): $(USE)
	$(PIP) -e ".[dev]"
	@touch $@

setup: $(STAMP) ## make .venv and install

demo: $(USE) ## fc_mnist on real digits: validate, compile, train in both modes, eval
	$(BIN)/python examples/fc_mnist/demo.py

test: $(STAMP) ## the tests (under five minutes on two cores)
	$(PYTEST)

test-all: $(STAMP) ## the tests, slow ones too
	$(PYTEST) -m "not cluster"

test-zoo: $(STAMP) ## every tiny model of the zoo, 50 steps in every mode
	$(PYTEST) --dist load tests/zoo -m slow

test-cluster: $(STAMP) ## jobs on a real SLURM (installed where root on Debian; else skipped)
	bash tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m cluster -rs

readme: $(STAMP) ## every command of the README
	$(PYTEST) tests/integration/test_readme.py -m "slow or not slow"

lint: $(STAMP) ## ruff: style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(STAMP) ## pyright, strict
	$(BIN)/python -m pyright

layers: $(STAMP) ## the import contract
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

ci: lint types layers test test-zoo readme ## what CI runs

clean: ## remove .venv and build leftovers
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache

.PHONY: help setup demo test test-all test-zoo test-cluster readme lint types layers format ci clean
