# One command a task; each does all of its own set-up in .venv. `make help` lists them.
PYTHON ?= python3
# The torch that tests and demo run with. pyproject.toml states the range that users may have.
TORCH ?= torch==2.13.0

# Of the benchmarks; MERGEKIT may name a virtual environment that has mergekit, else one is made.
SIZE ?= quick
MERGEKIT ?=

# Of the soak: how long, and the seed of its first round (SEED=1234 repeats what it reported).
MINUTES ?= 20
SEED ?=

# Of the example's study.
SEEDS ?= 11 12 13 14 15

VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo example example-study test test-slow soak bench lint format typecheck imports audit build check-wheel clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@

demo: $(VENV)/.installed  ## extract, apply and transfer on small checkpoints
	$(BIN)/rv demo

$(VENV)/.eval: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[eval]'
	touch $@

example: $(VENV)/.eval  ## the whole claim on models trained from nothing, in about eleven minutes; SEED=0
	$(BIN)/python examples/tiny_reasoning/run.py --seed $(or $(SEED),0) --out tiny-reasoning

example-study: $(VENV)/.eval  ## the same for SEEDS='11 12 13 14 15', as tables and a figure
	$(BIN)/python examples/tiny_reasoning/study.py --seeds $(SEEDS) --out tiny-reasoning-study

test: $(VENV)/.dev  ## the tests
	$(BIN)/pytest -m 'not slow and not gpu'

# A second S3, and Azure's blobs, for the tests of storage; without npm those tests are skipped.
build/node/.installed:
	mkdir -p build/node
	if command -v npm >/dev/null; then npm install --silent --prefix build/node s3rver@3 azurite@3; fi
	touch $@

test-slow: $(VENV)/.dev build/node/.installed  ## the slow tests
	RV_TEST_NODE_FOLDER=$$PWD/build/node $(BIN)/pytest -m slow

soak: $(VENV)/.dev  ## random jobs under random faults; MINUTES=20
	cd tests && ../$(BIN)/python -m soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# What a user has, and moto: pyarrow and Numba import pandas and scipy where these are installed, for 0.3 s of every run.
bench:  ## the benchmarks, beside mergekit; SIZE=toy, quick or full
	test -d build/bench-venv || $(PYTHON) -m venv build/bench-venv
	build/bench-venv/bin/pip install --quiet '$(TORCH)' . 'moto[s3,server]'
	build/bench-venv/bin/python tests/benchmarks --size $(SIZE) $(if $(MERGEKIT),--mergekit $(MERGEKIT))

lint: $(VENV)/.dev  ## lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev  ## strict types
	$(BIN)/mypy

imports: $(VENV)/.dev  ## the import contract
	$(BIN)/lint-imports

audit: $(VENV)/.installed  ## known vulnerabilities of the dependencies; needs a network
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

build: $(VENV)/.dev  ## sdist and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --quiet

check-wheel: build  ## install the wheel in an environment of its own and run its demo
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --upgrade pip
	build/wheel-venv/bin/pip install --quiet '$(TORCH)'
	build/wheel-venv/bin/pip install --quiet dist/*.whl
	cd build && wheel-venv/bin/rv demo

clean:  ## remove what these commands made
	rm -rf $(VENV) build dist
