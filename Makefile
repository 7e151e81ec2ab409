# Every target works on a fresh machine with Python 3.10+ and make; nothing else is assumed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The release this project is tested with; `make TORCH=torch==2.11.0 test` tries another.
TORCH  ?= torch==2.13.0
USE    := $(VENV)/.installed-demo
STAMP  := $(VENV)/.installed-dev
# One thread each: the test processes share the cores among themselves. One more of them than cores:
# tests wait for the processes that they start.
WORKERS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) + 1)")
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
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

test-zoo: $(STAMP) ## every tiny model of the zoo, 50 steps in every mode; the same as elsewhere
	$(PYTEST) --dist load tests/zoo tests/unit/zoo/test_zoo_bert_as_transformers.py \
		tests/unit/zoo/test_zoo_gpt.py tests/unit/zoo/test_zoo_t5.py \
		tests/unit/frontends/test_metrics_references.py -m slow

test-cluster: $(STAMP) ## jobs on a real SLURM (installed where root on Debian; else skipped)
	bash tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -m cluster -rs

# TensorFlow 2.15 needs Python 3.9 to 3.11 and numpy below 2: an environment of its own.
TF_VENV   ?= .venv-tf
TF_PYTHON ?= python3.11
TF_STAMP  := $(TF_VENV)/.installed-tf

$(TF_STAMP): pyproject.toml
	test -x $(TF_VENV)/bin/python || $(TF_PYTHON) -m venv $(TF_VENV)
	$(TF_VENV)/bin/python -m pip install --quiet "$(TORCH)" setuptools
	$(TF_VENV)/bin/python -m pip install --quiet -e ".[tf,demo,zoo]" \
		pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

# Each process holds TensorFlow and torch: 1 GiB.
TF_PYTEST := OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 $(TF_VENV)/bin/python -m pytest \
	-n auto --maxprocesses 8 --dist loadfile -rs
# One of each: import, training in both modes, checkpoints, the zoo, the example.
TF_SHORT := test_tf_places.py test_tf_refusals.py test_zoo_run.py \
	test_tf_example.py::test_validate_train_evaluate_predict \
	test_zoo_modes.py::test_four_steps[fc_mnist] test_zoo_modes.py::test_four_steps[gpt2]

test-tf: $(TF_STAMP) ## the TensorFlow frontend, in .venv-tf
	$(TF_PYTEST) tests/tf -m "tf and not slow"

test-tf-all: $(TF_STAMP) ## with 50 steps for everything, and with workers
	$(TF_PYTEST) tests/tf -m tf

test-tf-short: ## the most important of them (skipped without Python 3.11)
	@if $(TF_PYTHON) -c "" 2>/dev/null; then $(MAKE) tf-short; \
		else echo "test-tf-short: skipped, there is no $(TF_PYTHON)"; fi

tf-short: $(TF_STAMP)
	$(TF_PYTEST) $(addprefix tests/tf/,$(TF_SHORT)) -m "tf and not slow"

readme: $(STAMP) ## every command of the README and of the pages on the zoo and data
	$(PYTEST) tests/integration/test_readme.py tests/integration/test_zoo_pages.py \
		-m "slow or not slow"

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

ci: lint types layers test test-zoo readme test-cluster test-tf-short ## what CI runs

clean: ## remove .venv and build leftovers
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache

.PHONY: help setup demo test test-all test-zoo test-cluster test-tf test-tf-all test-tf-short tf-short readme lint types layers format ci clean
