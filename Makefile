# Two commands to remember: `make train` and `make test`. Both set up by themselves: Python 3.11+, git and make are all they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# worksteal: neighbouring tests stay in one process, which makes their file's models once; by default each process would make its own
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all check measure format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with the package and its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"heads_lightning needs Python 3.11 or newer, not {sys.version.split()[0]}; choose one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

train: $(STAMP) ## prepare data, train, evaluate: fill-in-the-middle on Python's own library
	$(BIN)/heads-lightning train $(ARGS)

test: $(STAMP) ## the tests (minutes, no GPU needed)
	$(PYTEST) -m "not slow and not slurm" $(ARGS)

test-all: $(STAMP) ## also the tests that take many minutes
	$(PYTEST) $(ARGS)

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

measure: $(STAMP) ## the toolkit's own costs, into experiments/benchmarks/results (minutes, on an idle machine)
	cd experiments/benchmarks && ../../$(BIN)/python startup.py 12 > results/startup.txt
	cd experiments/benchmarks && ../../$(BIN)/python first_step.py > results/first_step.txt
	cd experiments/benchmarks && ../../$(BIN)/python step.py --rounds 10 --steps 12 > results/step.txt
	cd experiments/benchmarks && ../../$(BIN)/python tracking.py > results/tracking.txt

format: $(STAMP) ## rewrite files in the project's format, and the schemas of conf/
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/heads-lightning schema --out conf/schema

clean: ## remove the environment and build leftovers (runs stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
